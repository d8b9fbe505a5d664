"""A sweep from its points to its table: every check, then teachers, groups, single members, and the choice of a search.

A sweep's folder has

  sweep.json                what the sweep is; another one is refused there
  teachers/seed-N/teacher   the teacher of a seed, unless the config names one; all points of the seed share it
  members/POINT-N/          the run of a point with seed N, as an ordinary run leaves it
  rungs/EPOCHS/POINT-N/     of successive halving, the runs that ended after so many epochs
  groups/                   checkpoints of members that train together, while they do
  table.md, table.json, table.html
"""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np

from cpsc_jax import config as configs
from cpsc_jax import datasets, loop, record, run, schema, tasks
from cpsc_jax.checkpoint import CARD
from cpsc_jax.errors import NonFiniteLoss, Refusal
from cpsc_jax.mesh import single_process
from cpsc_jax.progress import say
from cpsc_jax.sweep import grid, search, table, together
from cpsc_jax.sweep.grid import Point
from cpsc_jax.sweep.members import Member, of_point, program, teacher_point
from cpsc_jax.sweep.search import Rung

SWEEP = "sweep.json"
MOST_MEMBERS = 10_000
LARGEST_GROUP = 64  # members that are begun at a time, of which as many train together as fit
VALIDATION = {"evaluate.split": "validation"}


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What a command asks for.

  Attributes:
    config: of the base.
    flags: the words of the command line that have led to it, for the commands of members.
    grids: as they were given (`sweep.grid`).
    seeds: how many each point has, from config.seed on.
    search: one of `search.SEARCHES`.
    budget: of a search, in runs of full length; 0 for a grid.
    most: members in one program, at most; 0: as many as memory allows; 1: one after another.
  """

  config: ml_collections.ConfigDict
  flags: tuple[str, ...]
  workdir: pathlib.Path
  grids: tuple[str, ...]
  seeds: int
  search: str = "grid"
  budget: int = 0
  most: int = 0


@dataclasses.dataclass(frozen=True)
class Checked:
  """A sweep that was found right.

  Attributes:
    sweep: with the split on which a search chooses.
    points: those that are tried; the base is the first.
    rungs: how many of them are trained up to which epoch.
    programs: {name of a point: `members.program` of its runs}.
    data: the data set.
  """

  sweep: Sweep
  points: list[Point]
  rungs: list[Rung]
  programs: dict[str, str | None]
  data: datasets.Data


def checked(sweep: Sweep) -> Checked:
  """Every check of a sweep, before any work.

  Raises:
    Refusal: a grid that is malformed or cannot be; a point whose config is refused, which is named; two points that
      are the same run; a budget that is too small; more than one process.
  """
  if not single_process():
    raise Refusal("a sweep runs in one process, on all of its devices; start its members as runs of their own instead.")
  if sweep.search != "grid":
    config = ml_collections.ConfigDict(sweep.config.to_dict())
    config.update_from_flattened_dict(VALIDATION)
    sweep = dataclasses.replace(sweep, config=config)
  config = sweep.config
  grids = [grid.parse(text, config) for text in sweep.grids]
  if sweep.seeds + config.seed > 2**32 or sweep.seeds < 1:
    raise Refusal(f"--seeds is {sweep.seeds}; it must be a whole number from 1 on.")
  rungs, points = _planned(sweep, grids)
  if sweep.seeds * len(points) > MOST_MEMBERS:
    raise Refusal(f"the sweep has {sweep.seeds * len(points):,} members; take at most {MOST_MEMBERS:,}.")
  data = datasets.find(config.dataset.name, config.dataset.data_dir)
  programs, same = {}, {}
  for point in points:
    try:
      for rung in rungs:
        c, card = run.resolved(of_point(config, point, config.seed, _length(rung, rungs)), data)
    except Refusal as refusal:
      raise Refusal(f"point {point.name}: {refusal}") from refusal
    key = json.dumps({name: value for name, value in schema.flatten(c) if name != "name"}, sort_keys=True)
    if key in same:
      raise Refusal(
        f"the points {same[key]} and {point.name} are the same run: something else in the config, such as"
        " config.reference, sets what they differ in; leave one of the two out."
      )
    same[key] = point.name
    programs[point.name] = program(c, card)
  return Checked(sweep, points, rungs, programs, data)


def _planned(sweep: Sweep, grids: Sequence[Sequence[grid.Axis]]) -> tuple[list[Rung], list[Point]]:
  config, keys = sweep.config, {key for axes in grids for axis in axes for key in axis.keys}
  training = sorted(key for key in keys if key.startswith("teacher.") and key != "teacher.checkpoint")
  if training and config.teacher.checkpoint:
    raise Refusal(
      f"--grid varies {training[0]}, but config.teacher.checkpoint names a teacher that is trained already; leave one"
      " of the two out."
    )
  if sweep.search == "grid":
    if sweep.budget:
      raise Refusal("--budget is for a search, and a grid has as many members as it has; add --search random.")
    points = grid.points(grids, config)
    return [Rung(len(points), config.schedule.epochs)], points
  if not sweep.budget:
    raise Refusal(f"--search {sweep.search} needs --budget, the number of runs of full length that it may cost.")
  lengthening = sorted(keys & {"schedule.epochs", "schedule.horizon"})
  if sweep.search == "halving" and (lengthening or config.schedule.horizon):
    raise Refusal(
      f"--search halving decides how long runs are, so that {(lengthening or ['schedule.horizon'])[0]} cannot be set;"
      " leave it out, or use --search random."
    )
  least = tasks.waiting_epochs(config) + 1
  rungs = search.planned(sweep.search, sweep.budget, sweep.seeds, config.schedule.epochs, least)
  points = grid.drawn(grids, config, rungs[0].points, np.random.default_rng([config.seed, 0]))
  if len(points) < rungs[0].points:
    say(f"the grid has no more than {len(points)} points, of the {rungs[0].points} that --budget allows")
    ends = [rung.epochs for rung in rungs]
    rungs = search.halving(len(points), ends)
  return rungs, points


def _length(rung: Rung, rungs: Sequence[Rung]) -> dict[str, int]:
  """What makes a config one of a rung: its epochs, while learning rates fall over those of the last one."""
  if rung.epochs == rungs[-1].epochs:
    return {}
  return {"schedule.epochs": rung.epochs, "schedule.horizon": rungs[-1].epochs}


def members(of: Checked, points: Sequence[Point], number: int = -1) -> list[Member]:
  """The members of a rung, by default the last one, for some of the points: point by point, seed by seed."""
  sweep, rungs = of.sweep, of.rungs
  number %= len(rungs)
  folders = [_folder(sweep.workdir, rungs, place) for place in range(len(rungs))]
  found = []
  for point in points:
    for seed in range(sweep.config.seed, sweep.config.seed + sweep.seeds):
      more: dict[str, Any] = _length(rungs[number], rungs)
      teacher = None
      if not of_point(sweep.config, point, seed).teacher.checkpoint:
        teacher = sweep.workdir.absolute() / "teachers" / f"{teacher_point(point).name}-{seed}"
        more["teacher.checkpoint"] = str(teacher / "teacher")
      name = f"{point.name}-{seed}"
      changed = {"seed": seed, **point.changes, **(VALIDATION if sweep.search != "grid" else {}), **more}
      command = ("cpsc-jax", *sweep.flags, *(f"--config.{key}={value}" for key, value in changed.items()))
      found.append(
        Member(
          point=point,
          seed=seed,
          config=of_point(sweep.config, point, seed, more),
          workdir=folders[number] / name,
          teacher=teacher,
          command=command,
          earlier=folders[number - 1] / name if number else None,
        )
      )
  return found


def _folder(workdir: pathlib.Path, rungs: Sequence[Rung], number: int) -> pathlib.Path:
  return workdir / "members" if number == len(rungs) - 1 else workdir / "rungs" / str(rungs[number].epochs)


def carry_out(of: Checked) -> str:
  """Runs or resumes a sweep and returns its table in Markdown.

  Raises:
    Refusal: the folder has another sweep, or what a run raises.
    Preempted: SIGTERM arrived; the same call resumes.
  """
  workdir = of.sweep.workdir
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise Refusal(f"cannot write to {workdir} ({error.strerror}); choose another --workdir.") from error
  with record.locked(workdir / ".lock"):
    claim(of.sweep)
    of.data.require()
    points, text = of.points, ""
    for number, rung in enumerate(of.rungs):
      points = points[: rung.points]
      each = members(of, points, number)
      ends = f"rung {number + 1} of {len(of.rungs)}, {rung.epochs} epochs: " if len(of.rungs) > 1 else ""
      say(f"{ends}{len(points)} points with {of.sweep.seeds} seed(s), {sum(m.done for m in each)} members done before")
      for _ in trained(of, each):
        text = _write(of, each, number)
      text = _write(of, each, number, page=True)
      points = _ranked(each)
      if of.sweep.search != "grid" and not points:
        raise Refusal("no point has results of all its seeds, so that none is the best; see table.md for the reasons.")
      if all(member.failure for member in each):
        raise Refusal("no member of the sweep has results: none of their losses stayed finite; see table.md.")
    return text


def claim(sweep: Sweep) -> None:
  """Makes a folder this sweep's.

  Raises:
    Refusal: it is another one's, or a run's; says in what they differ.
  """
  path = sweep.workdir / SWEEP
  asked = {"grid": list(sweep.grids), "seeds": sweep.seeds, "search": sweep.search, "budget": sweep.budget}
  said = {**asked, "config": json.loads(configs.dump(sweep.config))}
  if not path.exists():
    if (sweep.workdir / "config.json").exists():
      raise Refusal(f"{sweep.workdir} has a run, and a sweep needs a folder of its own; choose another --workdir.")
    record.write_whole(path, (json.dumps(said, indent=2) + "\n").encode())
    return
  try:
    begun = json.loads(path.read_text())
    differ = [f"--{name}" for name in asked if begun[name] != asked[name]]
    ours, theirs = dict(schema.flatten(said["config"])), dict(schema.flatten(begun["config"]))
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise Refusal(f"{path} cannot be read ({error}); restore it or choose another --workdir.") from error
  keys = (ours.keys() | theirs.keys()) - set(configs.FREE)
  differ += sorted(key for key in keys if ours.get(key, ...) != theirs.get(key, ...))
  if differ:
    raise Refusal(
      f"{sweep.workdir} belongs to another sweep (it differs in {', '.join(differ)}); choose another --workdir."
    )


def trained(of: Checked, each: Sequence[Member]) -> Iterator[Sequence[Member]]:
  """Trains what is not done of the members, teachers first; yields after each member or group that is done."""
  for member in each:
    if member.teacher and not member.done and not (member.teacher / "teacher" / CARD).exists():
      try:
        _teach(of, member)
      except NonFiniteLoss as failure:
        taught = [other for other in each if other.teacher == member.teacher and not other.done]
        _give_up(taught, failure)
        yield taught
  root = of.sweep.workdir / "groups" / each[0].workdir.parent.name
  by_name = {member.name: member for member in each}
  for folder in sorted(root.glob("*")):
    names = json.loads((folder / together.GROUP).read_text()) if (folder / together.GROUP).exists() else []
    group = [by_name[name] for name in names if name in by_name]
    if group and len(group) == len(names) and not all(member.done for member in group):
      yield together.carry_out(group, root, of.data, whole=True)
    shutil.rmtree(folder)
  groups: dict[str, list[Member]] = {}
  for member in each:
    if not member.done:
      groups.setdefault(_group(of, member), []).append(member)
  for group in groups.values():
    while len(group) > 1 and of.sweep.most != 1:
      taken = together.carry_out(group[: of.sweep.most or LARGEST_GROUP], root, of.data)
      shutil.rmtree(together.folder_of(root, taken))
      yield taken
      group = group[len(taken) :]
    for member in group:
      _alone(member, of.data)
      yield [member]


def _group(of: Checked, member: Member) -> str:
  """What is equal for members that may train together; one that was interrupted alone goes on alone."""
  goes_on = not member.done and (member.workdir / "checkpoints").exists()
  return member.name if goes_on else of.programs[member.point.name] or member.name


def _teach(of: Checked, member: Member) -> None:
  """Trains the teacher of a member, or goes on with it; all points that do not change it share it."""
  point = Point("", teacher_point(member.point).changes)
  config = of_point(of.sweep.config, point, member.seed)
  folder = member.teacher
  c, card = run.resolved(config, of.data)
  say(f"the teacher of seed {member.seed}")
  with record.claimed(folder, c):
    run.teacher_in(folder, c, card, of.data)


def _alone(member: Member, data: datasets.Data) -> None:
  """Runs a member as an ordinary run, in this process."""

  def go_on(begun: run.Begun) -> None:
    if member.earlier and not (member.workdir / "checkpoints").exists():
      loop.save(begun.plan, together.ended_before(member, begun))

  say(f"member {member.name}")
  try:
    run.run(member.config, member.workdir, data=data, command=member.command, on_begun=go_on)
  except NonFiniteLoss as failure:
    _give_up([member], failure)


def _give_up(failed: Sequence[Member], failure: NonFiniteLoss) -> None:
  say(f"{failure} The sweep goes on.")
  for member in failed:
    together.fail(member, failure)


def _ranked(each: Sequence[Member]) -> list[Point]:
  """The points that have results for every seed, by their mean accuracy, best first."""
  table_of = {row["point"]: row for row in table.rows(each)}
  points = {member.point.name: member.point for member in each}
  complete = [name for name, row in table_of.items() if not row["failed"] and row["accuracy"]]
  ranked = sorted(complete, key=lambda name: -table_of[name]["mean"])
  return [points[name] for name in ranked]


def _write(of: Checked, each: Sequence[Member], number: int, page: bool = False) -> str:
  last = number == len(of.rungs) - 1
  name = "table" if last else f"table_{of.rungs[number].epochs}"
  return table.write(of.sweep.workdir, name, each, about(of, number), page)


def about(of: Checked, number: int) -> dict[str, Any]:
  """What a table says above and below its rows."""
  sweep, config = of.sweep, of.sweep.config
  what = f"{len(of.points)} points of {' and '.join(sweep.grids)}"
  kind = {"grid": what, "random": f"random search, {what}", "halving": f"successive halving, {what}"}[sweep.search]
  notes = []
  base = _base_values(of)
  if base:
    notes.append(f"Base: config {config.name}, {', '.join(f'{key}={value}' for key, value in base.items())}.")
  if sweep.search != "grid":
    notes.append("Measured on the validation part of the training split, on which the best point is chosen.")
  if len(of.rungs) > 1:
    notes.append(f"Members of {of.rungs[number].epochs} epochs, whose rates fall over {of.rungs[-1].epochs}.")
  return {
    "title": f"{config.name}: {kind}, {sweep.seeds} seed(s) each",
    "notes": notes,
    "grid": list(sweep.grids),
    "seeds": sweep.seeds,
    "search": sweep.search,
    "budget": sweep.budget,
    "epochs": of.rungs[number].epochs,
    "split": config.evaluate.split,
    "base": base,
  }


def _base_values(of: Checked) -> dict[str, Any]:
  """What the base has of the keys that vary."""
  flat = dict(schema.flatten(of.sweep.config))
  keys = dict.fromkeys(
    key for text in of.sweep.grids for axis in grid.parse(text, of.sweep.config) for key in axis.keys
  )
  return {key: flat[key] for key in keys}


def plan_text(of: Checked) -> str:
  """What a sweep would do, with the time that it is predicted to take; nothing is written.

  One iteration of each program is compiled and carried out twice on random weights.
  """
  sweep = of.sweep
  lines, total = [], 0.0
  each = members(of, of.points, 0)
  taught = {member.teacher for member in each if member.teacher}
  lines.append(f"{len(of.points)} points, {sweep.seeds} seed(s): {len(each)} members in {sweep.workdir}")
  if taught:
    there = sum((folder / "teacher" / CARD).exists() for folder in taught)
    lines.append(f"{len(taught)} teachers are trained first, {there} of them are there; their time is not predicted")
  groups: dict[str, list[Member]] = {}
  for member in each:
    groups.setdefault(_group(of, member), []).append(member)
  for group in groups.values():
    names, digest = ", ".join(member.name for member in group), of.programs[group[0].point.name]
    waiting = [member for member in group if not member.done]
    if not waiting or not digest:
      lines.append(f"  {'alone, in a time that is not predicted' if waiting else 'done already'}: {names}")
      continue
    c, card = run.resolved(of_point(sweep.config, group[0].point, group[0].seed), of.data)
    size = min(sweep.most or LARGEST_GROUP, len(waiting))
    found = together.rehearsed(c, card, of.data, size, len({m.config.teacher.checkpoint for m in waiting}) > 1)
    calls = -(-len(waiting) // found.number)
    epochs = of.rungs[0].epochs if len(of.rungs) > 1 else c.schedule.epochs
    seconds = calls * (found.seconds * c.schedule.iterations * epochs) + found.compiling
    total += seconds
    how = f"{found.number} in a program of {found.mib:,.0f} MiB" if found.number > 1 else "one after another"
    lines.append(
      f"  {how}, {1000 * found.seconds:.0f} ms an iteration, {len(waiting)} to do in {seconds:,.0f} s: {names}"
    )
  for rung in of.rungs[1:]:
    lines.append(f"  then the best {rung.points} points go on to epoch {rung.epochs}; their time is not predicted")
  lines.append(f"in all {total:,.0f} s of training and compiling, without evaluation and teachers")
  return "\n".join(lines)
