"""A page that compares runs."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cpsc_jax import paired
from cpsc_jax.page import svg
from cpsc_jax.page.base import (
  SCORES,
  Run,
  Table,
  described,
  number,
  plain,
  points_of,
  points_over_classes,
  render,
  sheet,
)

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


@dataclasses.dataclass(frozen=True)
class Kind:
  """What is compared of runs, by paths of results.json.

  Attributes:
    headline: the accuracy by which runs are compared, and what it is called.
    figures: {head: path} of both tables.
  """

  headline: tuple[str, str]
  figures: Mapping[str, str]


ORDINARY = Kind(
  headline=("student.last.accuracy", "accuracy at the last epoch"),
  figures={
    "teacher": "teacher.accuracy",
    "student, last": "student.last.accuracy",
    "best": "student.best.accuracy",
    "agreement": "student.last.agreement",
  },
)
PHASES = Kind(
  headline=("incremental.average", "average incremental accuracy"),
  figures={
    "first network": "incremental.accuracy.0",
    "average accuracy": "incremental.average",
    "at the end": "incremental.accuracy.-1",
    "forgetting": "incremental.forgetting",
  },
)


def comparison_page(runs: Sequence[Run]) -> str:
  """One page of several finished runs, all of several phases or none."""
  kind = PHASES if "incremental" in runs[0].results else ORDINARY
  configs = _configs(runs)
  settings = _settings(runs, configs)
  groups = _grouped(runs, settings)
  colours = {run.name: colour for colour, group in enumerate(groups) for run in group}
  dashed = {run.name: i > 0 for group in groups for i, run in enumerate(group)}
  path, what = kind.headline
  best = max(runs, key=lambda run: run.value(path))
  entries = [{"name": run.name, "colour": colours[run.name] % svg.COLOURS, "dashed": dashed[run.name]} for run in runs]
  if kind is PHASES:
    charts = [_over_classes(runs, colours, dashed)]
  else:
    charts = [_compared(runs, score, colours, dashed) for score in SCORES if _has(runs, score)]
  return render(
    "comparison.html",
    title=f"{len(runs)} runs compared",
    verdict=Markup("The highest {} is {}, of {}.").format(what, best.of_results(path), best.name),
    groups=_group_table(groups, kind, settings),
    charts=charts,
    legend=entries,
    grids=[{**shown, "name": run.name} for run in runs if (shown := sheet(run, 6))],
    runs=_run_table(runs, kind),
    differences=_config_table(runs, configs),
  )


def _has(runs: Sequence[Run], score: str) -> bool:
  return any(score in entry for run in runs for entry in run.history)


def _over_classes(runs: Sequence[Run], colours: Mapping[str, int], dashed: Mapping[str, bool]) -> dict:
  curves = [svg.Curve(run.name, points_over_classes(run), colours[run.name], dashed[run.name]) for run in runs]
  return {
    "svg": svg.chart(curves, f"accuracy: {described(curves, '{} classes')}"),
    "caption": "Accuracy over all classes seen so far, by their number.",
  }


def _compared(runs: Sequence[Run], score: str, colours: Mapping[str, int], dashed: Mapping[str, bool]) -> dict:
  curves = [svg.Curve(run.name, points_of(run, score), colours[run.name], dashed[run.name]) for run in runs]
  curves = [curve for curve in curves if curve.points]
  return {
    "svg": svg.chart(curves, f"{score.replace('_', ' ')}: {described(curves)}"),
    "caption": f"{score.replace('_', ' ').capitalize()} by epoch.",
  }


def _configs(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """The configs, flat. Where an older record lacks a key stands its default, if another run's record tells it."""
  flats = [dict(_flat(run.results["config"])) for run in runs]
  defaults = {}
  for run, flat in zip(runs, flats, strict=True):
    if "changed" in run.results:
      defaults |= {key: value for key, value in flat.items() if key not in run.results["changed"]}
  return [defaults | flat for flat in flats]


def _settings(runs: Sequence[Run], configs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Each run's config without what equal runs may differ in; of a given teacher, its digest stands for its place."""
  found = {}
  for run, flat in zip(runs, configs, strict=True):
    found[run.name] = {key: value for key, value in flat.items() if key not in NO_SETTINGS}
    if flat.get("teacher.checkpoint"):
      found[run.name]["teacher.checkpoint"] = run.results["teacher"].get("digest")
  return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
  flat = []
  for key, value in tree.items():
    flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
  return flat


def _grouped(runs: Sequence[Run], settings: Mapping[str, dict]) -> list[list[Run]]:
  """Runs that differ in nothing but the seed, together; one whose seed is there already is of another group."""
  groups: list[list[Run]] = []
  for run in runs:
    alike = [group for group in groups if _alike(group[0], run, settings)]
    same = next((group for group in alike if run.results["seed"] not in {each.results["seed"] for each in group}), None)
    if same:
      same.append(run)
    else:
      groups.append([run])
  return groups


def _alike(a: Run, b: Run, settings: Mapping[str, dict]) -> bool:
  """Whether two runs differ in nothing but the seed, and in the teacher if each has that of its own seed."""
  ours, theirs = settings[a.name], settings[b.name]
  if all(run.results["teacher"].get("seed") == run.results["seed"] for run in (a, b)):
    ours, theirs = ({**each, "teacher.checkpoint": ""} for each in (ours, theirs))
  return ours == theirs


def _group_table(groups: Sequence[Sequence[Run]], kind: Kind, settings: Mapping[str, dict]) -> Table:
  base = {run.results["seed"]: run for run in groups[0]}
  rows, times = [], collections.Counter()
  for group in groups:
    name = _group_name(group, groups, settings)
    times[name] += 1
    cells: list[Any] = [name if times[name] == 1 else f"{name}, repetition {times[name]}", len(group)]
    cells += [_mean_of(group, path) for path in kind.figures.values()]
    pairs = [(run, base[run.results["seed"]]) for run in group if run.results["seed"] in base]
    path = kind.headline[0]
    cells += ["", ""] if group is groups[0] or not pairs else [_paired(pairs, path), _interval(pairs, path)]
    rows.append(cells)
  interval = f"{paired.CONFIDENCE:.0%} interval".replace("%", " %")
  return {"heads": ["", "seeds", *kind.figures, "paired difference", interval], "rows": rows}


def _group_name(group: Sequence[Run], groups: Sequence[Sequence[Run]], settings: Mapping[str, dict]) -> str:
  """In what its config differs from the first group's, or its runs' name."""
  ours, first = settings[group[0].name], settings[groups[0][0].name]
  differing = [key for key in ours if ours[key] != first.get(key)]
  if len(differing) > 1:  # whether a teacher is given or trained says less than anything else
    differing = [key for key in differing if key != "teacher.checkpoint"]
  if not differing:
    return group[0].results["name"]
  shown = ", ".join(f"{key}={plain(ours[key])}" for key in differing[:3])
  return shown + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")


def _mean_of(group: Sequence[Run], path: str) -> Markup:
  values = [run.value(path) for run in group]
  return _mean_and_deviation(values, f"{','.join(run.name for run in group)} mean {path}", 1, ".4f")


def _paired(pairs: Sequence[tuple[Run, Run]], path: str) -> Markup:
  gaps, names = _gaps(pairs, path)
  return _mean_and_deviation(gaps, f"{names} paired {path}", 0.01, "+.2f")


def _interval(pairs: Sequence[tuple[Run, Run]], path: str) -> Markup:
  """The confidence interval of the mean paired difference; nothing of a single pair."""
  gaps, names = _gaps(pairs, path)
  ends = paired.interval(gaps)
  if ends is None:
    return Markup("")
  shown = [number(end, f"{names} interval {path} {place}", "+.2f") for place, end in enumerate(ends)]
  return Markup("{} to {}").format(*shown)


def _gaps(pairs: Sequence[tuple[Run, Run]], path: str) -> tuple[list[float], str]:
  """The differences of an accuracy, in points, and the names of the runs, for the source."""
  gaps = [100 * (a.value(path) - b.value(path)) for a, b in pairs]
  return gaps, ",".join(f"{a.name}-{b.name}" for a, b in pairs)


def _mean_and_deviation(values: Sequence[float], source: str, points: float, form: str) -> Markup:
  shown = number(statistics.fmean(values), source, form)
  if len(values) < 2:
    return shown
  deviation = statistics.stdev(values)
  return Markup("{} ± {}").format(shown, number(deviation, f"{source} deviation", ".2f", 100 * points))


def _run_table(runs: Sequence[Run], kind: Kind) -> Table:
  rows = []
  for run in runs:
    results = run.results
    cells: list[Any] = [run.name, results.get("method", ""), results["arm"], results["seed"]]
    cells += [run.of_results(path) for path in kind.figures.values()]
    if kind is ORDINARY:
      gap = 100 * (results["teacher"]["accuracy"] - results["student"]["last"]["accuracy"])
      cells.append(number(gap, f"{run.name} gap last", ".2f"))
    rows.append([*cells, run.of_results("seconds", ",.0f")])
  return {
    "heads": ["run", "method", "arm", "seed", *kind.figures, *(["gap"] if kind is ORDINARY else []), "seconds"],
    "rows": rows,
  }


def _config_table(runs: Sequence[Run], configs: Sequence[dict[str, Any]]) -> Table:
  keys = sorted({key for flat in configs for key in flat})
  differing = [key for key in keys if any(flat.get(key) != configs[0].get(key) for flat in configs)]
  return {
    "heads": ["key", *(run.name for run in runs)],
    "rows": [[key, *(plain(flat.get(key)) for flat in configs)] for key in differing],
  }
