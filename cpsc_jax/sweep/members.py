"""Members of a sweep: each is the run of one point with one seed, in a folder of its own."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_collections

from cpsc_jax import schema
from cpsc_jax.config import inverts
from cpsc_jax.sweep.grid import Point

FAILED = "failed.json"  # in the folder of a member whose loss was not finite
# Settings by which trained teachers differ, beside the seed.
OF_TEACHER = ("teacher.", "dataset.imbalance", "precision", "loss_scaling", "rematerialise", "reference")
# What makes no difference to a member's program, or is an argument of it.
NOT_IN_PROGRAM = ("name", "seed", "dataset.data_dir", "teacher.")
TOGETHER = ("distil", "quantise")  # tasks whose runs are one training from a fresh state to the last epoch
_OF_CARD = ("net", "num_classes", "image_size", "channels", "mean", "std")


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
  """A run of a sweep.

  Attributes:
    point, seed: what it is the run of.
    config: as an ordinary run is given it; its teacher.checkpoint is where its teacher is or will be.
    workdir: its folder.
    teacher: the folder in which its teacher is trained; None where the config names a trained one.
    command: the words of an ordinary run that does the same.
    earlier: the folder of a shorter run of the same, which it goes on from; None: it begins anew.
  """

  point: Point
  seed: int
  config: ml_collections.ConfigDict
  workdir: pathlib.Path
  teacher: pathlib.Path | None
  command: tuple[str, ...] = ()
  earlier: pathlib.Path | None = None

  @property
  def name(self) -> str:
    return self.workdir.name

  @property
  def done(self) -> bool:
    """Whether there is nothing left to do for it."""
    return (self.workdir / "results.json").exists() or self.failure is not None

  @property
  def failure(self) -> str | None:
    """Why it has no results and will have none; None of any other."""
    path = self.workdir / FAILED
    return json.loads(path.read_text())["why"] if path.exists() else None


def of_point(
  config: ml_collections.ConfigDict, point: Point, seed: int, more: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
  """The config of a point with a seed; `more` are further settings, {dotted key: value}."""
  config = ml_collections.ConfigDict(config.to_dict())
  config.update_from_flattened_dict({**point.changes, "seed": seed, **(more or {})})
  return config


def teacher_point(point: Point) -> Point:
  """What of a point changes a teacher that is trained."""
  changes = {key: value for key, value in point.changes.items() if key.startswith(OF_TEACHER)}
  if not changes:
    return Point("seed", {})
  digest = hashlib.sha256(repr(sorted(changes.items())).encode()).hexdigest()[:8]
  return Point(f"{digest}-seed", changes)


def rates(config: Any) -> tuple[str, ...]:
  """Those of the learning rates that are a factor on every step, so that members of one program may differ in them.

  That of a student whose rate ends above 0 is not: its end does not move along. Nor is that of a generator which starts
  anew in every iteration: what is optimised beside it may have a rate of its own.
  """
  student = config.student.schedule != "cosine" or config.student.lr_end == 0
  return ("student.lr",) * student + ("generator.lr",) * (not inverts(config))


def program(config: Any, card: Mapping[str, Any]) -> str | None:
  """A digest that is the same for resolved configs whose epochs are one program of other numbers; None: it runs alone.

  Those numbers are the seed, the weights of the loss terms as long as the same ones are 0, the learning rates of
  `rates`, and the variables of the teacher, whose card is `card`.
  """
  if config.task not in TOGETHER or config.arm not in schema.SYNTHETIC_ARMS:
    return None
  numbers, said = rates(config), {}
  for key, value in schema.flatten(config):
    if key in numbers or key.startswith(NOT_IN_PROGRAM):
      continue
    said[key] = bool(value) if key.startswith(("loss.generator.", "loss.student.")) else value
  said["of teacher"] = [card[key] for key in _OF_CARD]
  return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
