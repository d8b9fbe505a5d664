"""HTML pages of finished and of going runs, each one file that needs no network and no script.

Every number stands in a <data value="..." data-from="RUN FILE PATH"> element that says where it is from; tests follow
it there.
"""

import base64
import dataclasses
import io
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from cpsc_jax import paired
from cpsc_jax.page import svg
from cpsc_jax.page.words import SAMPLES, STUDENT

GRIDS = 6  # epochs whose samples are side by side
MOST_CLASSES = 20  # rows of a picture of samples
MOST_ROWS = 100  # of the table of classes
MOST_CONFUSED = 12
MOST_EPOCHS = 30  # rows of the table of curves
LARGEST_MATRIX = 60  # classes in the picture of a confusion matrix
NO_SETTINGS = (  # keys that change nothing of what a run finds, but for the seed
  "name",
  "seed",
  "dataset.data_dir",
  "evaluate.batch_size",
  "evaluate.diagnostics_every",
  "evaluate.gradients",
  "checkpoint.every",
  "checkpoint.minutes",
)
SCORES = ("accuracy", "agreement", "label_fidelity", "pool_fidelity")

Table = dict[str, list]


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a run say.

  Attributes:
    name: by which a comparison calls it, such as its folder.
    results: results.json; of a run that goes on, without what is not known yet.
    history: the student's entries in history.json.
    diagnoses: {epoch: arrays} of diagnostics/.
    samples: images (C, n, H, W, K) in [0, 1] of samples.npz, or None.
  """

  name: str
  results: dict[str, Any]
  history: list[dict]
  diagnoses: dict[int, dict[str, np.ndarray]]
  samples: np.ndarray | None = None

  @property
  def finished(self) -> bool:
    return "seconds" in self.results

  @property
  def last_diagnosis(self) -> int | None:
    return max(self.diagnoses, default=None)

  def of_results(self, path: str, form: str = ".4f", scale: float = 1) -> Markup:
    """The number at a dotted path of results.json."""
    value = self.results
    for key in path.split("."):
      value = value[key]
    return number(value, f"{self.name} results {path}", form, scale)

  def of_history(self, index: int, path: str, form: str = ".4f") -> Markup:
    """The number at a path of an entry of the history, steps of which are joined by "|"."""
    value = self.history[index]
    for key in path.split("|"):
      if key not in value:
        return Markup("")
      value = value[key]
    return number(value, f"{self.name} history {self.history[index]['epoch']} {path}", form)

  def of_diagnosis(self, name: str, *index: int, form: str = ".4f") -> Markup:
    """The number in an array of the last diagnosis."""
    array = self.diagnoses[self.last_diagnosis][name]
    place = ",".join(map(str, index))
    return number(array[index], f"{self.name} diagnosis {self.last_diagnosis} {name} {place}".strip(), form)


def number(value: float, source: str, form: str, scale: float = 1) -> Markup:
  """A number as it is shown, with its source; a dash for one that is not finite."""
  value = float(value)
  if not math.isfinite(value):
    return Markup("–")
  shown = _significant(scale * value) if form == "g" else format(scale * value, form)
  return Markup('<data value="{}" data-from="{}">{}</data>').format(repr(value), source, shown)


def run_page(run: Run, control_arms: Sequence["Run"] = ()) -> str:
  """The page of one run.

  Args:
    control_arms: other runs of the same config but for the arm.
  """
  results = run.results
  there = run.diagnoses.get(run.last_diagnosis, {})
  return _render(
    "run.html",
    title=f"{results['name']}: {results['arm']}, seed {results['seed']}",
    verdict=_verdict(run),
    arms=[_arm(run, arm) for arm in control_arms],
    status=_status(run),
    tiles=_tiles(run),
    warnings=[str(warning) for warning in there.get("warnings", ())],
    diagnosed=run.last_diagnosis,
    has_samples="class_balance" in there,
    charts=_charts(run),
    numbers=_numbers(run),
    terms=_terms(run),
    grids=_grids(run),
    grids_caption=_grids_caption(run),
    sheet=_sheet(run, 12),
    confusion=_confusion(run, there),
    confused=_confused(run, there),
    classes=_classes(run, there),
    facts=_facts(run),
    calibration=_calibration(there),
    pulls=_pulls(run, there),
    layers=_layers(run, there),
    command=results.get("command"),
    changed=[(key, _plain(was), _plain(now)) for key, (was, now) in results.get("changed", {}).items()],
    environment=_environment(run),
  )


def comparison_page(runs: Sequence[Run]) -> str:
  """One page of several finished runs."""
  groups = _grouped(runs)
  colours = {run.name: colour for colour, group in enumerate(groups) for run in group}
  dashed = {run.name: i > 0 for group in groups for i, run in enumerate(group)}
  best = max(runs, key=lambda run: run.results["student"]["last"]["accuracy"])
  entries = [{"name": run.name, "colour": colours[run.name] % svg.COLOURS, "dashed": dashed[run.name]} for run in runs]
  return _render(
    "comparison.html",
    title=f"{len(runs)} runs compared",
    verdict=Markup("The highest accuracy at the last epoch is {}, of {}.").format(
      best.of_results("student.last.accuracy"), best.name
    ),
    groups=_group_table(groups),
    charts=[_compared(runs, score, colours, dashed) for score in SCORES if _has(runs, score)],
    legend=entries,
    grids=[{**sheet, "name": run.name} for run in runs if (sheet := _sheet(run, 6))],
    runs=_run_table(runs),
    differences=_config_table(runs),
  )


def _render(template: str, **values: Any) -> str:
  folder = pathlib.Path(__file__).parent / "templates"
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template(template).render(version=_version(), **values)


def _version() -> str:
  try:
    return metadata.version("cpsc_jax")
  except metadata.PackageNotFoundError:
    return ""


# One run.


def _verdict(run: Run) -> Markup:
  results = run.results
  teacher, student, split = results["teacher"], results["student"], results["evaluation"]
  if "last" not in student:
    return Markup("Not measured yet.")
  which = results["headline"] if run.finished else "last"
  when = {"last": "at the last epoch", "best": "at its best epoch"}[which] if run.finished else "so far"
  return Markup("{} has {} {} on {} {} images; its teacher {} has {}: {}.").format(
    f"The student {student['net']}",
    run.of_results(f"student.{which}.accuracy"),
    when,
    run.of_results("evaluation.images", ",.0f"),
    split["split"],
    teacher["net"],
    run.of_results("teacher.accuracy"),
    _gap(run, which),
  )


def _gap(run: Run, which: str) -> Markup:
  points = 100 * (run.results["teacher"]["accuracy"] - run.results["student"][which]["accuracy"])
  if abs(points) < 0.005:
    return Markup("no gap")
  shown = Markup('<data value="{}" data-from="{}">{}</data>').format(
    repr(points), f"{run.name} gap {which}", f"{abs(points):.2f}"
  )
  return Markup("a gap of {} points").format(shown) if points > 0 else Markup("{} points more").format(shown)


def _arm(run: Run, arm: Run) -> Markup:
  return Markup("Control, {}: {} at the last epoch ({}).").format(
    arm.results["arm"].replace("_", " "), arm.of_results("student.last.accuracy"), arm.name
  )


def _status(run: Run) -> Markup:
  epochs, done = run.results["config"]["schedule"]["epochs"], run.history[-1]["epoch"] if run.history else 0
  if not run.finished:
    return Markup("The run goes on: epoch {} of {} is done, and this page is written again now and then.").format(
      done, epochs
    )
  return Markup("Finished: {} epochs in {} s, of which the student's training took {} s.").format(
    epochs, run.of_results("seconds", ",.0f"), run.of_results("seconds_by_part.student", ",.0f")
  )


def _tiles(run: Run) -> list[dict]:
  results = run.results
  tiles = [("teacher.accuracy", f"teacher, {results['teacher']['net']}", ".4f")]
  if "last" in results["student"]:
    for which in ("last", "best"):
      epoch = results["student"][which]["epoch"]
      tiles.append((f"student.{which}.accuracy", f"student, {which} epoch ({epoch})", ".4f"))
    tiles.append(("student.last.agreement", "agreement with the teacher", ".4f"))
  generator = results.get("generator") or {}
  fidelity = next((name for name in SCORES[2:] if isinstance(generator.get(name), int | float)), None)
  if fidelity:
    tiles.append((f"generator.{fidelity}", fidelity.replace("_", " "), ".3f"))
  tiles += [
    ("teacher.parameters", "parameters of the teacher", ",.0f"),
    ("student.parameters", "parameters of the student", ",.0f"),
  ]
  return [{"value": run.of_results(path, form), "name": name} for path, name, form in tiles]


def _points(run: Run, path: str) -> list[tuple[float, float]]:
  points = []
  for entry in run.history:
    value = entry
    for key in path.split("|"):
      value = value.get(key, {}) if isinstance(value, Mapping) else {}
    if isinstance(value, int | float) and math.isfinite(value):
      points.append((entry["epoch"], value))
  return points


def _charts(run: Run) -> list[dict]:
  """Accuracy and agreement in one picture; fidelity, the players' weighted totals and the time in one each."""
  charts = []
  teacher = run.results["teacher"]["accuracy"], "teacher's accuracy"
  of_student = "On the evaluation's images, by epoch; the dashed line is the teacher's accuracy."
  of_samples = "The share of samples to which the teacher gives the class that was asked for, by epoch."
  for scores, level, caption in ((SCORES[:2], teacher, of_student), (SCORES[2:], None, of_samples)):
    curves, legend = [], []
    for score in scores:
      points, colour = _points(run, score), SCORES.index(score)
      if points:
        curves.append(svg.Curve(score.replace("_", " "), points, colour))
        last = next(i for i in reversed(range(len(run.history))) if score in run.history[i])
        value = run.of_history(last, score)
        legend.append({"name": curves[-1].name, "colour": colour, "dashed": False, "value": value})
    if curves:
      charts.append({"svg": svg.chart(curves, _told(curves), level), "legend": legend, "caption": caption})
  for colour, player in ((1, "generator"), (0, "student")):
    points = _points(run, f"totals|{player}")
    if points:
      curve = svg.Curve(f"{player}'s total", points, colour)
      last = next(i for i in reversed(range(len(run.history))) if player in run.history[i]["totals"])
      value = run.of_history(last, f"totals|{player}", "g")
      charts.append(
        {
          "svg": svg.chart([curve], _told([curve])),
          "legend": [{"name": curve.name, "colour": colour, "dashed": False, "value": value}],
          "caption": "The weighted sum of its terms, which it minimises: mean over each epoch.",
        }
      )
  times = [
    (epoch, float(arrays["epoch_seconds"]))
    for epoch, arrays in sorted(run.diagnoses.items())
    if "epoch_seconds" in arrays
  ]
  if times:
    curve = svg.Curve("seconds", times, 7)
    value = run.of_diagnosis("epoch_seconds", form=".2f")
    charts.append(
      {
        "svg": svg.chart([curve], _told([curve]), span=(0, max(y for _, y in times) * 1.1 or 1)),
        "legend": [{"name": "seconds", "colour": 7, "dashed": False, "value": value}],
        "caption": "Wall clock of the diagnosed epochs; the first after a start has the compilation in it.",
      }
    )
  return charts


def _told(curves: Sequence[svg.Curve]) -> str:
  """What curves show, in a sentence."""
  told = []
  for curve in curves:
    (x1, y1), (x2, y2) = curve.points[0], curve.points[-1]
    told.append(f"{curve.name} goes from {_significant(y1)} at epoch {x1:g} to {_significant(y2)} at epoch {x2:g}")
  return "; ".join(told)


def _numbers(run: Run) -> Table:
  """At most MOST_EPOCHS of the measured epochs."""
  rows = [i for i, entry in enumerate(run.history) if "accuracy" in entry]
  rows = [rows[i] for i in sorted({round(i) for i in np.linspace(0, len(rows) - 1, MOST_EPOCHS)})] if rows else []
  names = [score for score in SCORES if any(score in run.history[i] for i in rows)]
  return {
    "heads": ["epoch", *(name.replace("_", " ") for name in names)],
    "rows": [[run.history[i]["epoch"], *(run.of_history(i, name) for name in names)] for i in rows],
  }


def _terms(run: Run) -> list[dict]:
  weights = run.results["config"]["loss"]
  found = []
  for name in sorted({name for entry in run.history for name in entry["terms"]}):
    player, _, term = name.partition("/")
    curve = svg.Curve(name, _points(run, f"terms|{name}"), 1 if player == "generator" else 0)
    if curve.points:
      last = next(i for i in reversed(range(len(run.history))) if name in run.history[i]["terms"])
      weighted = isinstance(weights.get(player, {}).get(term), int | float)
      found.append(
        {
          "name": name,
          "svg": svg.chart([curve], _told([curve]), height=130),
          "value": run.of_history(last, f"terms|{name}", "g"),
          "weight": run.of_results(f"config.loss.{player}.{term}", "g") if weighted else "",
        }
      )
  return found


def _chosen(epochs: Sequence[int]) -> list[int]:
  """At most GRIDS of the epochs, the first and the last among them."""
  epochs = sorted(epochs)
  places = {round(i) for i in np.linspace(0, len(epochs) - 1, min(GRIDS, len(epochs)))}
  return [epochs[i] for i in sorted(places)]


def _grids(run: Run) -> list[dict]:
  grids = []
  for epoch in _chosen([epoch for epoch, arrays in run.diagnoses.items() if "grid" in arrays]):
    images = run.diagnoses[epoch]["grid"]
    rows, per_class = min(len(images), MOST_CLASSES), images.shape[1]
    what = f"{per_class} samples in each of {rows} rows" + (", one class a row," if _labelled(run) else "")
    grids.append({"epoch": epoch, **_picture(images[:MOST_CLASSES] / 255, f"{what} after epoch {epoch}")})
  return grids


def _grids_caption(run: Run) -> str:
  rows = "Each row is a class, from the first at the top" if _labelled(run) else "The generator knows no classes"
  number = len(run.results.get("class_names", ()))
  more = f" (the first {MOST_CLASSES} of {number})" if _labelled(run) and number > MOST_CLASSES else ""
  return f"{rows}{more}. A generator draws the same latents in every picture; a pool is drawn from at random."


def _labelled(run: Run) -> bool:
  return any("fidelity_per_class" in arrays for arrays in run.diagnoses.values())


def _sheet(run: Run, columns: int) -> dict | None:
  if run.samples is None:
    return None
  images = run.samples[:MOST_CLASSES, :columns]
  names = _class_names(run)[: len(images)]
  what = f"{images.shape[1]} samples in each of {len(images)} rows"
  caption = f"Rows from the top: {', '.join(names)}." if len(names) == len(images) else what
  return {**_picture(images, f"{what}, {run.name}"), "caption": caption}


def _picture(images: np.ndarray, alt: str) -> dict[str, Any]:
  """Images (C, n, H, W, K) in [0, 1] as one PNG, with lines between them."""
  classes, columns, height, width, channels = images.shape
  line = max(1, height // 16)
  cells = np.pad(images, ((0, 0), (0, 0), (0, line), (0, line), (0, 0)), constant_values=1.0)
  grid = cells.swapaxes(1, 2).reshape(classes * (height + line), columns * (width + line), channels)
  pixels = np.round(255 * np.clip(grid, 0, 1)).astype(np.uint8)
  picture, png = Image.fromarray(pixels[..., 0] if channels == 1 else pixels), io.BytesIO()
  picture.save(png, "PNG", optimize=True)
  source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
  return {"src": source, "alt": alt, "width": grid.shape[1], "height": grid.shape[0]}


def _class_names(run: Run) -> list[str]:
  return [str(name) for name in run.results.get("class_names", ())]


def _confusion(run: Run, there: Mapping[str, np.ndarray]) -> Markup | None:
  matrix = there.get("confusion")
  if matrix is None or len(matrix) > LARGEST_MATRIX:
    return None
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  right = int(np.trace(matrix))
  label = f"confusion matrix of {len(matrix)} classes: {right} of {int(matrix.sum())} images are on the diagonal"
  return svg.heatmap(shares, _names(run, len(matrix)), label)


def _names(run: Run, number: int) -> list[str]:
  names = _class_names(run)
  return names if len(names) == number else [str(i) for i in range(number)]


def _confused(run: Run, there: Mapping[str, np.ndarray]) -> list[list]:
  if "confusion" not in there:
    return []
  wrong = there["confusion"] * (1 - np.eye(len(there["confusion"]), dtype=int))
  names = _names(run, len(wrong))
  places = [np.unravel_index(i, wrong.shape) for i in np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSED]]
  return [
    [names[row], names[column], run.of_diagnosis("confusion", int(row), int(column), form=".0f")]
    for row, column in places
    if wrong[row, column]
  ]


CLASS_COLUMNS = {
  "images_per_class": ("images", ".0f"),
  "teacher_accuracy_per_class": ("teacher", ".4f"),
  "accuracy_per_class": ("student", ".4f"),
  "agreement_per_class": ("agreement", ".4f"),
  "fidelity_per_class": ("fidelity", ".3f"),
  "confidence_per_class": ("confidence", ".3f"),
  "class_shares": ("share of samples", ".3f"),
  "vendi_score_per_class": ("Vendi score", ".2f"),
}


def _classes(run: Run, there: Mapping[str, np.ndarray]) -> dict | None:
  if "accuracy_per_class" not in there:
    return None
  accuracy = there["accuracy_per_class"]
  names = _names(run, len(accuracy))
  columns = [name for name in CLASS_COLUMNS if name in there]
  rows, note = list(range(len(accuracy))), ""
  if len(rows) > MOST_ROWS:
    rows, note = (
      [int(i) for i in np.argsort(accuracy, kind="stable")[:MOST_ROWS]],
      f"The {MOST_ROWS} worst of {len(rows)}.",
    )

  def cell(name: str, row: int) -> Markup | str:
    return run.of_diagnosis(name, row, form=CLASS_COLUMNS[name][1]) if row < len(there[name]) else ""

  return {
    "heads": ["class", *(CLASS_COLUMNS[name][0] for name in columns)],
    "rows": [[names[row], *(cell(name, row) for name in columns)] for row in rows],
    "note": note,
  }


def _facts(run: Run) -> list[dict]:
  index = next((i for i in reversed(range(len(run.history))) if "diagnostics" in run.history[i]), None)
  if index is None:
    return []
  parts = []
  for title, words in (("Generator", SAMPLES), ("Student", STUDENT)):
    facts = []
    for name, said in words.items():
      if name not in run.history[index]["diagnostics"]:
        continue
      points = _points(run, f"diagnostics|{name}")
      curve, level, other = svg.Curve(said.title, points, 1 if words is SAMPLES else 0), None, ""
      if said.beside and said.beside[0] in run.history[index]["diagnostics"]:
        key, whose = said.beside
        other = Markup("{}: {}").format(whose, run.of_history(index, f"diagnostics|{key}", said.form))
        level = run.history[index]["diagnostics"][key], whose
      facts.append(
        {
          "title": said.title,
          "value": run.of_history(index, f"diagnostics|{name}", said.form),
          "other": other,
          "svg": svg.chart([curve], _told([curve]), level, height=110) if len(points) > 1 and name != "samples" else "",
          "read": said.read,
          "mend": said.mend,
        }
      )
    if facts:
      parts.append({"title": title, "facts": facts})
  return parts


def _calibration(there: Mapping[str, np.ndarray]) -> Markup | None:
  if "reliability_count" not in there:
    return None
  counts, sure, right = (there[f"reliability_{name}"] for name in ("count", "confidence", "accuracy"))
  return svg.reliability(counts, sure, right, "accuracy of the student by its confidence on test images")


def _pulls(run: Run, there: Mapping[str, np.ndarray]) -> dict | None:
  if "terms" not in there:
    return None
  names = [str(name) for name in there["terms"]]
  columns = ("term_value", "term_weighted", "term_gradient", "term_weighted_gradient")
  rows = [[name, *(run.of_diagnosis(column, i, form="g") for column in columns)] for i, name in enumerate(names)]
  label = "cosines between the gradients of " + ", ".join(names)
  return {"rows": rows, "cosines": svg.heatmap(there["term_cosine"], names, label, signed=True)}


def _layers(run: Run, there: Mapping[str, np.ndarray]) -> dict | None:
  if "norm_distance" not in there:
    return None
  names, values = [str(name) for name in there["layers"]], there["norm_distance"]
  largest = int(values.argmax())
  label = f"distances of {len(names)} batch norms, the largest {_significant(values[largest])} in {names[largest]}"
  total = Markup('<data value="{}" data-from="{}">{}</data>').format(
    repr(float(values.sum())), f"{run.name} layers {run.last_diagnosis}", _significant(float(values.sum()))
  )
  return {"svg": svg.bars(values, names, label), "number": len(names), "total": total}


def _environment(run: Run) -> list[tuple[str, Any]]:
  results = run.results
  teacher, hardware = results["teacher"], results.get("hardware", {})
  rows = [("teacher", teacher.get("checkpoint")), ("teacher's digest", teacher.get("digest"))]
  if hardware:
    rows.append(
      ("devices", f"{hardware.get('devices')} x {hardware.get('device')}, {hardware.get('processes', 1)} process(es)")
    )
    rows.append(("processor", f"{hardware.get('cpu')}, {hardware.get('cores')} cores"))
  versions = results.get("versions", {})
  rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)))
  for path, name in (
    ("samples.generator", "images generated for the generator"),
    ("samples.student", "for the student"),
  ):
    if "samples" in results:
      rows.append((name, run.of_results(path, ",.0f")))
  return [(name, value) for name, value in rows if value]


# Several runs.


def _has(runs: Sequence[Run], score: str) -> bool:
  return any(score in entry for run in runs for entry in run.history)


def _compared(runs: Sequence[Run], score: str, colours: Mapping[str, int], dashed: Mapping[str, bool]) -> dict:
  curves = [svg.Curve(run.name, _points(run, score), colours[run.name], dashed[run.name]) for run in runs]
  curves = [curve for curve in curves if curve.points]
  return {
    "svg": svg.chart(curves, f"{score.replace('_', ' ')}: {_told(curves)}"),
    "caption": f"{score.replace('_', ' ').capitalize()} by epoch.",
  }


def _settings(run: Run) -> dict[str, Any]:
  """The config, flat, without what equal runs may differ in; of a given teacher, its digest stands for its place."""
  flat = {key: value for key, value in _flat(run.results["config"]) if key not in NO_SETTINGS}
  if flat.get("teacher.checkpoint"):
    flat["teacher.checkpoint"] = run.results["teacher"].get("digest")
  return flat


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  flat = []
  for key, value in tree.items():
    flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
  return flat


def _grouped(runs: Sequence[Run]) -> list[list[Run]]:
  """Runs that differ in nothing but the seed, together."""
  groups: list[list[Run]] = []
  for run in runs:
    same = next((group for group in groups if _alike(group[0], run)), None)
    if same:
      same.append(run)
    else:
      groups.append([run])
  return groups


def _alike(a: Run, b: Run) -> bool:
  """Whether two runs differ in nothing but the seed, and in the teacher if each has that of its own seed."""
  ours, theirs = _settings(a), _settings(b)
  if all(run.results["teacher"].get("seed") == run.results["seed"] for run in (a, b)):
    ours, theirs = ({**settings, "teacher.checkpoint": ""} for settings in (ours, theirs))
  return ours == theirs


def _group_table(groups: Sequence[Sequence[Run]]) -> Table:
  columns = {
    "teacher": "teacher.accuracy",
    "student, last": "student.last.accuracy",
    "best": "student.best.accuracy",
    "agreement": "student.last.agreement",
  }
  base = {run.results["seed"]: run for run in groups[0]}
  rows = []
  for group in groups:
    cells: list[Any] = [_group_name(group, groups), len(group)]
    cells += [_mean_of(group, path) for path in columns.values()]
    pairs = [(run, base[run.results["seed"]]) for run in group if run.results["seed"] in base]
    cells += ["", ""] if group is groups[0] or not pairs else [_paired(pairs), _interval(pairs)]
    rows.append(cells)
  interval = f"{paired.CONFIDENCE:.0%} interval".replace("%", " %")
  return {"heads": ["", "seeds", *columns, "paired difference", interval], "rows": rows}


def _group_name(group: Sequence[Run], groups: Sequence[Sequence[Run]]) -> str:
  """In what its config differs from the first group's, or its runs' name."""
  ours, first = _settings(group[0]), _settings(groups[0][0])
  differing = [key for key in ours if ours[key] != first.get(key)]
  if len(differing) > 1:  # whether a teacher is given or trained says less than anything else
    differing = [key for key in differing if key != "teacher.checkpoint"]
  if not differing:
    return group[0].results["name"]
  shown = ", ".join(f"{key}={_plain(ours[key])}" for key in differing[:3])
  return shown + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")


def _mean_of(group: Sequence[Run], path: str) -> Markup:
  values = []
  for run in group:
    value = run.results
    for key in path.split("."):
      value = value[key]
    values.append(value)
  return _mean_and_deviation(values, f"{','.join(run.name for run in group)} mean {path}", 1, ".4f")


def _paired(pairs: Sequence[tuple[Run, Run]]) -> Markup:
  gaps, names = _gaps(pairs)
  return _mean_and_deviation(gaps, f"{names} paired student.last.accuracy", 0.01, "+.2f")


def _interval(pairs: Sequence[tuple[Run, Run]]) -> Markup:
  """The confidence interval of the mean paired difference; nothing of a single pair."""
  gaps, names = _gaps(pairs)
  ends = paired.interval(gaps)
  if ends is None:
    return Markup("")
  shown = [number(end, f"{names} interval student.last.accuracy {place}", "+.2f") for place, end in enumerate(ends)]
  return Markup("{} to {}").format(*shown)


def _gaps(pairs: Sequence[tuple[Run, Run]]) -> tuple[list[float], str]:
  """The differences in accuracy at the last epoch, in points, and the names of the runs, for the source."""
  gaps = [100 * (a.results["student"]["last"]["accuracy"] - b.results["student"]["last"]["accuracy"]) for a, b in pairs]
  return gaps, ",".join(f"{a.name}-{b.name}" for a, b in pairs)


def _mean_and_deviation(values: Sequence[float], source: str, points: float, form: str) -> Markup:
  shown = number(statistics.fmean(values), source, form)
  if len(values) < 2:
    return shown
  deviation = statistics.stdev(values)
  return Markup("{} ± {}").format(shown, number(deviation, f"{source} deviation", ".2f", 100 * points))


def _run_table(runs: Sequence[Run]) -> Table:
  heads = ["run", "method", "arm", "seed", "teacher", "student, last", "best", "agreement", "gap", "seconds"]
  rows = []
  for run in runs:
    results = run.results
    gap = 100 * (results["teacher"]["accuracy"] - results["student"]["last"]["accuracy"])
    rows.append(
      [
        run.name,
        results.get("method", ""),
        results["arm"],
        results["seed"],
        run.of_results("teacher.accuracy"),
        run.of_results("student.last.accuracy"),
        run.of_results("student.best.accuracy"),
        run.of_results("student.last.agreement"),
        number(gap, f"{run.name} gap last", ".2f"),
        run.of_results("seconds", ",.0f"),
      ]
    )
  return {"heads": heads, "rows": rows}


def _config_table(runs: Sequence[Run]) -> Table:
  flats = [{**dict(_flat(run.results["config"]))} for run in runs]
  keys = sorted({key for flat in flats for key in flat})
  differing = [key for key in keys if any(flat.get(key) != flats[0].get(key) for flat in flats)]
  return {
    "heads": ["key", *(run.name for run in runs)],
    "rows": [[key, *(_plain(flat.get(key)) for flat in flats)] for key in differing],
  }


def _plain(value: Any) -> str:
  """A value of a config as text."""
  return "–" if value is None else "(empty)" if value == "" else str(value)


def _significant(value: float) -> str:
  """Four significant digits."""
  return f"{value:.4g}"
