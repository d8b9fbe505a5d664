"""A plan of runs, carried out row by row, and the tables of what is finished.

  python -m benchmarks.table benchmarks/plans/digits.py [--only cpsc] [--out runs/table] [--jobs 1] [--budget 2h]
    [--into docs/results.md] [--config.KEY=VALUE ...]

A plan is a Python file with PAIR (a title) and ROWS, best expected evidence first; also BASE, the row with which others
are compared seed by seed, PUBLISHED, figures of others for the same pair, and CURVES, {what is varied: {value: row}}.
Each seed of a row is a run of its own in OUT/PLAN/ROW-SEED. A finished run is not repeated; with --budget nothing is
begun after that time, and what is under way is stopped then and resumed by the next call, here or where OUT was copied
to. Flags after the options are given to every run, such as the folder of a teacher. With --jobs N that many runs are
under way at a time, each on its own share of the cores.

A run that fails does not keep others from being carried out; the command then ends with the first failure's reason.

After each run the table takes the place of what stands between the marks <!-- table PLAN --> and <!-- /table PLAN -->
of FILE, and FILE with the ending .json has the numbers, the command, what else it was given and the commit of every
run; PLAN.png beside it shows accuracy against time and against images, all rows in one picture. A plan with CURVES has
PLAN_curves.png as well, accuracy against what is varied. A row is written from results.json of finished runs alone. Of
a run that is not in OUT, what the .json file has of the same command stays; delete it there, or run it again here, to
be rid of it.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import json
import os
import pathlib
import queue
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from benchmarks import plan as plans
from benchmarks.command import flags_of_runs
from benchmarks.plan import Plan, Row, folder
from cpsc_jax import checksums, schema, tasks
from cpsc_jax.errors import Refusal
from cpsc_jax.record import write_whole
from cpsc_jax.report import fidelity_name, save_figure

AVERAGE = "average incremental accuracy"
THIRDS = ("head", "middle", "tail")  # of the classes of a long-tailed training split
KEPT = (
  "seed",
  "arm",
  "method",
  "teacher",
  "student",
  "generator",
  "evaluation",
  "samples",
  "seconds",
  "seconds_by_part",
  "hardware",
)  # of results.json


def finished(out: pathlib.Path, plan: Plan, recorded: Mapping[str, list[dict]] | None = None) -> dict[str, list[dict]]:
  """{row: [what is kept of a finished run, with its command, commit and curve, ...]}, of the plan's seeds alone.

  `recorded` is what this returned of the plan before: it stands in for runs of the same command that are not in `out`.
  Rows that differ in their teachers alone have the same commands, and are told apart by their names.
  """
  of_row = {(name, run["command"]): run for name, runs in (recorded or {}).items() for run in runs}
  of_command = {command: run for (_, command), run in of_row.items()}
  times = collections.Counter(row.command(seed) for row in plan.rows for seed in row.seeds)

  def elsewhere(row: Row, command: str) -> dict | None:
    return of_row.get((row.name, command)) or (of_command.get(command) if times[command] == 1 else None)

  found = {}
  for row in plan.rows:
    runs = [kept(folder(out, plan, row, seed)) or elsewhere(row, row.command(seed)) for seed in row.seeds]
    found[row.name] = [run for run in runs if run]
  return found


def kept(workdir: pathlib.Path) -> dict | None:
  """What is kept of a finished run; None of any other folder.

  Raises:
    Refusal: a run that no plan has begun, so that its command and commit are not known, or damaged files.
  """
  if not (workdir / "results.json").exists():
    return None
  begun = workdir.with_suffix(".origin.json")
  if not begun.exists():
    raise Refusal(f"{workdir} has a finished run, but {begun.name} is not beside it; copy that too, or move it away.")
  checksums.check_finished(workdir)
  results = json.loads((workdir / "results.json").read_text())
  origin = json.loads(begun.read_text())
  results["teacher"].pop("checkpoint", None)  # a place on one machine; the digest says which it is
  phases = results.get("incremental")
  more = {"incremental": phases} if phases else {"curve": curve(workdir, results)}
  more |= {name: results[name] for name in ("quantised", "long_tail", "prior") if name in results}
  return {key: results[key] for key in KEPT} | origin | more


def table(plan: Plan, found: Mapping[str, list[dict]]) -> str:
  """The plan as Markdown; rows without a finished run say so."""
  against = f"against {plan.base}" if plan.base else ""
  columns = ("row", "seeds", "last epoch", "mean", "deviation", against, "best epoch", "gap to teacher", "agreement")
  columns = (*columns, "fidelity", "student's images", "seconds")
  if any("long_tail" in run for runs in found.values() for run in runs):
    columns = (*columns[:6], *THIRDS, *columns[6:])
  if any("incremental" in run for runs in found.values() for run in runs):
    columns = ("row", "seeds", AVERAGE, "mean", "deviation", against, "at the end", "forgetting", "seconds")
  elif any("quantised" in run for runs in found.values() for run in runs):
    columns = ("row", "seeds", "without data", "calibrated", "last epoch", "mean", "deviation", against)
    columns = (*columns, "gap to teacher", "agreement", "seconds")
  columns = [name for name in columns if name]
  lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
  for row in plan.rows:
    runs = found.get(row.name, [])
    cells = {"row": row.name} | (_cells(runs) if runs else {"seeds": "not measured"})
    if runs and plan.base:
      cells[against] = "" if row.name == plan.base else _against(runs, found.get(plan.base, []))
    lines.append(f"| {' | '.join(cells.get(name, '') for name in columns)} |")
  for what, accuracy, teacher in plan.published:
    cells = {"row": f"*published:* {what}", "last epoch": accuracy, AVERAGE: accuracy, "gap to teacher": teacher}
    lines.append(f"| {' | '.join(cells.get(name, '') for name in columns)} |")
  return "\n".join([f"**{plan.pair}**", "", *lines, "", *_notes(plan, found)])


def headline(run: Mapping) -> float:
  """The figure by which runs are compared: accuracy at the last epoch, or its average over phases."""
  return run["incremental"]["average"] if "incremental" in run else run["student"]["last"]["accuracy"]


def _cells(runs: list[dict]) -> dict[str, str]:
  """What the table says of the finished runs of a row."""
  last, best = ([r["student"][which] for r in runs] for which in ("last", "best"))
  accuracies = [headline(r) for r in runs]
  common = {
    "seeds": ", ".join(str(r["seed"]) for r in runs),
    "mean": f"{statistics.mean(accuracies):.4f}",
    "deviation": f"{statistics.stdev(accuracies):.4f}" if len(runs) > 1 else "",
    "seconds": f"{statistics.median(r['seconds'] for r in runs):,.0f}",
  }
  if phases := [r["incremental"] for r in runs if "incremental" in r]:
    return common | {
      AVERAGE: ", ".join(f"{value:.4f}" for value in accuracies),
      "at the end": f"{statistics.mean(of['accuracy'][-1] for of in phases):.4f}",
      "forgetting": f"{statistics.mean(of['forgetting'] for of in phases):.4f}",
    }
  gap = statistics.mean(r["teacher"]["accuracy"] - value for r, value in zip(runs, accuracies, strict=True))
  generators = [r["generator"] for r in runs if r["generator"]]
  fidelity = [g[fidelity_name(g)] for g in generators if g[fidelity_name(g)] is not None]
  pool = " (pool)" if fidelity and fidelity_name(generators[0]) == "pool_fidelity" else ""
  if stages := [r["quantised"] for r in runs if "quantised" in r]:
    for stage in ("without_data", "calibrated"):
      common[stage.replace("_", " ")] = ", ".join(f"{of[stage]:.4f}" for of in stages)
  if all("long_tail" in r for r in runs):
    for third in THIRDS:
      common[third] = f"{statistics.mean(r['long_tail']['student']['last'][third] for r in runs):.4f}"
  return common | {
    "last epoch": ", ".join(f"{value:.4f}" for value in accuracies),
    "best epoch": ", ".join(f"{entry['accuracy']:.4f} at {entry['epoch']}" for entry in best),
    "gap to teacher": f"{gap:.4f}",
    "agreement": f"{statistics.mean(entry['agreement'] for entry in last):.4f}",
    "fidelity": f"{statistics.mean(fidelity):.3f}{pool}" if fidelity else "",
    "student's images": f"{runs[0]['samples']['student']:,}",
  }


def _against(runs: list[dict], base: list[dict]) -> str:
  """The mean difference in accuracy to the base row with the same seed and teacher, and its standard error."""
  known = {(r["seed"], r["teacher"].get("digest")): headline(r) for r in base}
  pairs = [((r["seed"], r["teacher"].get("digest")), headline(r)) for r in runs]
  both = [accuracy - known[pair] for pair, accuracy in pairs if pair in known]
  if not both:
    return ""
  error = f" ± {statistics.stdev(both) / len(both) ** 0.5:.4f}" if len(both) > 1 else ""
  return f"{statistics.mean(both):+.4f}{error}"


def _notes(plan: Plan, found: Mapping[str, list[dict]]) -> list[str]:
  """The teachers, the images and the hardware of all finished runs, each named once."""
  runs = [r for of_row in found.values() for r in of_row]
  if not runs:
    return ["Nothing is measured yet."]
  of_net: dict[str, set[tuple[int, float]]] = {}
  for r in runs:
    of_net.setdefault(r["teacher"]["net"], set()).add((r["seed"], round(r["teacher"]["accuracy"], 4)))
  lines = []
  for net, pairs in sorted(of_net.items()):
    values = [accuracy for _, accuracy in sorted(pairs)]
    each = ", ".join(f"{accuracy:.4f} (seed {seed})" for seed, accuracy in sorted(pairs))
    several = len(set(values)) > 1
    lines.append(f"Teacher {net}: {f'{each}; mean {statistics.mean(values):.4f}' if several else f'{values[0]:.4f}'}.")
  if tails := [r["long_tail"] for r in runs if "long_tail" in r]:
    parts = ", ".join(f"{third} {statistics.mean(of['teacher'][third] for of in tails):.4f}" for third in THIRDS)
    counts = ", ".join(map(str, tails[0]["images_per_class"]))
    lines.append(f"The teachers' training images per class: {counts}; their accuracy in the mean: {parts}.")
  measured = {
    f"{r['evaluation']['images']:,} images of the {r['evaluation']['split']} split; {r['hardware']['cores']} core(s) of"
    f" {r['hardware']['cpu']}, {r['hardware']['devices']} x {r['hardware']['device']}."
    for r in runs
  }
  compared = [f"The column against {plan.base} pairs seeds; after ± its standard error."] if plan.base else []
  return [*lines, *sorted(measured), "Seconds are the median of whole commands.", *compared]


def write(out: pathlib.Path, plan: Plan, into: pathlib.Path | None) -> dict[str, list[dict]]:
  """OUT/PLAN.md and OUT/PLAN.json, and the same into FILE and its .json; returns what they were written from.

  Raises:
    Refusal: FILE lacks the marks, or its .json cannot be read.
  """
  out.mkdir(parents=True, exist_ok=True)
  with _alone_in(out, *([into.parent] if into else [])):
    return _write(out, plan, into)


@contextlib.contextmanager
def _alone_in(*folders: pathlib.Path) -> Iterator[None]:
  """Waits until no other call writes there: two may carry out different rows of a plan."""
  with contextlib.ExitStack() as stack:
    for folder in sorted({folder.resolve() for folder in folders}):
      handle = os.open(folder, os.O_RDONLY)
      stack.callback(os.close, handle)
      fcntl.flock(handle, fcntl.LOCK_EX)
    yield


def _write(out: pathlib.Path, plan: Plan, into: pathlib.Path | None) -> dict[str, list[dict]]:
  numbers = into.with_suffix(".json") if into else None
  try:
    known = json.loads(numbers.read_text()) if numbers and numbers.exists() else {}
  except ValueError as error:
    raise Refusal(f"{numbers} cannot be read ({error}); restore it.") from error
  found = finished(out, plan, known.get(plan.name))
  text = table(plan, found)
  write_whole(out / f"{plan.name}.md", (text + "\n").encode())
  write_whole(out / f"{plan.name}.json", (json.dumps(found, indent=2) + "\n").encode())
  pictures = {out / f"{plan.name}.png": draw, out / f"{plan.name}_curves.png": draw_curves}
  drawn = [path for path, picture in pictures.items() if picture(plan, found, path)]
  if into:
    put_between(into, (f"<!-- table {plan.name} -->", f"<!-- /table {plan.name} -->"), text)
    write_whole(numbers, (json.dumps(known | {plan.name: found}, indent=2) + "\n").encode())
    for picture in drawn:
      write_whole(into.with_name(picture.name), picture.read_bytes())
  return found


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


def curve(workdir: pathlib.Path, results: Mapping) -> dict[str, list[float]]:
  """At the measured epochs of a finished run: minutes of training, images that its student has seen, accuracy."""
  history = json.loads((workdir / "history.json").read_text())["student"]
  measured, seconds = [entry for entry in history if "accuracy" in entry], timeline(workdir)
  config = schema.defaults()  # an old record lacks newer keys: it was run with their defaults
  config.update(results["config"])
  resting = tasks.waiting_epochs(config)
  each = results["samples"]["student"] / max(len(history) - resting, 1)  # of a student that only rests, 0
  epochs = [entry["epoch"] for entry in measured]
  return {
    "minutes": [round(seconds[epoch] / 60, 3) for epoch in epochs],
    "images": [round(max(epoch - resting, 0) * each) for epoch in epochs],
    "accuracy": [entry["accuracy"] for entry in measured],
  }


def draw(plan: Plan, found: Mapping[str, list[dict]], path: pathlib.Path) -> bool:
  """Accuracy of every row against minutes of training and against the images its student saw, as a PNG.

  A row is the mean of its finished seeds. Nothing is drawn, and False returned, if no run has its curve.
  """
  colours = colormaps["tab20"].colors[::2] + colormaps["tab20"].colors[1::2]
  figure = Figure(figsize=(13, 4.6), layout="constrained")
  by_time, by_images = figure.subplots(1, 2, sharey=True)
  for number, row in enumerate(plan.rows):
    line = ("-", "--", ":")[number // len(colours) % 3]
    style = {"label": row.name, "color": colours[number % len(colours)], "ls": line, "lw": 1.2}
    curves = [run["curve"] for run in found.get(row.name, []) if "curve" in run]
    if curves:
      minutes, images, accuracy = (
        np.mean([of[axis] for of in curves], 0) for axis in ("minutes", "images", "accuracy")
      )
      by_time.plot(minutes, accuracy, **style)
      by_images.plot(images / 1000, accuracy, **style)
  by_time.set(xlabel="minutes of training", ylabel="accuracy")
  by_images.set(xlabel="images that the student has seen, thousands")
  for axis in (by_time, by_images):
    axis.grid(alpha=0.3)
  if not by_time.lines:
    return False
  figure.suptitle(plan.pair, fontsize="medium")
  figure.legend(*by_time.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
  save_figure(figure, path, dpi=120)
  return True


def draw_curves(plan: Plan, found: Mapping[str, list[dict]], path: pathlib.Path) -> bool:
  """Accuracy at the last epoch against what each of the plan's curves varies, a panel for each, as a PNG.

  A point is the mean of a row's finished seeds, its bar their standard deviation; a point whose row is the plan's base
  is filled. Nothing is drawn, and False returned, if no row of a curve has a finished run.
  """
  curves = {
    title: {value: [headline(run) for run in found.get(row, [])] for value, row in sorted(points.items())}
    for title, points in plan.curves.items()
  }
  if not any(accuracies for points in curves.values() for accuracies in points.values()):
    return False
  figure = Figure(figsize=(3.3 * len(curves), 3.4), layout="constrained")
  panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
  for panel, (title, points) in zip(panels, curves.items(), strict=True):
    points = {value: accuracies for value, accuracies in points.items() if accuracies}
    means = [statistics.mean(accuracies) for accuracies in points.values()]
    deviations = [statistics.stdev(each) if len(each) > 1 else 0.0 for each in points.values()]
    panel.errorbar(list(points), means, deviations, fmt="o-", mfc="white", capsize=3, lw=1.2)
    for value, mean in zip(points, means, strict=True):
      if plan.curves[title][value] == plan.base:
        panel.plot([value], [mean], "o", color=panel.lines[0].get_color(), zorder=3)  # above the white one
    panel.set(xlabel=title)
    panel.grid(alpha=0.3)
  panels[0].set(ylabel="accuracy")
  figure.suptitle(plan.pair, fontsize="medium")
  save_figure(figure, path, dpi=120)
  return True


def put_between(page: pathlib.Path, marks: tuple[str, str], text: str) -> None:
  """Puts `text` in place of what stands between two marks of a Markdown file.

  Raises:
    Refusal: the file lacks the marks.
  """
  before, begin, rest = page.read_text().partition(marks[0])
  _, end, after = rest.partition(marks[1])
  if not (begin and end):
    raise Refusal(f"{page} lacks the marks {' and '.join(marks)}; put them where the table is to stand.")
  write_whole(page, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, runs what is missing, writes the table; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.table", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument("plan", type=pathlib.Path, help="a Python file with PAIR and ROWS")
  parser.add_argument("--only", action="append", metavar="ROW", help="a row to run; several times for several")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/table"), help="(default: %(default)s)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
  parser.add_argument("--budget", help="time after which nothing is begun, such as 2h (default: any)")
  parser.add_argument("--into", type=pathlib.Path, help="a Markdown file with the plan's two marks")
  options, flags = parser.parse_known_args(argv)
  try:
    flags = flags_of_runs(flags)
    if options.jobs < 1:
      raise Refusal(f"--jobs is {options.jobs}; it must be at least 1.")
    until = time.monotonic() + (plans.seconds_of(options.budget) if options.budget else 10**9)
    plan = plans.read(options.plan)
    names = options.only or [row.name for row in plan.rows]
    if unknown := [name for name in names if name not in {row.name for row in plan.rows}]:
      raise Refusal(f"no row '{unknown[0]}'; there are {', '.join(row.name for row in plan.rows)}.")
    print(table(plan, work(options, plan, [row for row in plan.rows if row.name in names], flags, until)))
    return 0
  except Refusal as refusal:
    print(f"benchmarks.table: {refusal}", file=sys.stderr)
    return 2


def work(
  options: argparse.Namespace, plan: Plan, rows: Sequence[Row], flags: Sequence[str], until: float
) -> dict[str, list[dict]]:
  """Carries out what is not finished of `rows`, those that train teachers before those that are given them.

  Returns what is finished of the whole plan, as `finished` does.
  """
  found = write(options.out, plan, options.into)
  cores = queue.Queue()
  for share in plans.shares(options.jobs):
    cores.put(share)

  def one(row: Row, seed: int) -> None:
    share = cores.get()
    try:
      plans.carry_out(plan, row, seed, options.out, flags, share, until)
    finally:
      cores.put(share)

  failures = []
  for taught in (False, True):
    tasks = [(row, seed) for row in rows for seed in row.seeds if bool(row.teacher) == taught]
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
      for future in concurrent.futures.as_completed([pool.submit(one, *task) for task in tasks]):
        if (failure := future.exception()) is None:
          found = write(options.out, plan, options.into)
        elif isinstance(failure, Refusal):
          failures.append(failure)
          print(f"benchmarks.table: {failure}", file=sys.stderr, flush=True)
        else:
          raise failure
  if failures:
    more = f" {len(failures) - 1} more failed." if len(failures) > 1 else ""
    raise Refusal(f"{failures[0]}{more}")
  return found


if __name__ == "__main__":
  sys.exit(main())
