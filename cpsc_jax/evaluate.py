"""Accuracy, agreement and sample diagnostics, each computed in one compiled program."""

import jax
import jax.numpy as jnp

from cpsc_jax import datasets, nets, pool
from cpsc_jax.mesh import batch_sharding, replicated


def compile_classifier(net, mean, std, batch_size, mesh):
  """(variables, images (N, H, W, K) uint8) -> predicted labels (N,) int32, for every image exactly once.

  Images pass through the net `batch_size` at a time, split over the devices; what fills the last batch is cut off
  again.
  """
  batch_size = -(-batch_size // mesh.size) * mesh.size

  def classify(variables, images):
    count = images.shape[0]
    batch = min(batch_size, -(-count // mesh.size) * mesh.size)
    filled = jnp.pad(images, ((0, -count % batch), (0, 0), (0, 0), (0, 0)))

    def predict(batch_images):
      batch_images = jax.lax.with_sharding_constraint(batch_images, batch_sharding(mesh))
      x = datasets.normalise(batch_images, mean, std)
      return jnp.argmax(net.apply(variables, x, train=False).logits, axis=-1)

    predictions = jax.lax.map(predict, filled.reshape(-1, batch, *images.shape[1:]))
    return predictions.reshape(-1)[:count].astype(jnp.int32)

  return jax.jit(classify, out_shardings=replicated(mesh))


def share_equal(a, b):
  """The fraction of positions at which two label vectors are equal, ()."""
  return jnp.mean((a == b).astype(jnp.float32))


def compile_sampler(game, per_class):
  """(state, teacher variables, key) -> (images, fidelity): `per_class` samples of every class, and what they are worth.

  They are drawn by the generator in evaluation mode or, where the method inverts, from the pool; images are (C,
  per_class, H, W, K) in normalised space, blank where the pool has fewer. fidelity (C,) is the share of each class's
  samples to which the teacher gives the class asked for.
  """
  labels = jnp.arange(game.num_labels)
  classify = lambda teacher, x: jnp.argmax(game.teacher.apply(teacher, x, train=False).logits, axis=-1)

  def fresh(state, teacher, key):
    y = jnp.repeat(labels, per_class)
    z = jax.random.normal(key, (y.size, game.latent_dim))

    def batch(zy):
      x, _ = nets.forward(game.generator, state.generator.variables, *zy, train=False)
      return x, classify(teacher, x)

    rows = lambda a: a.reshape(game.num_labels, per_class, *a.shape[1:])
    images, seen = jax.lax.map(batch, (rows(z), rows(y)))
    return images, jnp.mean((seen == rows(y)).astype(jnp.float32), axis=1)

  def pooled(state, teacher, key):
    held = state.memory["pool"]
    number = min(per_class, game.pool_slots * game.pool_batch)
    chance = jax.random.uniform(key, held["labels"].shape)

    def of_class(label):
      ours = pool.filled(held) & (held["labels"] == label)
      value, place = jax.lax.top_k(jnp.where(ours, chance, -1.0).reshape(-1), number)
      x = held["images"][jnp.unravel_index(place, chance.shape)]
      there = value >= 0
      right = jnp.sum(there & (classify(teacher, x) == label)) / jnp.maximum(jnp.sum(there), 1)
      return jnp.where(there[:, None, None, None], x, 0.0), right

    return jax.lax.map(of_class, labels)

  return jax.jit(pooled if game.method.inverts else fresh, out_shardings=replicated(game.mesh))
