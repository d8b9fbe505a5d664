"""What methods that invert remember: an image pool and a bank, arrays of fixed size on the device, filled in turns.

Both hold whole batches in slots, (slots, batch, ...), and count the batches that came; the newest replaces the oldest.
Devices share a batch, not the slots, so that a batch is stored where it was made.
"""

import jax
import jax.numpy as jnp

BATCH_AXIS = 1  # of every array of a pool but its counter


def empty(slots, batch, **shapes):
  """A pool without anything in it; `shapes` is {name: (shape of one entry, dtype)}."""
  arrays = {name: jnp.zeros((slots, batch, *shape), dtype) for name, (shape, dtype) in shapes.items()}
  return {**arrays, "count": jnp.zeros((), jnp.int32)}


def add(pool, **batch):
  """The pool with one more batch in it, given as {name: (batch, ...)}."""
  slot = pool["count"] % next(iter(_arrays(pool).values())).shape[0]
  put = lambda name, array: jax.lax.dynamic_update_index_in_dim(array, batch[name], slot, 0)
  return {**{name: put(name, array) for name, array in _arrays(pool).items()}, "count": pool["count"] + 1}


def draw(pool, key, number):
  """`number` entries drawn evenly from what is in the pool, with replacement: {name: (number, ...)}."""
  arrays = _arrays(pool)
  slots, batch = next(iter(arrays.values())).shape[:2]
  key_slot, key_row = jax.random.split(key)
  slot = jax.random.randint(key_slot, (number,), 0, jnp.clip(pool["count"], 1, slots))
  row = jax.random.randint(key_row, (number,), 0, batch)
  return {name: array[slot, row] for name, array in arrays.items()}


def draw_apart(pool, key, number):
  """As `draw` but without replacement: ({name: (number, ...)}, which of them are really in the pool (number,))."""
  arrays = _arrays(pool)
  slots, batch = next(iter(arrays.values())).shape[:2]
  order = jnp.where(filled(pool).reshape(-1), jax.random.uniform(key, (slots * batch,)), -1.0)
  value, index = jax.lax.top_k(order, number)
  return {name: array.reshape(-1, *array.shape[2:])[index] for name, array in arrays.items()}, value >= 0


def filled(pool):
  """Which places hold something: (slots, batch) bool."""
  slots, batch = next(iter(_arrays(pool).values())).shape[:2]
  return jnp.broadcast_to(jnp.arange(slots)[:, None] < pool["count"], (slots, batch))


def _arrays(pool):
  return {name: array for name, array in pool.items() if name != "count"}
