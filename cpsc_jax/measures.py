"""What is measured of a run after an epoch and at its end."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cpsc_jax import evaluate, nets, streams
from cpsc_jax.config import Config
from cpsc_jax.datasets import Split
from cpsc_jax.mesh import replicate
from cpsc_jax.progress import working
from cpsc_jax.setup import Setup
from cpsc_jax.state import State, Tree
from cpsc_jax.streams import Stream
from cpsc_jax.teach import Teacher


class Measures:
  """What is measured of a state: the student's accuracy, its agreement with the teacher, and the samples' fidelity."""

  def __init__(self, c: Config, setup: Setup, teacher: Teacher, test: Split):
    self.c, self.setup, self.teacher, self.test = c, setup, teacher, test
    card, mesh = teacher.card, setup.mesh
    classifier = functools.partial(
      evaluate.compile_classifier, mean=card["mean"], std=card["std"], batch_size=c.evaluate.batch_size, mesh=mesh
    )
    self.classify = classifier(nets.deployed(setup.student.net, {})[0])
    with working("measuring the teacher"):
      self.teacher_predictions = classifier(nets.deployed(teacher.net, {})[0])(teacher.variables, test.images)
      self.teacher_accuracy = float(evaluate.share_equal(self.teacher_predictions, test.labels))
    self.sampler = evaluate.compile_sampler(setup, c.evaluate.samples_per_class) if setup.generator else None
    self.key = replicate(streams.key(streams.root(c.seed), Stream.SAMPLE_SHEET), mesh)

  def student(self, state: State) -> Tree:
    """The student's variables as they are saved."""
    return nets.deployed(self.setup.student.net, state.student.variables)[1]

  def __call__(self, state: State) -> dict[str, jax.Array]:
    predictions = self.classify(self.student(state), self.test.images)
    scores = {
      "accuracy": evaluate.share_equal(predictions, self.test.labels),
      "agreement": evaluate.share_equal(predictions, self.teacher_predictions),
    }
    if self.sampler and self.setup.method.noise.labelled:
      scores[self.setup.method.fidelity] = jnp.mean(self.sampler(state, self.teacher.variables, self.key)[1])
    return scores

  def sheet(self, state: State) -> tuple[Any, Any] | None:
    """(samples of every class, their fidelity (C,)), or None where nothing is generated."""
    return jax.device_get(self.sampler(state, self.teacher.variables, self.key)) if self.sampler else None

  def headline(self, state: State) -> str:
    c, teacher = self.c, self.teacher
    sizes = [nets.count_parameters(v["params"]) for v in (teacher.variables, self.student(state))]
    return (
      f"{c.arm}: {teacher.card['net']} ({sizes[0]:,} parameters, accuracy {self.teacher_accuracy:.4f}) ->"
      f" {c.student.net} ({sizes[1]:,} parameters)"
    )
