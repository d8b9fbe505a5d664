"""The page of a run of several phases."""

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cpsc_jax.page import svg
from cpsc_jax.page.base import Run, class_names, plain, points_over_classes, render
from cpsc_jax.page.run import LARGEST_MATRIX, environment


def phases_page(run: Run, control_arms: Sequence[Run] = ()) -> str:
  """The page of a run of class-incremental learning, whose phases have pages of their own beside it.

  Args:
    control_arms: other runs of the same config but for the arm.
  """
  results, found = run.results, run.results["incremental"]
  sizes, names = found["sizes"], iter(class_names(run))
  rows = []
  for phase, (size, accuracies) in enumerate(zip(sizes, found["matrix"], strict=True)):
    new = ", ".join(next(names, "") for _ in range(size))
    each = [run.of_results(f"incremental.matrix.{phase}.{other}") for other in range(len(accuracies))]
    rows.append(
      [phase + 1, new, run.of_results(f"incremental.accuracy.{phase}"), *each, *[""] * (len(sizes) - len(each))]
    )
  return render(
    "phases.html",
    title=f"{results['name']}: {results['arm']}, seed {results['seed']}",
    verdict=_verdict(run),
    arms=[_arm(arm) for arm in control_arms],
    status=Markup("Finished in {} s: the first network took {} s, the phases after it {} s.").format(
      *(run.of_results(path, ",.0f") for path in ("seconds", "seconds_by_part.teacher", "seconds_by_part.student"))
    ),
    tiles=_tiles(run),
    phases=range(1, len(sizes) + 1),
    rows=rows,
    curve=_curve(run),
    matrix=_matrix(found["matrix"]),
    links=[f"phase_{number}/report.html" for number in range(2, len(sizes) + 1)],
    command=results.get("command"),
    changed=[(key, plain(was), plain(now)) for key, (was, now) in results.get("changed", {}).items()],
    environment=environment(run),
  )


def _verdict(run: Run) -> Markup:
  found = run.results["incremental"]
  last = len(found["sizes"]) - 1
  return Markup(
    "{} classes in {} phases: accuracy {} over all of them at the end, {} on average after each phase."
  ).format(
    sum(found["sizes"]), last + 1, run.of_results(f"incremental.accuracy.{last}"), run.of_results("incremental.average")
  )


def _arm(arm: Run) -> Markup:
  last = len(arm.results["incremental"]["sizes"]) - 1
  return Markup("Control arm {}: {} at the end, {} on average.").format(
    arm.results["arm"], arm.of_results(f"incremental.accuracy.{last}"), arm.of_results("incremental.average")
  )


def _tiles(run: Run) -> list[dict[str, Any]]:
  last = len(run.results["incremental"]["sizes"]) - 1
  return [
    {"name": "average incremental accuracy", "value": run.of_results("incremental.average")},
    {"name": "accuracy at the end", "value": run.of_results(f"incremental.accuracy.{last}")},
    {"name": "forgetting", "value": run.of_results("incremental.forgetting")},
    {"name": "accuracy on the first classes, at first", "value": run.of_results("incremental.accuracy.0")},
  ]


def _curve(run: Run) -> Markup:
  points = points_over_classes(run)
  label = f"accuracy goes from {points[0][1]:.4f} to {points[-1][1]:.4f}"
  return svg.chart([svg.Curve("accuracy", points, 0)], label)


def _matrix(rows: Sequence[Sequence[float]]) -> Markup | None:
  if len(rows) > LARGEST_MATRIX:
    return None
  full = [[*row, *[math.nan] * (len(rows) - len(row))] for row in rows]
  return svg.heatmap(full, [str(n + 1) for n in range(len(rows))], "accuracy after each phase, on the classes of each")
