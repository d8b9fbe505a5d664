"""What methods that invert remember: an image pool and a bank, arrays of fixed size on the device, filled in turn.

Both hold whole batches in slots, (slots, batch, ...), and count the batches that came; the newest replaces the oldest.
Devices share a batch, not the slots, so that a batch is stored where it was made.
"""

import jax
import jax.numpy as jnp
from flax import struct

from cpsc_jax.mesh import axis_sharding, replicated
from cpsc_jax.state import Tree

BATCH_AXIS = 1  # of every array of a pool


@struct.dataclass
class Pool:
  """Batches of samples.

  Attributes:
    arrays: {name: (slots, batch, ...)}.
    count: batches that were added so far, () int32.
  """

  arrays: dict[str, jax.Array]
  count: jax.Array

  @property
  def slots(self) -> int:
    return next(iter(self.arrays.values())).shape[0]

  @property
  def batch(self) -> int:
    return next(iter(self.arrays.values())).shape[BATCH_AXIS]


def empty(slots: int, batch: int, **shapes: tuple[tuple[int, ...], jnp.dtype]) -> Pool:
  """A pool without anything in it; `shapes` is {name: (shape of one sample, dtype)}."""
  arrays = {name: jnp.zeros((slots, batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}
  return Pool(arrays, jnp.zeros((), jnp.int32))


def add(pool: Pool, **batch: jax.Array) -> Pool:
  """The pool with one more batch in it, given as {name: (batch, ...)}."""
  slot = pool.count % pool.slots
  arrays = {
    name: jax.lax.dynamic_update_index_in_dim(array, batch[name], slot, 0) for name, array in pool.arrays.items()
  }
  return Pool(arrays, pool.count + 1)


def draw(pool: Pool, key: jax.Array, number: int) -> dict[str, jax.Array]:
  """`number` samples drawn evenly from what is in the pool, with replacement: {name: (number, ...)}."""
  key_slot, key_row = jax.random.split(key)
  slot = jax.random.randint(key_slot, (number,), 0, jnp.clip(pool.count, 1, pool.slots))
  row = jax.random.randint(key_row, (number,), 0, pool.batch)
  return {name: array[slot, row] for name, array in pool.arrays.items()}


def draw_without_replacement(pool: Pool, key: jax.Array, number: int) -> tuple[dict[str, jax.Array], jax.Array]:
  """({name: (number, ...)}, which of them really are samples of the pool (number,))."""
  order = jnp.where(filled(pool).reshape(-1), jax.random.uniform(key, (pool.slots * pool.batch,)), -1.0)
  value, index = jax.lax.top_k(order, number)
  return {name: array.reshape(-1, *array.shape[2:])[index] for name, array in pool.arrays.items()}, value >= 0


def filled(pool: Pool) -> jax.Array:
  """Which places hold a sample: (slots, batch) bool."""
  return jnp.broadcast_to(jnp.arange(pool.slots)[:, None] < pool.count, (pool.slots, pool.batch))


def sharding(mesh: jax.sharding.Mesh) -> Tree:
  """Where the parts of a pool lie, as a tree of shardings: every batch is split over the devices."""
  return Pool(axis_sharding(mesh, BATCH_AXIS), replicated(mesh))
