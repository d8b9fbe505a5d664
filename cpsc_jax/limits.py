"""The range of every number in a config, in one table; what a value must have to do with others stands in config.py."""

import dataclasses
import math
from typing import Any

from cpsc_jax.errors import Refusal


@dataclasses.dataclass(frozen=True)
class Range:
  """Finite numbers from `low` to `high`; each end belongs to it unless it is open."""

  low: float
  high: float
  low_open: bool = False
  high_open: bool = False

  def has(self, value: float) -> bool:
    above = value > self.low if self.low_open else value >= self.low
    below = value < self.high if self.high_open else value <= self.high
    return math.isfinite(value) and above and below

  def __str__(self) -> str:
    if self.high == math.inf:
      return "a finite number"
    low = f"{'greater than' if self.low_open else 'at least'} {self.low:,}"
    return f"{low} and {'less than' if self.high_open else 'at most'} {self.high:,}"


MANY, HUGE = 10**9, 1e30  # more than any run has of anything; more than any weight or rate
COUNT, COUNT_OR_NONE, SIZE = Range(1, MANY), Range(0, MANY), Range(1, 2**20)
SHARE, PROBABILITY = Range(0, 1, high_open=True), Range(0, 1, low_open=True)
POSITIVE, NOT_NEGATIVE = Range(0, HUGE, low_open=True), Range(0, HUGE)

_OPTIMISER = {
  "lr": POSITIVE,
  "lr_end": NOT_NEGATIVE,
  "momentum": SHARE,
  "weight_decay": NOT_NEGATIVE,
  "decay": Range(0, 1),
  "clip": NOT_NEGATIVE,
  "warmup_epochs": COUNT_OR_NONE,
  "micro_batches": SIZE,
  "crop_pad": COUNT_OR_NONE,
}
RANGES: dict[str, Range] = {
  "seed": Range(0, 2**32 - 1),
  **{f"teacher.{key}": value for key, value in _OPTIMISER.items()},
  "teacher.epochs": COUNT,
  "teacher.batch_size": SIZE,
  "teacher.label_smoothing": SHARE,
  **{f"student.{key}": value for key, value in _OPTIMISER.items()},
  "student.steps": COUNT,
  "generator.latent_dim": SIZE,
  "generator.width": Range(1, 2**14),
  "generator.epsilon": NOT_NEGATIVE,
  "generator.steps": COUNT,
  "generator.ema": SHARE,
  "generator.ema_share": SHARE,
  "generator.between_share": SHARE,
  "generator.between": Range(2, 2**10),
  "generator.label_limit": COUNT_OR_NONE,
  "generator.micro_batches": SIZE,
  "generator.lr": POSITIVE,
  "generator.b1": SHARE,
  "generator.b2": SHARE,
  "generator.decay": Range(0, 1),
  "generator.clip": NOT_NEGATIVE,
  "generator.crop_pad": COUNT_OR_NONE,
  "pool.size": COUNT,
  "pool.batch_size": SIZE,
  "pool.replay_share": SHARE,
  "pool.fresh_share": SHARE,
  "pool.views": Range(1, 2**10),
  "pool.bank": COUNT,
  "schedule.epochs": COUNT,
  "schedule.horizon": COUNT_OR_NONE,
  "schedule.iterations": COUNT,
  "schedule.batch_size": SIZE,
  "loss.scl_temperature": POSITIVE,
  "loss.scl_block": SIZE,
  "loss.confidence": PROBABILITY,
  "loss.kd_temperature": POSITIVE,
  "loss.triplet.margin": NOT_NEGATIVE,
  "loss.triplet.synthesis_from": COUNT_OR_NONE,
  "loss.views.temperature": POSITIVE,
  "loss.views.negatives": COUNT,
  "loss.views.width": SIZE,
  "loss.views.lr": POSITIVE,
  "episodes.bn_momentum": SHARE,
  "episodes.latent_lr": POSITIVE,
  "episodes.life": COUNT,
  "episodes.redraw_at": COUNT_OR_NONE,
  "episodes.warmup": COUNT_OR_NONE,
  "episodes.warmup_life": COUNT,
  "evaluate.every": COUNT,
  "evaluate.batch_size": SIZE,
  "evaluate.samples_per_class": SIZE,
  "checkpoint.every": COUNT,
  "checkpoint.minutes": POSITIVE,
}
ANY = Range(-math.inf, math.inf)
WEIGHTS = ("loss.generator.", "loss.student.")  # every key below these is a weight, at least 0


def range_of(key: str) -> Range:
  """The range of a key whose value is a number; of a key that is not of this package, all finite numbers."""
  return NOT_NEGATIVE if key.startswith(WEIGHTS) else RANGES.get(key, ANY)


def check(flat: dict[str, Any]) -> None:
  """Refuses numbers out of their range, and milestones that are not increasing epochs, in {dotted key: value}.

  Raises:
    Refusal: names the key, the value and the range.
  """
  for key, value in flat.items():
    if isinstance(value, int | float) and not isinstance(value, bool):
      if not range_of(key).has(value):
        raise Refusal(f"config.{key} is {value}; it must be {range_of(key)}.")
    elif key.endswith(".milestones"):
      numbers = all(isinstance(epoch, int) and not isinstance(epoch, bool) and epoch > 0 for epoch in value)
      if not numbers or any(a >= b for a, b in zip(value, value[1:], strict=False)):
        raise Refusal(f"config.{key} is {value}; it must be epochs, whole numbers from 1 on, in increasing order.")
