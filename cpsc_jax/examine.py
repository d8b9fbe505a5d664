"""Diagnoses of a state: compiled programs that draw what `cpsc_jax.diagnostics` looks at, and name what it finds.

A diagnosis changes nothing: it draws from random streams of its own, so that a run ends the same with and without.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cpsc_jax import algorithm, diagnostics, gradients
from cpsc_jax.evaluate import Predictions, Samples, predictions
from cpsc_jax.mesh import replicated
from cpsc_jax.setup import Setup
from cpsc_jax.state import State, Tree

Arrays = dict[str, jax.Array]

PROBES = ("noise", "grain", "blur", "contrast")
GRID = 20, 4  # classes of which samples are kept with a diagnosis, and how many of each


def once(function: Callable, mesh: jax.sharding.Mesh, **options: Any) -> Callable:
  """`function` as a program that runs now and then: on CPUs most of its time would go into LLVM's optimisation."""
  on_cpu = mesh.devices.flat[0].platform == "cpu"
  compiler_options = {"xla_backend_optimization_level": 0} if on_cpu else None
  return jax.jit(function, out_shardings=replicated(mesh), compiler_options=compiler_options, **options)


def probes(key: jax.Array, images: jax.Array) -> jax.Array:
  """Images on which nets are asked whether they agree: as many as test images (N, H, W, K) uint8, of PROBES in turn.

  Row i is of kind i % 4: uniform noise; the image with Gaussian noise of deviation 0.1; the mean of each pixel and its
  neighbours; half of the contrast (kinds of Hendrycks & Dietterich, ICLR 2019, at one strength).
  """
  key_noise, key_grain = jax.random.split(key)
  pixels = images / 255.0
  padded = jnp.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
  height, width = images.shape[1:3]
  blurred = sum(padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9
  centre = jnp.mean(pixels, axis=(1, 2, 3), keepdims=True)
  kinds = (
    jax.random.uniform(key_noise, images.shape),
    pixels + 0.1 * jax.random.normal(key_grain, images.shape),
    blurred,
    centre + 0.5 * (pixels - centre),
  )
  chosen = jnp.select([(jnp.arange(len(images)) % len(kinds) == i)[:, None, None, None] for i in range(4)], kinds)
  return jnp.round(255 * jnp.clip(chosen, 0, 1)).astype(jnp.uint8)


def of_student(
  student: Predictions, teacher: Predictions, labels: jax.Array, probed: jax.Array, taught: jax.Array, num_classes: int
) -> Arrays:
  """What the student is like on test images, and on `probes`, where it gives `probed` (N,) and the teacher `taught`."""
  correct = student.labels == labels
  curve = diagnostics.reliability(student.confidence, correct)
  kinds = jnp.arange(len(probed)) % len(PROBES)
  agreed = student.labels == teacher.labels
  return {
    "accuracy_per_class": diagnostics.share_per_class(labels, correct, num_classes),
    "teacher_accuracy_per_class": diagnostics.share_per_class(labels, teacher.labels == labels, num_classes),
    "agreement_per_class": diagnostics.share_per_class(labels, agreed, num_classes),
    "images_per_class": jnp.bincount(labels, length=num_classes),
    "confusion": diagnostics.confusion(labels, student.labels, num_classes),
    **{f"reliability_{name}": values for name, values in curve.items()},
    "calibration_error": diagnostics.calibration_error(curve),
    "teacher_calibration_error": diagnostics.calibration_error(
      diagnostics.reliability(teacher.confidence, teacher.labels == labels)
    ),
    "student_confidence": jnp.mean(student.confidence),
    **{f"agreement_on_{kind}": share for kind, share in zip(PROBES, _agreement(kinds, probed == taught), strict=True)},
  }


def _agreement(kinds: jax.Array, agreed: jax.Array) -> jax.Array:
  return diagnostics.share_per_class(kinds, agreed, len(PROBES))


def some(samples: Samples) -> Samples:
  """The first few samples of each class, at most diagnostics.LARGEST_SET in all, or two of each."""
  number, size = samples.exist.shape
  few = max(min(size, diagnostics.LARGEST_SET // number), 2)
  return samples if few >= size else jax.tree.map(lambda x: x[:, :few], samples)


def of_samples(
  student: Tree, samples: Samples, real: jax.Array | None, net: Any, num_classes: int, labelled: bool
) -> Arrays:
  """What `some` samples of a generator or of a pool are like, alone and beside the features (m, D) of real images.

  Args:
    student: its variables, for `net`.
    samples: of every class.
    real: None where nothing but the teacher's logits is known.
    labelled: whether the classes were asked for; else samples are told apart by nothing.
  """
  ours = jax.lax.map(lambda images: predictions(net.apply(student, images, train=False)).labels, samples.images)
  teacher, exist = samples.teacher, samples.exist
  shares = diagnostics.class_shares(teacher.labels, exist, num_classes)
  found = {
    "samples": jnp.sum(exist),
    "confidence": diagnostics.masked_mean(teacher.confidence, exist),
    "class_shares": shares,
    "class_balance": diagnostics.balance(shares),
    "student_mistakes": diagnostics.masked_mean(ours != teacher.labels, exist),
  }
  if labelled:
    found["confidence_per_class"] = diagnostics.masked_mean(teacher.confidence, exist, axis=1)
  if real is None or teacher.features is None:
    return found
  features = teacher.features
  if labelled:
    apart = diagnostics.class_distances(features, exist)
    found["class_distances"] = apart
    found["distance_within"], found["distance_between"] = diagnostics.within_and_between(apart)
    found["vendi_score_per_class"] = jax.lax.map(lambda of: diagnostics.vendi_score(*of), (features, exist))
  flat, there = features.reshape(-1, features.shape[-1]), exist.reshape(-1)
  whole = jnp.ones(len(real), bool)
  apart = jnp.where(jnp.eye(len(flat), dtype=bool), 0.0, diagnostics.distances(flat, flat))
  pairs = there[:, None] & there & ~jnp.eye(len(flat), dtype=bool)
  return {
    **found,
    "distance": diagnostics.masked_mean(apart, pairs),
    "vendi_score": diagnostics.vendi_score(flat, there),
    "real_vendi_score": diagnostics.vendi_score(real, whole),
    "effective_rank": diagnostics.effective_rank(flat, there),
    "real_effective_rank": diagnostics.effective_rank(real, whole),
    "frechet_distance": diagnostics.frechet_distance(real, flat, there),
    **diagnostics.manifold_overlap(real, flat, there),
  }


def compile_terms(setup: Setup) -> Callable[[State, Tree, jax.Array], Arrays]:
  """(state, teacher variables, key) -> the generator's terms on one of its batches, and how they pull at its images.

  {"term_value", "term_weighted" (T,): each term, and times its weight; "term_gradient", "term_weighted_gradient" (T,):
  the norm of its gradient with respect to the images as the generator draws them; "term_cosine" (T, T): the cosines
  between these gradients, -1 where two terms undo each other; "norm_distance": of the teacher's layers}, without the
  last where there are no statistics. T terms in the order of `Method.generator_terms`.
  """
  method, policy = setup.method, setup.generator.policy
  names = list(method.generator_terms)

  def of_batch(state: State, teacher: Tree, key: jax.Array) -> Arrays:
    z, y = method.draw(state, key)
    size = len(y) // policy.micro_batches
    params = {"generator": state.generator.params, **{name: part.params for name, part in state.trained.items()}}
    if policy.micro_batches > 1:
      z, y = z[:size], y[:size]
    images, y, _ = algorithm.generated(setup, params, state.generator.batch_stats, z, y)
    trained = {name: part for name, part in params.items() if name != "generator"}

    def terms(images: jax.Array) -> tuple[jax.Array, Arrays]:
      view, _ = algorithm.view_of(setup, teacher, state, images, y, trained, state.student.batch_stats, key)
      values = jnp.stack([jnp.mean(method.generator_terms[name].value(view)) for name in names])
      statistics = view.teacher.statistics
      return values, {"norm_distance": diagnostics.norm_distances(statistics)} if statistics else {}

    if policy.rematerialise:
      terms = gradients.rematerialised(terms)
    values, pull_back, seen = jax.vjp(terms, images, has_aux=True)
    scale = 1.0 if state.generator.loss_scale is None else state.generator.loss_scale.scale
    pulls = jax.lax.map(
      lambda one: pull_back(one)[0].reshape(-1) / scale, scale * jnp.eye(len(names), dtype=values.dtype)
    )
    norms, cosine = diagnostics.cosines(jnp.matmul(pulls, pulls.T, precision=jax.lax.Precision.HIGHEST))
    weights = jnp.stack([state.hyper.generator.terms[name] for name in names])
    return {
      "term_value": values,
      "term_weighted": weights * values,
      "term_gradient": norms,
      "term_weighted_gradient": weights * norms,
      "term_cosine": cosine,
      **seen,
    }

  return once(of_batch, setup.mesh)
