"""Data-free quantisation: the student is the teacher's own network at few bits, and starts with its weights.

First the generator learns alone (`generator.warmup_epochs`), then the student sees its samples while the ranges of
activations follow them (`quantise.calibration`), then it is fine-tuned and the ranges stay. So every run measures the
network quantised without any data, calibrated, and fine-tuned.
"""

from typing import Any

import jax
import ml_collections
import optax

from cpsc_jax import methods, nets, optim
from cpsc_jax.datasets import Dataset
from cpsc_jax.errors import Refusal
from cpsc_jax.setup import Setup
from cpsc_jax.state import State, Tree
from cpsc_jax.tasks.base import Task

Config = ml_collections.ConfigDict | ml_collections.FrozenConfigDict


def check(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  """Bits that there are, and phases that the run has time for and measures."""
  for key in ("weights", "activations", "first", "last"):
    bits, default = config.quantise[key], key in ("first", "last")
    if not (2 <= bits <= 8 or bits == nets.FLOAT or (default and not bits)):
      more = ", or 0 for as many as the others" if default else ""
      raise Refusal(f"config.quantise.{key} is {bits}; it must be from 2 to 8 bits, 32 for float{more}.")
  if config.reference:
    raise Refusal("config.reference is that of CPSC-DFKD's distillation; leave it False for task 'quantise'.")
  if config.generator.student_mode == "train":
    raise Refusal(
      "config.generator.student_mode is 'train', with which the generator's steps would move the ranges of activations,"
      " before they are calibrated too; set it to 'eval'."
    )
  if config.student.norm_parts != 1:
    raise Refusal(
      f"config.student.norm_parts is {config.student.norm_parts}, but batch norms of a quantised network are fixed; set"
      " it to 1."
    )
  before = waiting(config, methods.waiting_epochs(config))
  epochs, every = config.schedule.epochs, config.evaluate.every
  phases = f"config.generator.warmup_epochs and config.quantise.calibration are {before} epochs together"
  if before > epochs:
    raise Refusal(f"{phases}, more than config.schedule.epochs, {epochs}; make them shorter or the run longer.")
  if before % every and before != epochs:
    raise Refusal(
      f"{phases}, after which the run is to be measured; make that a multiple of config.evaluate.every, {every}."
    )


def check_teacher(config: Config, teacher: Any, image_shape: tuple[int, int, int]) -> None:
  nets.quantise(teacher, image_shape, **options(config))


def of_teacher(config: Config, card: dict) -> Config:
  """To be quantised is the teacher's own network."""
  config = ml_collections.ConfigDict(config.to_dict())
  config.student.net, config.student.inherit = card["net"], True
  return config


def waiting(config: Config, epochs: int) -> int:
  return epochs + config.quantise.calibration


def options(config: Config) -> dict[str, Any]:
  """What `nets.quantise` is to make of the student."""
  c = config.quantise
  symmetric = c.weights == 8 if c.levels == "auto" else c.levels == "symmetric"
  bits = {name: c[name] for name in ("weights", "activations", "first", "last")}
  return {**bits, "symmetric": symmetric}


def student(config: Config, net: Any, image_shape: tuple[int, int, int]) -> nets.Quantised:
  steps = config.student.steps * config.student.micro_batches
  batches = config.quantise.calibration * config.schedule.iterations * steps
  calibration = {"calibration": batches, "momentum": config.quantise.momentum, "ranges": config.quantise.ranges}
  return nets.quantise(net, image_shape, **options(config), **calibration)


def optimiser(config: Config, tx: optax.GradientTransformation, steps: int, *_: Any) -> optax.GradientTransformation:
  return optim.after(config.quantise.calibration * steps, tx)


def begin(config: Config, setup: Setup, state: State, image_shape: tuple[int, int, int], teacher: Tree) -> State:
  """Until images calibrate them, the ranges of activations are what batch norms promise."""

  def with_ranges(net: Any, variables: Tree) -> Tree:
    if isinstance(net, nets.Quantised):
      return nets.ranges_without_data(net, variables, image_shape)
    inner = with_ranges(net.net, {collection: tree["net"] for collection, tree in variables.items()})
    return {**variables["batch_stats"], "net": inner}

  stats = with_ranges(setup.student.net, state.student.variables)
  return state.replace(student=state.student.replace(batch_stats=stats))


def report(config: Config, setup: Setup, before: dict[str, float], history: list[dict]) -> dict[str, Any]:
  """Bits, and the accuracies on the way: the last epoch's is the student's own."""
  calibrated = history[waiting(config, methods.waiting_epochs(config)) - 1]["accuracy"]
  net, _ = nets.deployed(setup.student.net, {})
  return {"quantised": {**net.card, "without_data": before["accuracy"], "calibrated": calibrated}}


TASK = Task(
  check=check,
  check_teacher=check_teacher,
  of_teacher=of_teacher,
  waiting=waiting,
  student=student,
  optimiser=optimiser,
  begin=begin,
  report=report,
)
