"""Searches: which points are tried, and how long."""

import dataclasses
import math
from collections.abc import Sequence

from cpsc_jax.errors import Refusal
from cpsc_jax.sweep.grid import MOST_POINTS

SEARCHES = ("grid", "random", "halving")
KEPT = 3  # of so many points, one goes on after a rung, and for so many times as long
MOST_RUNGS = 3


@dataclasses.dataclass(frozen=True)
class Rung:
  """A part of a sweep: so many points are trained up to so many epochs."""

  points: int
  epochs: int


def lengths(epochs: int, least: int = 1) -> list[int]:
  """The epochs at which rungs end: a ninth, a third and the whole of `epochs`, as far as they are at least `least`."""
  found = [epochs]
  while len(found) < MOST_RUNGS and (shorter := math.ceil(found[0] / KEPT)) >= least and shorter < found[0]:
    found.insert(0, shorter)
  return found


def halving(points: int, ends: Sequence[int]) -> list[Rung]:
  """The rungs of successive halving: after each the best third goes on, and what it has learnt is kept."""
  return [Rung(max(points // KEPT**number, 1), epochs) for number, epochs in enumerate(ends)]


def cost(rungs: Sequence[Rung]) -> float:
  """How much training the rungs are, in runs of the last one's length, for one seed."""
  before = [0, *(rung.epochs for rung in rungs)]
  return sum(rung.points * (rung.epochs - done) for rung, done in zip(rungs, before, strict=False)) / rungs[-1].epochs


def planned(search: str, budget: int, seeds: int, epochs: int, least: int = 1) -> list[Rung]:
  """The rungs of a search that costs at most `budget` runs of full length, over all seeds together.

  No more than MOST_POINTS are tried, whatever the budget.

  Raises:
    Refusal: that is not enough for a choice.
  """
  ends = [epochs] if search == "random" else lengths(epochs, least)

  def of(points: int) -> list[Rung]:
    return halving(points, ends)

  number = 1
  while number < MOST_POINTS and seeds * cost(of(number + 1)) <= budget:
    number += 1
  needed = 2 if search == "random" else KEPT
  if number < needed or seeds * cost(of(number)) > budget:
    raise Refusal(
      f"--budget is {budget}, too little for the {needed} points that --search {search} needs at least, with {seeds}"
      f" seed(s) each; give {math.ceil(seeds * cost(of(needed)))} or more, or fewer --seeds."
    )
  return of(number)
