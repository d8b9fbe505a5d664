"""A plan of runs, carried out row by row, and the tables of what is finished.

  python -m benchmarks.table benchmarks/plans/cifar10_cpu.py [--out runs/table] [--jobs 1] [--budget 2h]
    [--into docs/results.md] [--config.KEY=VALUE ...]

A plan is a Python file with PAIR (a title), ROWS, best expected evidence first, and PUBLISHED, figures of others for
the same pair. Each seed of a row is a run of its own in OUT/PLAN/ROW-SEED. A finished run is not repeated; with
--budget nothing is begun after that time, and what is under way is stopped then and resumed by the next call, here or
where OUT was copied to. Flags after the options are given to every run, such as the folder of a teacher.

After each run the table takes the place of what stands between the marks <!-- table PLAN --> and <!-- /table PLAN -->
of FILE, and FILE with the ending .json has the numbers, the command and the commit of every run; PLAN.png beside it
shows accuracy against time and against images, all rows in one picture. A row is written from results.json of finished
runs alone.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import pathlib
import queue
import re
import runpy
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmarks.methods import KEPT, REPOSITORY, put_between, run, shares
from cpsc_jax.config import differences, waiting_epochs
from cpsc_jax.errors import Refusal
from cpsc_jax.main import parse
from cpsc_jax.record import write_whole
from cpsc_jax.report import fidelity_name, save_figure

UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a plan: `config` as --config takes it, more `flags`, and the seeds it is to be run with."""

  name: str
  config: str
  flags: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0,)

  @property
  def slug(self) -> str:
    return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a plan's file declares. `published`: rows of others, (what, accuracy, of which teacher)."""

  name: str
  pair: str
  rows: tuple[Row, ...]
  published: tuple[tuple[str, str, str], ...] = ()


def read(path: pathlib.Path) -> Plan:
  """The plan in a file.

  Raises:
    Refusal: no such file, a file that lacks PAIR or ROWS, or two rows of one name.
  """
  try:
    scope = runpy.run_path(str(path))  # a plan is a program of the user's own, as a config is
  except OSError as error:
    raise Refusal(f"plan {path} cannot be read: {error.strerror}.") from None
  lacking = [name for name in ("PAIR", "ROWS") if name not in scope]
  if lacking:
    raise Refusal(f"plan {path} lacks {' and '.join(lacking)}; see benchmarks/plans for an example.")
  rows = tuple(scope["ROWS"])
  if len({row.slug for row in rows}) < len(rows):
    raise Refusal(f"plan {path} has two rows of the same name; rename one.")
  return Plan(path.stem, scope["PAIR"], rows, tuple(scope.get("PUBLISHED", ())))


def folder(out: pathlib.Path, plan: Plan, row: Row, seed: int) -> pathlib.Path:
  return out / plan.name / f"{row.slug}-{seed}"


def finished(out: pathlib.Path, plan: Plan) -> dict[str, list[dict]]:
  """{row: [what is kept of a finished run, with its command and commit, ...]}, of the plan's seeds alone."""
  found = {}
  for row in plan.rows:
    found[row.name] = []
    for seed in row.seeds:
      workdir = folder(out, plan, row, seed)
      if (workdir / "results.json").exists():
        results = json.loads((workdir / "results.json").read_text())
        origin = json.loads(workdir.with_suffix(".origin.json").read_text())
        results["teacher"].pop("checkpoint", None)  # a place on one machine; the digest says which it is
        found[row.name].append({key: results[key] for key in KEPT} | origin)
  return found


def table(plan: Plan, found: Mapping[str, list[dict]]) -> str:
  """The plan as Markdown; rows without a finished run say so."""
  lines = [
    "| row | seeds | last epoch | mean | deviation | best epoch | gap to teacher | agreement | fidelity |"
    " student's images | minutes |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in plan.rows:
    lines.append(_line(row, found.get(row.name, [])))
  for what, accuracy, teacher in plan.published:
    lines.append(f"| *published:* {what} | | {accuracy} | | | | {teacher} | | | | |")
  return "\n".join([f"**{plan.pair}**", "", *lines, "", *_notes(found)])


def _line(row: Row, runs: list[dict]) -> str:
  if not runs:
    return f"| {row.name} | not measured | | | | | | | | | |"
  last, best, agreed = [], [], []
  for r in runs:
    last.append(r["student"]["last"]["accuracy"])
    agreed.append(r["student"]["last"]["agreement"])
    best.append(f"{r['student']['best']['accuracy']:.4f} at {r['student']['best']['epoch']}")
  gap = statistics.mean(r["teacher"]["accuracy"] - value for r, value in zip(runs, last, strict=True))
  deviation = f"{statistics.stdev(last):.4f}" if len(last) > 1 else ""
  generators = [r["generator"] for r in runs if r["generator"]]
  fidelity = ", ".join(f"{g[fidelity_name(g)]:.3f}" for g in generators if g[fidelity_name(g)] is not None)
  minutes = statistics.mean(r["seconds"] for r in runs) / 60
  cells = (
    row.name,
    ", ".join(str(r["seed"]) for r in runs),
    ", ".join(f"{value:.4f}" for value in last),
    f"{statistics.mean(last):.4f}",
    deviation,
    ", ".join(best),
    f"{gap:.4f}",
    ", ".join(f"{value:.4f}" for value in agreed),
    fidelity,
    f"{runs[0]['samples']['student']:,}",
    f"{minutes:.0f}",
  )
  return f"| {' | '.join(cells)} |"


def _notes(found: Mapping[str, list[dict]]) -> list[str]:
  """The teacher, the images and the hardware of all finished runs, each named once."""
  runs = [r for of_row in found.values() for r in of_row]
  said = {
    f"Teacher {r['teacher']['net']}, {r['teacher']['accuracy']:.4f}; {r['evaluation']['images']:,} images of the"
    f" {r['evaluation']['split']} split; {r['hardware']['cores']} core(s) of {r['hardware']['cpu']},"
    f" {r['hardware']['devices']} x {r['hardware']['device']}. Minutes are of the whole command."
    for r in runs
  }
  return sorted(said) or ["Nothing is measured yet."]


def write(out: pathlib.Path, plan: Plan, into: pathlib.Path | None) -> None:
  """OUT/PLAN.md and OUT/PLAN.json, and the same into FILE and its .json.

  Raises:
    Refusal: FILE lacks the marks.
  """
  found = finished(out, plan)
  text = table(plan, found)
  out.mkdir(parents=True, exist_ok=True)
  write_whole(out / f"{plan.name}.md", (text + "\n").encode())
  write_whole(out / f"{plan.name}.json", (json.dumps(found, indent=2) + "\n").encode())
  picture = out / f"{plan.name}.png"
  draw(out, plan, picture)
  if not into:
    return
  put_between(into, (f"<!-- table {plan.name} -->", f"<!-- /table {plan.name} -->"), text)
  write_whole(into.with_name(picture.name), picture.read_bytes())
  numbers = into.with_suffix(".json")
  known = json.loads(numbers.read_text()) if numbers.exists() else {}
  write_whole(numbers, (json.dumps(known | {plan.name: found}, indent=2) + "\n").encode())


def timeline(workdir: pathlib.Path) -> dict[int, float]:
  """{epoch: seconds of training up to its end}, over all starts of a run, from its TensorBoard events."""
  seconds = {}
  for file in sorted((workdir / "events").iterdir()):
    begin = before = 0.0
    for event in EventFileLoader(str(file)).Load():
      if event.WhichOneof("what") == "session_log":
        begin, before = event.wall_time, seconds.get(event.step - 1, 0.0)
      elif event.step:
        seconds[event.step] = before + event.wall_time - begin
  return seconds


def draw(out: pathlib.Path, plan: Plan, path: pathlib.Path) -> None:
  """Accuracy of every finished run against minutes of its training and against the images its student saw, as a PNG."""
  figure = Figure(figsize=(11, 4.2), layout="constrained")
  by_time, by_images = figure.subplots(1, 2, sharey=True)
  for number, row in enumerate(plan.rows):
    for seed in row.seeds:
      workdir = folder(out, plan, row, seed)
      if not (workdir / "results.json").exists():
        continue
      results = json.loads((workdir / "results.json").read_text())
      history = json.loads((workdir / "history.json").read_text())["student"]
      measured, seconds = [entry for entry in history if "accuracy" in entry], timeline(workdir)
      resting = waiting_epochs(ConfigDict(results["config"]))
      each = results["samples"]["student"] / (len(history) - resting) / 1000
      accuracy = [entry["accuracy"] for entry in measured]
      style = {"label": row.name if seed == row.seeds[0] else None, "color": f"C{number}"}
      by_time.plot([seconds[entry["epoch"]] / 60 for entry in measured], accuracy, **style)
      by_images.plot([max(entry["epoch"] - resting, 0) * each for entry in measured], accuracy, **style)
  by_time.set(xlabel="minutes of training", ylabel="accuracy", title=plan.pair)
  by_images.set(xlabel="images that the student has seen, thousands")
  for axis in (by_time, by_images):
    axis.grid(alpha=0.3)
  if by_time.lines:
    by_time.legend()
  save_figure(figure, path, dpi=120)


def commit() -> str:
  """The commit of this checkout, with "+" where files differ from it."""

  def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()

  return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def carry_out(row: Row, seed: int, workdir: pathlib.Path, flags: Sequence[str], cores: set[int], until: float) -> None:
  """Runs or resumes one seed of a row on these `cores`; tells it to stop at the time `until`.

  Raises:
    Refusal: the run failed, and its last line is quoted; or the folder has a run of another command or config.
  """
  given = [f"--config={row.config}", f"--config.seed={seed}", *row.flags]
  about = {"command": shlex.join(["cpsc-jax", *given]), "commit": commit()}
  origin = workdir.with_suffix(".origin.json")
  if origin.exists() and (known := json.loads(origin.read_text())["command"]) != about["command"]:
    raise Refusal(f"{workdir} was begun as '{known}', not as '{about['command']}'; delete it or rename the row.")
  if (workdir / "config.json").exists():
    config = parse(["cpsc-jax", *given, *flags])[0]
    if differ := differences(config, json.loads((workdir / "config.json").read_text())):
      raise Refusal(f"{workdir} was run with another {', '.join(differ)}; delete it or rename the row.")
  workdir.parent.mkdir(parents=True, exist_ok=True)
  if not origin.exists() and time.monotonic() < until:
    write_whole(origin, (json.dumps(about) + "\n").encode())
  done = run(row.config, [*given[1:], *flags], workdir, cores, until)
  if done or workdir.exists():
    print(f"{row.name}, seed {seed}: {'done' if done else 'stopped; the same command resumes it'}", flush=True)


def seconds_of(text: str) -> float:
  """Seconds of "90s", "30m" or "2h"."""
  number, unit = text[:-1], text[-1:]
  try:
    return float(number) * UNITS[unit]
  except (KeyError, ValueError):
    raise Refusal(f"--budget is '{text}'; expected a number and s, m or h, such as 2h.") from None


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, runs what is missing, writes the table; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.table", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument("plan", type=pathlib.Path, help="a Python file with PAIR and ROWS")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/table"), help="(default: %(default)s)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
  parser.add_argument("--budget", help="time after which nothing is begun, such as 2h (default: any)")
  parser.add_argument("--into", type=pathlib.Path, help="a Markdown file with the plan's two marks")
  options, flags = parser.parse_known_args(argv)
  try:
    wrong = [flag for flag in flags if not flag.startswith("--config.")]
    if wrong:
      raise Refusal(f"{wrong[0]} is not an option; flags of every run are written as --config.KEY=VALUE.")
    until = time.monotonic() + (seconds_of(options.budget) if options.budget else 10**9)
    plan = read(options.plan)
    write(options.out, plan, options.into)
    cores = queue.Queue()
    for share in shares(options.jobs):
      cores.put(share)

    def one(row: Row, seed: int) -> None:
      share = cores.get()
      try:
        carry_out(row, seed, folder(options.out, plan, row, seed).absolute(), flags, share, until)
      finally:
        cores.put(share)

    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
      for future in [pool.submit(one, row, seed) for row in plan.rows for seed in row.seeds]:
        future.result()
        write(options.out, plan, options.into)
    print(table(plan, finished(options.out, plan)))
    return 0
  except Refusal as refusal:
    print(f"benchmarks.table: {refusal}", file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
