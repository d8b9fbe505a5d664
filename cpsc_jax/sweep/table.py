"""What came of a sweep, point by point: means over seeds, and differences to the base, paired by seed."""

import json
import math
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cpsc_jax import report
from cpsc_jax.paired import interval
from cpsc_jax.record import write_whole
from cpsc_jax.sweep.grid import BASE
from cpsc_jax.sweep.members import Member


def rows(members: Sequence[Member]) -> list[dict[str, Any]]:
  """One row for each point, in the order of the members, of those that are finished.

  A row has the point's name and changes; seeds, accuracy, best, agreement and together: of each finished member, in
  this order; mean and deviation of the accuracies (None where there are none, or one); difference and interval: to the
  base with the same seeds and teachers; failed: {seed: why}; waiting: seeds that are not done. Accuracies are those of
  the last epoch.
  """
  results = {member: report.read_results(member.workdir) for member in members if _has_results(member)}
  base = {_pair(found): _accuracy(found) for member, found in results.items() if member.point.name == BASE}
  table = []
  for name in dict.fromkeys(member.point.name for member in members):
    ours = [member for member in members if member.point.name == name]
    done = [results[member] for member in ours if member in results]
    accuracies = [_accuracy(found) for found in done]
    paired = [_accuracy(found) - base[_pair(found)] for found in done if name != BASE and _pair(found) in base]
    ends = interval(paired)
    table.append(
      {
        "point": name,
        "changes": dict(ours[0].point.changes),
        "seeds": [found["seed"] for found in done],
        "accuracy": accuracies,
        "best": [found["student"]["best"]["accuracy"] for found in done],
        "agreement": [found["student"]["last"]["agreement"] for found in done],
        "together": [found.get("together", 1) for found in done],
        "mean": statistics.fmean(accuracies) if accuracies else None,
        "deviation": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "difference": statistics.fmean(paired) if paired else None,
        "interval": list(ends) if ends else None,
        "pairs": len(paired),
        "failed": {str(member.seed): member.failure for member in ours if member.failure},
        "waiting": [member.seed for member in ours if not member.done],
      }
    )
  return table


def _has_results(member: Member) -> bool:
  return (member.workdir / "results.json").exists()


def _accuracy(results: Mapping[str, Any]) -> float:
  return results["student"]["last"]["accuracy"]


def _pair(results: Mapping[str, Any]) -> int:
  """What a difference to the base is paired by: the seed; teachers differ by it, or by what a point changes."""
  return results["seed"]


def markdown(table: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str:
  """The rows as a Markdown table, under what the sweep was."""
  lines = [f"**{about['title']}**", ""]
  against = "against base (95 %)"
  lines.append(f"| point | seeds | mean | deviation | {against} | agreement | accuracies |")
  lines.append("|---|---|---|---|---|---|---|")
  for row in table:
    cells = [row["point"], str(len(row["seeds"])), _shown(row["mean"]), _shown(row["deviation"]), _against(row)]
    cells += [_shown(statistics.fmean(row["agreement"]) if row["agreement"] else None)]
    each = [f"{accuracy:.4f}" for accuracy in row["accuracy"]]
    each += [f"seed {seed} not finite" for seed in row["failed"]] + [f"seed {seed} waits" for seed in row["waiting"]]
    lines.append(f"| {' | '.join([*cells, ', '.join(each)])} |")
  lines += ["", *about["notes"]]
  lines.append(
    "Accuracies are those of the last epoch; the deviation is the sample's. Against base: the mean difference of"
    " members with the same seed, and Student's confidence interval for it."
  )
  return "\n".join(lines) + "\n"


def _shown(value: float | None) -> str:
  return "" if value is None else f"{value:.4f}"


def _against(row: Mapping[str, Any]) -> str:
  if row["difference"] is None:
    return ""
  ends = row["interval"]
  return f"{row['difference']:+.4f}" + (f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else "")


def write(
  workdir: pathlib.Path, name: str, members: Sequence[Member], about: Mapping[str, Any], page: bool = False
) -> str:
  """Writes NAME.md and NAME.json and, with `page`, NAME.html of two finished members or more; returns the Markdown.

  The rows of a search are in the order of their means, best first.
  """
  table = rows(members)
  if about["search"] != "grid":
    table.sort(key=lambda row: -math.inf if row["mean"] is None else row["mean"], reverse=True)
  text = markdown(table, about)
  write_whole(workdir / f"{name}.md", text.encode())
  write_whole(workdir / f"{name}.json", (json.dumps({**about, "points": table}, indent=2) + "\n").encode())
  finished = [member for member in members if _has_results(member)]
  if page and len(finished) > 1:
    report.compare([member.workdir for member in finished], workdir / f"{name}.html")
  return text
