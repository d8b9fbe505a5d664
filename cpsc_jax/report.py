"""Pictures, a table and a page of a finished run, or a page of several, made from the files in working directories.

cpsc-jax report WORKDIR draws curves.png, samples.png and report.html again and prints the table;
cpsc-jax report WORKDIR WORKDIR ... --out FILE.html compares runs on one page.
"""

import dataclasses
import io
import itertools
import json
import os
import pathlib
import sys
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib.axes
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cpsc_jax import checksums, files, page
from cpsc_jax.command import Flags, run_command
from cpsc_jax.errors import Refusal, first_line

PAGE = "report.html"
DIAGNOSTICS = "diagnostics"  # the folder of what diagnoses found, an .npz file for each epoch
COMPARISON = "comparison.html"
MOST_NEIGHBOURS = 200  # folders beside a run in which its control arms are looked for
COLUMNS = 12  # samples in a row of samples.png
FIDELITIES = ("label_fidelity", "pool_fidelity")  # of fresh samples, of an image pool; a run has one of them
SCORES = ("accuracy", "agreement", *FIDELITIES)
WITHOUT = "delete that file, and the page will do without it"
AGAIN = "delete results.json and repeat the command of the run, which makes these files again without training"

# What is read of results.json, {path: type}; GENERATOR only where there is one.
NUMBER = (int, float)
RESULTS = {
  "name": str,
  "arm": str,
  "seed": NUMBER,
  "headline": str,
  "seconds": NUMBER,
  "evaluation.split": str,
  "evaluation.images": NUMBER,
  "seconds_by_part.teacher": NUMBER,
  "seconds_by_part.student": NUMBER,
  "config.schedule.epochs": NUMBER,
  "config.loss": dict,
  "hardware.device": str,
  "hardware.devices": NUMBER,
  "teacher.net": str,
  "teacher.parameters": NUMBER,
  "teacher.accuracy": NUMBER,
  "generator": (dict, type(None)),
  "student.net": str,
  "student.parameters": NUMBER,
  **{f"student.{which}.{key}": NUMBER for which in ("last", "best") for key in ("epoch", "accuracy", "agreement")},
}
GENERATOR = {
  "generator.net": str,
  "generator.parameters": NUMBER,
}
FIDELITY = {"": (*NUMBER, type(None)), "_per_class": (list, type(None))}


def report(workdir: str | pathlib.Path) -> list[pathlib.Path]:
  """Draws the pictures of a finished run and writes its page again, prints its table, and returns the files' paths.

  Raises:
    Refusal: no run, an unfinished one, files that are damaged, or a folder that cannot be written to.
  """
  results = read_results(workdir)
  try:
    if "incremental" in results:
      pictures = write_phases(workdir, results)
      print_table(results)
      return pictures
    pictures = draw(workdir, results)
    pictures.append(write_page(workdir, results, _read_history(pathlib.Path(workdir) / "history.json")))
  except OSError as error:
    raise Refusal(f"cannot write to {workdir} ({error.strerror or error}); make it writable.") from error
  print_table(results)
  return pictures


def write_phases(workdir: str | pathlib.Path, results: dict[str, Any]) -> list[pathlib.Path]:
  """Draws the accuracies of a run of several phases as WORKDIR/phases.png and returns the files' paths."""
  path = pathlib.Path(workdir) / "phases.png"
  found, arm = results["incremental"], results["arm"]
  phases, seen = range(1, len(found["sizes"]) + 1), np.cumsum(found["sizes"])
  figure = Figure(figsize=(10.0, 3.8), layout="constrained")
  figure.suptitle(_run_name(results) if arm == "distill" else f"{_run_name(results)}, {arm}", parse_math=False)
  curve, table = figure.subplots(1, 2)
  curve.plot(seen, found["accuracy"], marker="o")
  curve.set_xlabel("classes seen")
  curve.set_title(f"accuracy over them; average {found['average']:.4f}", fontsize=10)
  curve.set_xticks(seen)
  curve.set_ylim(0, 1)
  curve.grid(alpha=0.3)
  matrix = np.full((len(phases), len(phases)), np.nan)
  for row, accuracies in enumerate(found["matrix"]):
    matrix[row, : len(accuracies)] = accuracies
  table.imshow(matrix, cmap="Blues", vmin=0, vmax=1.2)
  if len(phases) <= 12:
    for row, column in zip(*np.nonzero(~np.isnan(matrix)), strict=True):
      colour = "white" if matrix[row, column] > 0.6 else "black"
      table.text(column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", fontsize=8, color=colour)
  table.set_xlabel("classes of phase")
  table.set_ylabel("after phase")
  for axis in (table.set_xticks, table.set_yticks):
    axis(range(len(phases)), phases)
  table.set_title(f"accuracy by phase; forgetting {found['forgetting']:.4f}", fontsize=10)
  save_figure(figure, path, dpi=100)
  return [path, write_page(workdir, results, {"student": []})]


def write_page(workdir: str | pathlib.Path, results: dict[str, Any], history: dict[str, list[dict]]) -> pathlib.Path:
  """Writes report.html into `workdir` and returns its path.

  Reads samples.npz and the folder diagnostics/ there, where they are; for a finished run also the control arms in the
  folders beside it. `results` and `history` are what results.json and history.json hold or, of a run that goes on, will
  hold as far as it is known.

  Raises:
    Refusal: one of these files is damaged.
  """
  workdir = pathlib.Path(workdir)
  run = _run(workdir, results, history)
  of = page.phases_page if "incremental" in results else page.run_page
  text = of(run, _control_arms(workdir, results) if run.finished else ())
  return _write_text(workdir / PAGE, text)


def compare(workdirs: Sequence[str | pathlib.Path], out: str | pathlib.Path) -> pathlib.Path:
  """Writes one page of several finished runs to `out` and returns its path.

  Raises:
    Refusal: as `report`, a folder that is named twice, or runs of several phases beside others.
  """
  runs = []
  for workdir in map(pathlib.Path, workdirs):
    results = read_results(workdir)
    history = {"student": []} if "incremental" in results else _read_history(workdir / "history.json")
    runs.append(_run(workdir, results, history))
  if len({"incremental" in run.results for run in runs}) > 1:
    of_phases = next(run.name for run in runs if "incremental" in run.results)
    raise Refusal(f"{of_phases} is a run of several phases, and others are not; compare the two kinds apart.")
  names = [run.name for run in runs]
  if len(set(names)) < len(names):
    runs = [dataclasses.replace(run, name=str(workdir)) for run, workdir in zip(runs, workdirs, strict=True)]
  if len({run.name for run in runs}) < len(runs):
    raise Refusal("a folder is named twice; name every run once.")
  try:
    return _write_text(pathlib.Path(out), page.comparison_page(runs))
  except OSError as error:
    raise Refusal(f"cannot write {out} ({error.strerror or error}); choose another --out.") from error


def _run(workdir: pathlib.Path, results: dict[str, Any], history: dict[str, list[dict]]) -> page.Run:
  finished, samples = "seconds" in results, workdir / "samples.npz"
  diagnoses = {
    int(path.stem): read_diagnosis(path)
    for path in sorted((workdir / DIAGNOSTICS).glob("*.npz"))
    if path.stem.isdecimal()
  }
  done = history["student"][-1]["epoch"] if history["student"] else 0
  return page.Run(
    name=workdir.resolve().name,
    results=results,
    history=history["student"],
    diagnoses={epoch: arrays for epoch, arrays in diagnoses.items() if epoch <= done},
    samples=_read_samples(samples) if finished and results.get("generator") and samples.exists() else None,
  )


def read_diagnosis(path: pathlib.Path) -> dict[str, np.ndarray]:
  """All arrays of a diagnosis. Raises a Refusal that says what to do if the file is damaged."""
  return _read_arrays(path, mend=WITHOUT)


def _control_arms(workdir: pathlib.Path, results: dict[str, Any]) -> list[page.Run]:
  """Finished runs in the folders beside `workdir` that have its config but for the arm, and its teacher."""

  def settings(results: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in results["config"].items() if key not in ("name", "arm")}
    places = {"dataset": "data_dir", "teacher": "checkpoint"}
    return {
      **config,
      **{section: {k: v for k, v in config[section].items() if k != key} for section, key in places.items()},
    }

  found = []
  for path in sorted(workdir.resolve().parent.glob("*/results.json"))[:MOST_NEIGHBOURS]:
    if path.parent == workdir.resolve():
      continue
    try:
      other = files.read_json(path)
      same = settings(other) == settings(results) and other["teacher"]["digest"] == results["teacher"]["digest"]
      if same and other["arm"] != results["arm"] and other["arm"] != "distill":
        found.append(page.Run(path.parent.name, read_results(path.parent), [], {}))
    except (Refusal, OSError, ValueError, LookupError, TypeError, AttributeError):  # damaged, or another program's
      continue
  return found


def _write_text(path: pathlib.Path, text: str) -> pathlib.Path:
  """Writes a file, whole or not at all."""
  scratch = path.with_name(f"{path.name}.partial")
  scratch.write_bytes(text.encode(errors="replace"))
  os.replace(scratch, path)
  return path


def read_results(workdir: str | pathlib.Path) -> dict[str, Any]:
  """results.json of a finished run, with everything that this module needs of it.

  Raises:
    Refusal: no run, an unfinished one, or a file that is damaged.
  """
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").exists():
    raise Refusal(f"no run in {workdir}; give the --workdir of a finished run.")
  path = workdir / "results.json"
  if not path.exists():
    raise Refusal(
      f"the run in {workdir} is not finished; repeat its command with --workdir {workdir}, which resumes it."
    )
  checksums.check_finished(workdir)
  results = _read_json(path)
  _check(path, results, RESULTS)
  if results["generator"]:
    _check(path, results, GENERATOR)
    name = fidelity_name(results["generator"])
    _check(path, results, {f"generator.{name}{suffix}": kind for suffix, kind in FIDELITY.items()})
  return results


def draw(workdir: str | pathlib.Path, results: dict[str, Any]) -> list[pathlib.Path]:
  """Writes curves.png and, where there is a generator, samples.png into `workdir`; returns their paths.

  Reads history.json and samples.npz (images (C, n, H, W, K) in [0, 1]) there.

  Raises:
    Refusal: one of these is missing or damaged.
  """
  workdir = pathlib.Path(workdir)
  history, generator = _read_history(workdir / "history.json"), results["generator"]
  if generator:
    images, fidelity = _read_samples(workdir / "samples.npz"), generator[f"{fidelity_name(generator)}_per_class"]
    if fidelity and len(fidelity) != len(images):
      raise Refusal(f"{workdir / 'samples.npz'} has {len(images)} classes, results.json {len(fidelity)}; {AGAIN}.")
  pictures = [workdir / "curves.png"]
  draw_curves(pictures[0], history, results)
  if generator:
    rows = [f"{label}   {share:.2f}" for label, share in enumerate(fidelity)] if fidelity else [""] * len(images)
    kind = "samples from the pool" if "pool" in generator else "fresh samples"
    meaning = "rows: class and label fidelity" if fidelity else "a generator without classes"
    pictures.append(workdir / "samples.png")
    draw_samples(pictures[1], images, rows, f"{_run_name(results)}: {kind}\n{meaning}")
  return pictures


def draw_samples(path: str | pathlib.Path, images: np.ndarray, rows: list[str], title: str) -> None:
  """Writes a grid of images (C, n, H, W, K) in [0, 1] as a PNG, one row per class, labelled as in `rows`."""
  grid, cell = mosaic(images)
  classes, columns = images.shape[:2]
  figure = Figure(figsize=(max(columns * 0.6 + 1.6, 4.4), classes * 0.6 + 0.8), layout="constrained")
  axis = figure.subplots()
  axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
  # Names may contain "$", which would start a formula.
  axis.set_yticks([cell * (label + 0.5) - 0.5 for label in range(classes)], rows, fontsize=12, parse_math=False)
  axis.tick_params(length=0)
  axis.set_xticks([])
  axis.spines[:].set_visible(False)
  figure.suptitle(title, fontsize=11, parse_math=False)
  save_figure(figure, path, dpi=80)


def mosaic(images: np.ndarray) -> tuple[np.ndarray, int]:
  """One picture of images (C, n, H, W, K) in [0, 1], with white lines between them, and the height of a row in pixels.

  The picture is (rows, columns) for one channel, (rows, columns, K) otherwise.
  """
  classes, columns, height, width, channels = images.shape
  line = max(1, height // 16)
  padding = ((0, 0), (0, 0), (0, line), (0, line), (0, 0))
  cells = np.pad(images, padding, constant_values=1.0)
  grid = cells.swapaxes(1, 2).reshape(classes * (height + line), columns * (width + line), channels)
  return (grid[..., 0] if channels == 1 else grid), height + line


def draw_curves(path: str | pathlib.Path, history: dict[str, list[dict]], results: dict[str, Any]) -> None:
  """Writes the curves of a run over its epochs as a PNG.

  From top to bottom: accuracy, agreement and label fidelity; for each player its unweighted terms and, in a smaller
  panel, the weighted total that it minimises.
  """
  figure = curves(history["student"], results)
  save_figure(figure, path, dpi=100)


def curves(entries: list[dict], results: dict[str, Any]) -> Figure:
  """The figure that `draw_curves` writes, of history entries as in cpsc_jax.loop.Outcome."""
  players = sorted({player for entry in entries for player in entry["totals"]})
  heights = [2.8] + [2.8, 1.2] * len(players)
  figure = Figure(figsize=(9.0, sum(heights) + 0.35 * len(heights) + 0.4), layout="constrained")
  figure.suptitle(_run_name(results), fontsize=12, parse_math=False)
  axes = list(figure.add_gridspec(len(heights), 1, height_ratios=heights).subplots(sharex=True, squeeze=False).flat)

  accuracy = axes.pop(0)
  for name in SCORES:
    rows = [(entry["epoch"], entry[name]) for entry in entries if name in entry]
    _plot(accuracy, name.replace("_", " "), rows, linewidth=2.2 if name == "accuracy" else 1.0)
  accuracy.axhline(results["teacher"]["accuracy"], color="black", linestyle="--", linewidth=1, label="teacher")
  last, best, measured = results["student"]["last"], results["student"]["best"], results["evaluation"]
  accuracy.set_title(
    f"on the {measured['images']} {measured['split']} images: teacher {results['teacher']['accuracy']:.4f},"
    f" student {last['accuracy']:.4f}, best {best['accuracy']:.4f} (epoch {best['epoch']})"
  )
  _legend(accuracy)
  for player in players:
    terms, total = axes.pop(0), axes.pop(0)
    for name in sorted({name for entry in entries for name in entry["terms"] if name.startswith(f"{player}/")}):
      rows = [(entry["epoch"], entry["terms"][name]) for entry in entries if name in entry["terms"]]
      _plot(terms, name.removeprefix(f"{player}/"), rows)
    terms.set_title(f"{player}: terms, unweighted")
    rows = [(entry["epoch"], entry["totals"][player]) for entry in entries if player in entry["totals"]]
    _plot(total, "total", rows, color="black")
    total.set_title(f"{player}: total, weighted")
    _scale(terms)
    _scale(total)
    _legend(terms)

  epochs = entries[-1]["epoch"]
  for axis in figure.axes:
    axis.set_xticks(epoch_ticks(epochs))
    axis.set_xlim(*((1, epochs) if epochs > 1 else (0.5, 1.5)))
    axis.title.set(fontsize=11)
    axis.grid(alpha=0.3)
  figure.axes[-1].set_xlabel("epoch")
  return figure


def epoch_ticks(last: int) -> list[int]:
  """Round epochs from 1 to `last`, both included, at most about ten."""
  step = next(
    scale * unit for scale in (10**n for n in itertools.count()) for unit in (1, 2, 5) if last <= 8 * scale * unit
  )
  between = [epoch for epoch in range(step, last, step) if min(epoch - 1, last - epoch) >= step / 2]
  return sorted({1, *between, last})


def print_table(results: dict[str, Any]) -> None:
  """Prints the short table that ends a run."""
  teacher, student, generator = results["teacher"], results["student"], results["generator"]
  split, images = results["evaluation"]["split"], results["evaluation"]["images"]
  title = _run_name(results) + (f", on the {split} split" if split != "test" else "")
  table = Table(title=title, title_justify="left")
  for column in ("", "net"):
    table.add_column(column)
  for column in ("parameters", "accuracy", "agreement"):
    table.add_column(column, justify="right")
  whole = results.get("incremental")
  first = "network of the first classes" if whole else "teacher"
  table.add_row(first, teacher["net"], f"{teacher['parameters']:,}", f"{teacher['accuracy']:.4f}", "")
  if quantised := results.get("quantised"):
    bits = f"W{quantised['weights']}A{quantised['activations']}"  # the student's rows are of the fine-tuned
    for stage in ("without_data", "calibrated"):
      table.add_row(f"{bits}, {stage.replace('_', ' ')}", student["net"], "", f"{quantised[stage]:.4f}", "")
  for which in () if whole else ("last", "best"):
    row = student[which]
    label = f"student, {which} epoch ({row['epoch']})" + ("  <- headline" if which == results["headline"] else "")
    figures = (f"{row['accuracy']:.4f}", f"{row['agreement']:.4f}")
    table.add_row(label, student["net"], f"{student['parameters']:,}", *figures)
  if whole:
    for number, (size, seen) in enumerate(zip(np.cumsum(whole["sizes"]), whole["accuracy"], strict=True), 1):
      table.add_row(f"after phase {number}, {size} classes", student["net"], "", f"{seen:.4f}", "")
    table.add_row("average incremental accuracy", "", "", f"{whole['average']:.4f}", "")
    table.add_row("forgetting", "", "", f"{whole['forgetting']:.4f}", "")
  elif generator:
    name = fidelity_name(generator)
    fidelity = generator[name]
    shown = "no classes" if fidelity is None else f"{name.replace('_', ' ')} {fidelity:.3f}"
    table.add_row("generator", generator["net"], f"{generator['parameters']:,}", shown, "")
  console = Console(width=None if Console().is_terminal else 110, markup=False, emoji=False)
  console.print(table)
  for warning in results.get("warnings", ()):
    console.print(f"warning: {warning}")
  devices = f"{results['hardware']['devices']} x {results['hardware']['device']}"
  console.print(f"{seconds_in_words(results)}, on {devices}; {images} {split} images")


def fidelity_name(generator: dict[str, Any]) -> str:
  """Which of FIDELITIES results.json has of a generator."""
  return next((name for name in FIDELITIES if name in generator), FIDELITIES[0])


def seconds_in_words(results: dict[str, Any]) -> str:
  """Such as "122 s in all: teacher 18 s, student 93 s, everything else 11 s"; whole seconds that add up."""
  parts = {name: round(seconds) for name, seconds in results["seconds_by_part"].items() if seconds}
  whole = max(round(results["seconds"]), sum(parts.values()))
  parts["everything else"] = whole - sum(parts.values())
  return f"{whole} s in all: {', '.join(f'{name} {seconds} s' for name, seconds in parts.items())}"


def _run_name(results: dict[str, Any]) -> str:
  return f"{results['name']}: {results['arm']}, seed {results['seed']}"


def _plot(axis: matplotlib.axes.Axes, label: str, rows: list[tuple[int, float]], **style: Any) -> None:
  """A curve through (epoch, value) rows; where they are few, each is marked, also on the edge of the panel."""
  if rows:
    marked = {"marker": "o", "markersize": 4, "clip_on": False} if len(rows) <= 20 else {}
    axis.plot(*zip(*rows, strict=True), label=label, **marked, **style)


def _scale(axis: matplotlib.axes.Axes) -> None:
  """Makes the y axis symmetric-logarithmic if a linear one would squeeze most values together."""
  sizes = np.abs(np.concatenate([line.get_ydata() for line in axis.lines] or [[]]))
  sizes = sizes[sizes > 0]
  if sizes.size and sizes.max() > 8 * np.median(sizes):
    small = max(np.quantile(sizes, 0.1), 1e-4 * sizes.max())
    axis.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(small)))


def _legend(axis: matplotlib.axes.Axes) -> None:
  """A legend beside the panel, in the order in which the curves end."""
  lines, labels = axis.get_legend_handles_labels()
  order = sorted(range(len(lines)), key=lambda i: -lines[i].get_ydata()[-1])
  axis.legend(
    [lines[i] for i in order], [labels[i] for i in order], loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9
  )


def save_figure(figure: Figure, path: str | pathlib.Path, **options: Any) -> None:
  """Writes a PNG, whole or not at all."""
  png = io.BytesIO()
  figure.savefig(png, format="png", **options)
  path = pathlib.Path(path)
  scratch = path.with_name(f"{path.name}.partial")
  scratch.write_bytes(png.getvalue())
  os.replace(scratch, path)


def _read_json(path: pathlib.Path) -> Any:
  try:
    return json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise Refusal(f"cannot read {path} ({first_line(error)}); {AGAIN}.") from error


def _check(path: pathlib.Path, tree: Any, wanted: dict[str, Any]) -> None:
  """Raises a Refusal unless `tree` has all the wanted paths, of the wanted types."""
  for place, kind in wanted.items():
    value = tree
    for key in place.split("."):
      value = value.get(key, ...) if isinstance(value, dict) else ...
    if not isinstance(value, kind):
      raise Refusal(
        f"{path} lacks '{place}' or has something else there: it is damaged, or of another version; {AGAIN}."
      )


def _read_history(path: pathlib.Path) -> dict[str, list[dict]]:
  history = _read_json(path)
  _check(path, history, {"student": list})
  for entry in history["student"]:
    _check(path, entry, {"epoch": int, "terms": dict, "totals": dict})
    scores = [entry[name] for name in SCORES if name in entry]
    if not all(isinstance(value, NUMBER) for value in (*scores, *entry["terms"].values(), *entry["totals"].values())):
      raise Refusal(f"{path} has something else than numbers in epoch {entry['epoch']}; {AGAIN}.")
  if not history["student"]:
    raise Refusal(f"{path} has no epoch; {AGAIN}.")
  return history


def _read_samples(path: pathlib.Path) -> np.ndarray:
  images = _read_arrays(path, "images")["images"]
  if images.ndim != 5 or images.dtype.kind != "f" or 0 in images.shape or images.shape[-1] not in (1, 3):
    raise Refusal(f"{path} has images {images.shape} {images.dtype}, not (C, n, H, W, 1 or 3) of floats; {AGAIN}.")
  return images


def _read_arrays(path: pathlib.Path, *names: str, mend: str = AGAIN) -> dict[str, np.ndarray]:
  """The named arrays of an .npz file, by default all of them; `mend` says what to do if it is damaged."""
  try:
    with np.load(path) as arrays:
      return {name: arrays[name] for name in names or arrays.files}
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise Refusal(f"cannot read {path} ({first_line(error)}); {mend}.") from error


def main(argv: list[str] | None = None) -> int:
  """Parses flags, draws and prints; returns the exit code."""
  flags = Flags(prog="cpsc-jax report", description=__doc__.split("\n")[0])
  flags.add_argument("workdir", nargs="+", help="of a finished run; several are compared on one page")
  flags.add_argument("--out", help=f"where the page of several runs goes (default: {COMPARISON})")

  def work(args):
    if len(args.workdir) > 1:
      print(f"written: {compare(args.workdir, args.out or COMPARISON)}")
      return
    if args.out:
      raise Refusal(f"--out is for several runs; the page of one is in its own folder, as {PAGE}.")
    for path in report(*args.workdir):
      print(f"drawn: {path}")

  return run_command(work, flags, argv)


if __name__ == "__main__":
  sys.exit(main())
