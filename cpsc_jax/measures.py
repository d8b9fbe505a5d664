"""What is measured of a run after an epoch and at its end."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import datasets, diagnostics, evaluate, examine, experiment, nets, sources, streams
from cpsc_jax.config import Config
from cpsc_jax.datasets import Split
from cpsc_jax.mesh import replicate
from cpsc_jax.progress import working
from cpsc_jax.setup import Setup
from cpsc_jax.state import State, Tree
from cpsc_jax.streams import Stream
from cpsc_jax.teach import Teacher


class Programs:
  """The compiled programs by which a run is measured. Runs that differ in their numbers alone can share them."""

  def __init__(self, c: Config, setup: Setup, teacher: Any, card: dict, image_shape: tuple[int, int, int]):
    """`teacher` is its module, `card` its card."""
    self.c, self.setup, self.card = c, setup, card
    self.known = card["num_classes"]  # by the teacher, of `classes` in all
    self.classes = nets.output_shapes(setup.student.net, image_shape).logits.shape[-1]
    classifier = functools.partial(
      evaluate.compile_classifier, mean=card["mean"], std=card["std"], batch_size=c.evaluate.batch_size, mesh=setup.mesh
    )
    self.classify = classifier(nets.deployed(setup.student.net, {})[0])
    self.teach = classifier(nets.deployed(teacher, {})[0], features=True)
    self.sampler = evaluate.compile_sampler(setup, c.evaluate.samples_per_class) if setup.generator else None
    self.labelled = bool(self.sampler) and setup.method.noise.labelled

  def _once(self, function: Any) -> Any:
    return examine.once(function, self.setup.mesh)

  @functools.cached_property
  def some(self) -> Any:
    """Features (N, D) of at most diagnostics.LARGEST_SET of N images."""

    def rows(features: jax.Array) -> jax.Array:
      number = len(features)
      return features[np.linspace(0, number - 1, min(number, diagnostics.LARGEST_SET)).astype(int)]

    return self._once(rows)

  @functools.cached_property
  def fidelity(self) -> Any:
    """Fidelity per class (C,), NaN of a class without a sample, and its mean, in which that counts as 0."""

    def of_samples(predicted: jax.Array, exist: jax.Array) -> tuple[jax.Array, jax.Array]:
      per_class = diagnostics.fidelity(predicted, exist)
      return per_class, jnp.mean(jnp.nan_to_num(per_class))

    return self._once(of_samples)

  @functools.cached_property
  def probes(self) -> Any:
    return self._once(examine.probes)

  @functools.cached_property
  def pictures(self) -> Any:
    card, (rows, columns) = self.card, examine.GRID
    return self._once(lambda images: sources.stored(images[:rows, :columns], "uint8", card["mean"], card["std"]))

  @functools.cached_property
  def of_student(self) -> Any:
    return self._once(functools.partial(examine.of_student, num_classes=self.classes))

  @functools.cached_property
  def of_samples(self) -> Any:
    net = nets.deployed(self.setup.student.net, {})[0]
    fixed = {"net": net, "num_classes": self.known, "labelled": self.labelled}
    return self._once(functools.partial(examine.of_samples, **fixed))

  @functools.cached_property
  def of_terms(self) -> Any:
    return examine.compile_terms(self.setup)

  @functools.cached_property
  def rates(self) -> Any:
    return self._once(functools.partial(experiment.learning_rates, self.c))


class Measures:
  """What is measured of a state.

  Called, it gives the student's accuracy, its agreement with the teacher, the samples' fidelity and, of a long-tailed
  training split, the accuracy on the classes of each third of it, "head_accuracy" and so on; `diagnose` gives
  everything that `cpsc_jax.examine` finds, some of it from what the call before it saw of the same state.
  """

  def __init__(
    self,
    c: Config,
    setup: Setup,
    teacher: Teacher,
    test: Split,
    programs: Programs | None = None,
    images_per_class: Sequence[int] | None = None,
  ):
    """Measures the teacher.

    Args:
      programs: those of a run with the same nets, method and data; None: its own.
      images_per_class: of a long-tailed training split, (C,); None: there is none.
    """
    self.c, self.setup, self.teacher, self.test = c, setup, teacher, test
    self.programs = programs or Programs(c, setup, teacher.net, teacher.card, test.images.shape[1:])
    mesh = setup.mesh
    with working("measuring the teacher"):
      seen = self.programs.teach(teacher.variables, test.images)
      self.real = seen.features if seen.features is None else self.programs.some(seen.features)
      self.of_teacher = seen._replace(features=None)
      self.teacher_accuracy = float(evaluate.share_equal(seen.labels, test.labels, test.labels < self.programs.known))
    self.images_per_class = list(images_per_class or ())
    self.thirds = datasets.thirds(images_per_class) if images_per_class else {}
    if not all(np.isin(test.labels, of).any() for of in self.thirds.values()):
      self.thirds = {}  # no test images to measure one of them by
    self._of_third = {name: jnp.isin(test.labels, jnp.asarray(of)) for name, of in self.thirds.items()}
    root = streams.root(c.seed)
    self.key = replicate(streams.key(root, Stream.SAMPLE_SHEET), mesh)
    self.diagnosis_key = replicate(streams.key(root, Stream.DIAGNOSIS), mesh)
    self.probe_key = replicate(streams.key(root, Stream.PROBES), mesh)
    self.seen: tuple[Any, ...] = (None,)  # the step counter of a state, and what `_look` found of that state

  def student(self, state: State) -> Tree:
    """The student's variables as they are saved."""
    return nets.deployed(self.setup.student.net, state.student.variables)[1]

  def __call__(self, state: State) -> dict[str, jax.Array]:
    predictions, _, fidelity = self._look(state)
    scores = {
      "accuracy": evaluate.share_equal(predictions.labels, self.test.labels),
      "agreement": evaluate.share_equal(predictions.labels, self.of_teacher.labels),
    }
    if self.programs.labelled:
      scores[self.setup.method.fidelity] = fidelity[1]
    return scores | {f"{name}_accuracy": share for name, share in self._by_third(predictions.labels).items()}

  def _by_third(self, predicted: jax.Array) -> dict[str, jax.Array]:
    """{"head", "middle", "tail"}: the accuracy () of predictions (N,) on the test images of these classes."""
    return {name: evaluate.share_equal(predicted, self.test.labels, where) for name, where in self._of_third.items()}

  def long_tail(self) -> dict[str, Any] | None:
    """What is known of a long tail before training: its images, its thirds, and the teacher's accuracy on these."""
    if not self.thirds:
      return None
    teacher = {name: float(share) for name, share in self._by_third(self.of_teacher.labels).items()}
    return {"images_per_class": self.images_per_class, "classes": self.thirds, "teacher": teacher}

  def diagnose(self, state: State, epoch: int) -> dict[str, Any]:
    """{name: array} of everything that `cpsc_jax.examine` finds after an epoch; absent is what does not apply."""
    predictions, samples, fidelity = self._look(state)
    probes, taught = self._probes
    probed = self.programs.classify(self.student(state), probes).labels
    found = self.programs.of_student(predictions, self.of_teacher, self.test.labels, probed, taught)
    if samples:
      if self.programs.labelled:
        found["fidelity_per_class"] = fidelity[0]
        if state.prior is not None:
          found["label_shares"] = jnp.copy(state.prior.shares)  # the next epoch consumes the state
      found |= self.programs.of_samples(self.student(state), samples, self.real)
      found["grid"] = self.programs.pictures(samples.images)
      if self.c.evaluate.gradients:
        found |= self.programs.of_terms(
          state, self.teacher.variables, streams.nth(self.diagnosis_key, Stream.TERMS, epoch)
        )
    rates = self.programs.rates(np.int32(epoch), state.hyper)
    return found | {f"{player}_learning_rate": rate for player, rate in rates.items()}

  def sheet(self, state: State) -> tuple[Any, Any] | None:
    """(samples of every class, their fidelity (C,)), or None where nothing is generated."""
    if not self.programs.sampler:
      return None
    samples = self.programs.sampler(state, self.teacher.variables, self.key)
    per_class, _ = self.programs.fidelity(samples.teacher.labels, samples.exist)
    images, per_class = jax.device_get((samples.images, per_class))
    return images, np.nan_to_num(per_class)

  def headline(self, state: State) -> str:
    c, teacher = self.c, self.teacher
    sizes = [nets.count_parameters(v["params"]) for v in (teacher.variables, self.student(state))]
    return (
      f"{c.arm}: {teacher.card['net']} ({sizes[0]:,} parameters, accuracy {self.teacher_accuracy:.4f}) ->"
      f" {c.student.net} ({sizes[1]:,} parameters)"
    )

  def _look(self, state: State) -> tuple[evaluate.Predictions, evaluate.Samples | None, tuple | None]:
    """What the student says of the test images; some samples, and the `_fidelity` of all."""
    if self.seen[0] is not state.step:
      predictions, samples, fidelity = self.programs.classify(self.student(state), self.test.images), None, None
      if self.programs.sampler:
        samples = self.programs.sampler(state, self.teacher.variables, self.key)
        fidelity = self.programs.fidelity(samples.teacher.labels, samples.exist)
        samples = examine.some(samples)
      self.seen = state.step, predictions, samples, fidelity
    return self.seen[1:]

  @functools.cached_property
  def _probes(self) -> tuple[jax.Array, jax.Array]:
    """The probes of the run, and what the teacher says of them."""
    images = self.programs.probes(self.probe_key, self.test.images)
    return images, self.programs.teach(self.teacher.variables, images).labels
