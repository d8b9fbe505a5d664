"""A page that compares runs."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from cpsc_jax import paired
from cpsc_jax.page import svg
from cpsc_jax.page.base import SCORES, Run, Table, described, number, plain, points_of, render, sheet

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


def comparison_page(runs: Sequence[Run]) -> str:
  """One page of several finished runs."""
  groups = _grouped(runs)
  colours = {run.name: colour for colour, group in enumerate(groups) for run in group}
  dashed = {run.name: i > 0 for group in groups for i, run in enumerate(group)}
  best = max(runs, key=lambda run: run.results["student"]["last"]["accuracy"])
  entries = [{"name": run.name, "colour": colours[run.name] % svg.COLOURS, "dashed": dashed[run.name]} for run in runs]
  return render(
    "comparison.html",
    title=f"{len(runs)} runs compared",
    verdict=Markup("The highest accuracy at the last epoch is {}, of {}.").format(
      best.of_results("student.last.accuracy"), best.name
    ),
    groups=_group_table(groups),
    charts=[_compared(runs, score, colours, dashed) for score in SCORES if _has(runs, score)],
    legend=entries,
    grids=[{**shown, "name": run.name} for run in runs if (shown := sheet(run, 6))],
    runs=_run_table(runs),
    differences=_config_table(runs),
  )


def _has(runs: Sequence[Run], score: str) -> bool:
  return any(score in entry for run in runs for entry in run.history)


def _compared(runs: Sequence[Run], score: str, colours: Mapping[str, int], dashed: Mapping[str, bool]) -> dict:
  curves = [svg.Curve(run.name, points_of(run, score), colours[run.name], dashed[run.name]) for run in runs]
  curves = [curve for curve in curves if curve.points]
  return {
    "svg": svg.chart(curves, f"{score.replace('_', ' ')}: {described(curves)}"),
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
  shown = ", ".join(f"{key}={plain(ours[key])}" for key in differing[:3])
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
    "rows": [[key, *(plain(flat.get(key)) for flat in flats)] for key in differing],
  }
