"""The pool: it fills up, replaces the oldest batch, and gives only what is in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpsc_jax import pool


def filled_with(batches, slots=3, batch=4):
  held = pool.empty(slots, batch, x=((2,), jnp.float32), y=((), jnp.int32))
  for number in range(1, batches + 1):
    held = pool.add(held, x=jnp.full((batch, 2), number, jnp.float32), y=jnp.arange(batch) + 10 * number)
  return held


@pytest.mark.parametrize(("batches", "kept"), [(0, []), (1, [1]), (3, [1, 2, 3]), (5, [3, 4, 5])])
def test_holds_the_newest(batches, kept):
  held = filled_with(batches)
  assert int(held.count) == batches
  present = np.asarray(pool.filled(held))
  assert sorted(set(np.asarray(held.arrays["x"])[present][:, 0].tolist())) == kept and present.sum() == 4 * len(kept)


def test_draws_evenly_and_keeps_rows_together():
  held = filled_with(2)
  drawn = pool.draw(held, jax.random.key(0), 8000)
  assert np.array_equal(np.asarray(drawn["y"]) // 10, np.asarray(drawn["x"])[:, 0])
  values, counts = np.unique(drawn["y"], return_counts=True)
  assert values.tolist() == [10, 11, 12, 13, 20, 21, 22, 23] and np.all(np.abs(counts - 1000) < 200)


@pytest.mark.parametrize(("batches", "number", "real"), [(0, 5, 0), (1, 6, 4), (2, 6, 6), (4, 12, 12)])
def test_draws_without_replacement(batches, number, real):
  drawn, present = pool.draw_without_replacement(filled_with(batches), jax.random.key(1), number)
  assert int(present.sum()) == real and len(set(np.asarray(drawn["y"])[np.asarray(present)].tolist())) == real


def test_one_program_however_full_it_is():
  add = jax.jit(pool.add)
  held = filled_with(0)
  for _ in range(7):
    held = add(held, x=jnp.ones((4, 2)), y=jnp.zeros(4, jnp.int32))
  assert add._cache_size() == 1 and int(held.count) == 7
