"""Accuracy, agreement and sample diagnostics, each computed in one compiled program."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cpsc_jax import datasets, streams
from cpsc_jax.mesh import batch_sharding, replicated
from cpsc_jax.setup import Setup
from cpsc_jax.state import State, Tree
from cpsc_jax.streams import Stream


def compile_classifier(
  net: Any, mean: Sequence[float], std: Sequence[float], batch_size: int, mesh: jax.sharding.Mesh
) -> Callable[[Tree, jax.Array], jax.Array]:
  """(variables, images (N, H, W, K) uint8) -> predicted labels (N,) int32, for every image exactly once.

  Images pass through the net `batch_size` at a time, split over the devices; what fills up the last batch is cut off
  again.
  """
  batch_size = -(-batch_size // mesh.size) * mesh.size

  def classify(variables: Tree, images: jax.Array) -> jax.Array:
    count = images.shape[0]
    batch = min(batch_size, -(-count // mesh.size) * mesh.size)
    filled = jnp.pad(images, ((0, -count % batch), (0, 0), (0, 0), (0, 0)))

    def predict(batch_images: jax.Array) -> jax.Array:
      batch_images = jax.lax.with_sharding_constraint(batch_images, batch_sharding(mesh))
      x = datasets.normalise(batch_images, mean, std)
      return jnp.argmax(net.apply(variables, x, train=False).logits, axis=-1)

    predictions = jax.lax.map(predict, filled.reshape(-1, batch, *images.shape[1:]))
    return predictions.reshape(-1)[:count].astype(jnp.int32)

  return jax.jit(classify, out_shardings=replicated(mesh))


def share_equal(a: jax.Array, b: jax.Array) -> jax.Array:
  """The fraction of positions at which two label vectors are equal, ()."""
  return jnp.mean((a == b).astype(jnp.float32))


def compile_sampler(setup: Setup, per_class: int) -> Callable[[State, Tree, jax.Array], tuple[jax.Array, jax.Array]]:
  """(state, teacher variables, key) -> (images, fidelity): up to `per_class` samples of every class.

  images are (C, per_class, H, W, K) in normalised space, 0 where the pool of a method has fewer. fidelity (C,) is the
  share of each class's samples to which the teacher gives the class that was asked for.
  """

  def sample(state: State, teacher: Tree, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    def of_class(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
      key, label = inputs
      images, exist = setup.method.samples(state, key, label, per_class)
      predicted = jnp.argmax(setup.teacher.apply(teacher, images, train=False).logits, axis=-1)
      fidelity = jnp.sum(exist & (predicted == label)) / jnp.maximum(jnp.sum(exist), 1)
      return images, fidelity

    number = setup.method.noise.num_labels
    return jax.lax.map(of_class, (streams.keys(key, Stream.LATENTS, number), jnp.arange(number)))

  return jax.jit(sample, out_shardings=replicated(setup.mesh))
