"""The page of one run."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cpsc_jax.page import published, svg
from cpsc_jax.page.base import (
  MOST_CLASSES,
  SCORES,
  Run,
  Table,
  class_names,
  described,
  picture,
  plain,
  points_of,
  render,
  sheet,
  significant,
)
from cpsc_jax.page.words import SAMPLES, STUDENT

GRIDS = 6  # epochs whose samples are side by side
MOST_ROWS = 100  # of the table of classes
MOST_CONFUSED = 12
MOST_EPOCHS = 30  # rows of the table of curves
LARGEST_MATRIX = 60  # classes in the picture of a confusion matrix


def run_page(run: Run, control_arms: Sequence["Run"] = ()) -> str:
  """The page of one run.

  Args:
    control_arms: other runs of the same config but for the arm.
  """
  results = run.results
  there = run.diagnoses.get(run.last_diagnosis, {})
  of_facts = _facts_entry(run)
  return render(
    "run.html",
    title=f"{results['name']}: {results['arm']}, seed {results['seed']}",
    verdict=_verdict(run),
    arms=[_arm(run, arm) for arm in control_arms],
    status=status(run),
    published=published.of(results),
    tiles=_tiles(run),
    warnings=[str(warning) for warning in there.get("warnings", ())],
    diagnosed=run.last_diagnosis,
    has_samples="class_balance" in there,
    charts=_charts(run),
    numbers=_numbers(run),
    terms=_terms(run),
    grids=_grids(run),
    grids_caption=_grids_caption(run),
    sheet=sheet(run, 12),
    confusion=_confusion(run, there),
    confused=_confused(run, there),
    classes=_classes(run, there),
    facts=_facts(run),
    facts_epoch=None if of_facts is None else run.history[of_facts]["epoch"],
    calibration=_calibration(there),
    pulls=_pulls(run, there),
    layers=_layers(run, there),
    command=results.get("command"),
    changed=[(key, plain(was), plain(now)) for key, (was, now) in results.get("changed", {}).items()],
    environment=environment(run),
  )


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


def status(run: Run) -> Markup:
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
  tail = results.get("long_tail", {})
  for third in tail.get("classes", ()):
    tiles.append((f"long_tail.teacher.{third}", f"teacher, {third} classes", ".4f"))
    if "student" in tail:
      tiles.append((f"long_tail.student.last.{third}", f"student, {third} classes", ".4f"))
  tiles += [
    ("teacher.parameters", "parameters of the teacher", ",.0f"),
    ("student.parameters", "parameters of the student", ",.0f"),
  ]
  return [{"value": run.of_results(path, form), "name": name} for path, name, form in tiles]


def _charts(run: Run) -> list[dict]:
  """Accuracy and agreement in one picture; fidelity, the players' weighted totals and the time in one each."""
  charts = []
  teacher = run.results["teacher"]["accuracy"], "teacher's accuracy"
  of_student = "On the evaluation's images, by epoch; the dashed line is the teacher's accuracy."
  of_samples = "The share of samples to which the teacher gives the class that was asked for, by epoch."
  for scores, level, caption in ((SCORES[:2], teacher, of_student), (SCORES[2:], None, of_samples)):
    curves, legend = [], []
    for score in scores:
      points, colour = points_of(run, score), SCORES.index(score)
      if points:
        curves.append(svg.Curve(score.replace("_", " "), points, colour))
        last = next(i for i in reversed(range(len(run.history))) if score in run.history[i])
        value = run.of_history(last, score)
        legend.append({"name": curves[-1].name, "colour": colour, "dashed": False, "value": value})
    if curves:
      charts.append({"svg": svg.chart(curves, described(curves), level), "legend": legend, "caption": caption})
  for colour, player in ((1, "generator"), (0, "student")):
    points = points_of(run, f"totals|{player}")
    if points:
      curve = svg.Curve(f"{player}'s total", points, colour)
      last = next(i for i in reversed(range(len(run.history))) if player in run.history[i]["totals"])
      value = run.of_history(last, f"totals|{player}", "g")
      charts.append(
        {
          "svg": svg.chart([curve], described([curve])),
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
        "svg": svg.chart([curve], described([curve]), span=(0, max(y for _, y in times) * 1.1 or 1)),
        "legend": [{"name": "seconds", "colour": 7, "dashed": False, "value": value}],
        "caption": "Wall clock of the diagnosed epochs; the first after a start has the compilation in it.",
      }
    )
  return charts


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
    curve = svg.Curve(name, points_of(run, f"terms|{name}"), 1 if player == "generator" else 0)
    if curve.points:
      last = next(i for i in reversed(range(len(run.history))) if name in run.history[i]["terms"])
      weighted = isinstance(weights.get(player, {}).get(term), int | float)
      found.append(
        {
          "name": name,
          "svg": svg.chart([curve], described([curve]), height=130),
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
    grids.append({"epoch": epoch, **picture(images[:MOST_CLASSES] / 255, f"{what} after epoch {epoch}")})
  return grids


def _grids_caption(run: Run) -> str:
  rows = "Each row is a class, from the first at the top" if _labelled(run) else "The generator knows no classes"
  number = len(run.results.get("class_names", ()))
  more = f" (the first {MOST_CLASSES} of {number})" if _labelled(run) and number > MOST_CLASSES else ""
  return f"{rows}{more}. A generator draws the same latents in every picture; a pool is drawn from at random."


def _labelled(run: Run) -> bool:
  return any("fidelity_per_class" in arrays for arrays in run.diagnoses.values())


def _confusion(run: Run, there: Mapping[str, np.ndarray]) -> Markup | None:
  matrix = there.get("confusion")
  if matrix is None or len(matrix) > LARGEST_MATRIX:
    return None
  shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
  right = int(np.trace(matrix))
  label = f"confusion matrix of {len(matrix)} classes: {right} of {int(matrix.sum())} images are on the diagonal"
  return svg.heatmap(shares, _names(run, len(matrix)), label)


def _names(run: Run, number: int) -> list[str]:
  names = class_names(run)
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
  "label_shares": ("share of labels", ".3f"),
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


def _facts_entry(run: Run) -> int | None:
  """The place in the history of the last epoch whose diagnosis it has; the diagnosis's own file may be gone."""
  return next((i for i in reversed(range(len(run.history))) if "diagnostics" in run.history[i]), None)


def _facts(run: Run) -> list[dict]:
  index = _facts_entry(run)
  if index is None:
    return []
  parts = []
  for title, words in (("Generator", SAMPLES), ("Student", STUDENT)):
    facts = []
    for name, said in words.items():
      if name not in run.history[index]["diagnostics"]:
        continue
      points = points_of(run, f"diagnostics|{name}")
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
          "svg": svg.chart([curve], described([curve]), level, height=110)
          if len(points) > 1 and name != "samples"
          else "",
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
  return svg.reliability(counts, sure, right, "accuracy of the student by its confidence on real images")


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
  label = f"distances of {len(names)} batch norms, the largest {significant(values[largest])} in {names[largest]}"
  total = Markup('<data value="{}" data-from="{}">{}</data>').format(
    repr(float(values.sum())), f"{run.name} layers {run.last_diagnosis}", significant(float(values.sum()))
  )
  return {"svg": svg.bars(values, names, label), "number": len(names), "total": total}


def environment(run: Run) -> list[tuple[str, Any]]:
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
