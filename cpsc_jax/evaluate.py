"""What classifiers say of images and of samples, each computed in one compiled program."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpsc_jax import datasets, streams
from cpsc_jax.mesh import batch_sharding, replicated
from cpsc_jax.setup import Setup
from cpsc_jax.state import Output, State, Tree, at_least_float32
from cpsc_jax.streams import Stream


class Predictions(NamedTuple):
  """What a classifier says of images.

  Attributes:
    labels: (..., N) int32, the classes.
    confidence: (..., N), their probabilities.
    features: (..., N, D), the input of the last linear layer; None where it is not asked for or the net has none.
  """

  labels: jax.Array
  confidence: jax.Array
  features: jax.Array | None = None


class Samples(NamedTuple):
  """Samples of every class, and what the teacher says of them.

  Attributes:
    images: (C, n, H, W, K) in normalised space, 0 where the pool of a method has fewer than n.
    exist: (C, n), whether it has them.
    teacher: its `Predictions`, (C, n).
  """

  images: jax.Array
  exist: jax.Array
  teacher: Predictions


def predictions(output: Output, with_features: bool = False) -> Predictions:
  """What a classifier's `Output` says."""
  features = (output.features if output.pooled is None else output.pooled) if with_features else None
  labels = jnp.argmax(output.logits, axis=-1).astype(jnp.int32)
  confidence = jnp.max(jax.nn.softmax(at_least_float32(output.logits)), axis=-1)
  return Predictions(labels, confidence, None if features is None else at_least_float32(features))


def compile_classifier(
  net: Any,
  mean: Sequence[float],
  std: Sequence[float],
  batch_size: int,
  mesh: jax.sharding.Mesh,
  features: bool = False,
) -> Callable[[Tree, jax.Array], Predictions]:
  """(variables, images (N, H, W, K) uint8) -> `Predictions` (N,), for every image exactly once.

  Images pass through the net `batch_size` at a time, split over the devices; what fills up the last batch is cut off
  again. `features` says whether these are wanted too.
  """
  batch_size = -(-batch_size // mesh.size) * mesh.size

  def classify(variables: Tree, images: jax.Array) -> Predictions:
    count = images.shape[0]
    batch = min(batch_size, -(-count // mesh.size) * mesh.size)
    filled = jnp.pad(images, ((0, -count % batch), (0, 0), (0, 0), (0, 0)))

    def predict(batch_images: jax.Array) -> Predictions:
      batch_images = jax.lax.with_sharding_constraint(batch_images, batch_sharding(mesh))
      x = datasets.normalise(batch_images, mean, std)
      return predictions(net.apply(variables, x, train=False), features)

    found = jax.lax.map(predict, filled.reshape(-1, batch, *images.shape[1:]))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)

  return jax.jit(classify, out_shardings=replicated(mesh))


def share_equal(a: jax.Array, b: jax.Array, where: jax.Array | None = None) -> jax.Array:
  """The fraction of positions at which two label vectors are equal, (), of those `where` a third (N,) is true."""
  return jnp.mean((a == b).astype(jnp.float32), where=where)


def compile_sampler(setup: Setup, per_class: int) -> Callable[[State, Tree, jax.Array], Samples]:
  """(state, teacher variables, key) -> up to `per_class` samples of every class."""

  def sample(state: State, teacher: Tree, key: jax.Array) -> Samples:
    def of_class(inputs: tuple[jax.Array, jax.Array]) -> Samples:
      key, label = inputs
      images, exist = setup.method.samples(state, key, label, per_class)
      output = setup.teacher.apply(teacher, images, train=False)
      return Samples(images, exist, predictions(output, with_features=True))

    number = setup.method.noise.num_labels
    return jax.lax.map(of_class, (streams.keys(key, Stream.LATENTS, number), jnp.arange(number)))

  return jax.jit(sample, out_shardings=replicated(setup.mesh))
