"""Differences between runs that are paired by their seed."""

import math
import statistics
from collections.abc import Sequence

from scipy import stats

CONFIDENCE = 0.95


def interval(differences: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
  """The ends of the confidence interval of the mean of differences, by Student's t; None of fewer than two."""
  number = len(differences)
  if number < 2:
    return None
  half = stats.t.ppf((1 + confidence) / 2, number - 1) * statistics.stdev(differences) / math.sqrt(number)
  mean = statistics.fmean(differences)
  return float(mean - half), float(mean + half)
