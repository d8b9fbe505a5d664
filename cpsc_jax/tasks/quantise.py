"""Data-free quantisation: the student is the teacher's own network at few bits, and starts with its weights.

First the generator learns alone (`quantise.warmup`), then the student sees its samples while the ranges of activations
follow them (`quantise.calibration`), then it is fine-tuned and the ranges stay. So every run measures the network
quantised without any data, calibrated, and fine-tuned.
"""

import dataclasses
from typing import Any

import jax
import optax

from cpsc_jax import nets, optim
from cpsc_jax.config import Config, quantiser_options, waiting_epochs
from cpsc_jax.setup import Method, Setup
from cpsc_jax.state import State, Tree
from cpsc_jax.tasks.base import Task


def student(config: Config, net: Any, image_shape: tuple[int, int, int]) -> nets.Quantised:
  batches = config.quantise.calibration * config.schedule.iterations * config.student.steps
  options = {"calibration": batches, "momentum": config.quantise.momentum}
  return nets.quantise(net, image_shape, **quantiser_options(config), **options)


def method(config: Config, base: Method, iterations: int) -> Method:
  """The student waits while the generator learns alone, and where its method makes it wait."""
  warmup = config.quantise.warmup * iterations

  def waits(state: State) -> jax.Array:
    alone = state.step < warmup
    return alone | base.waits(state) if base.waits else alone

  return dataclasses.replace(base, waits=waits) if warmup else base


def optimiser(config: Config, tx: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
  return optim.after(config.quantise.calibration * steps, tx)


def begin(config: Config, setup: Setup, state: State, image_shape: tuple[int, int, int]) -> State:
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
  calibrated = history[waiting_epochs(config) - 1]["accuracy"]
  net, _ = nets.deployed(setup.student.net, {})
  return {"quantised": {**net.card, "without_data": before["accuracy"], "calibrated": calibrated}}


TASK = Task(student, method, optimiser, begin, report)
