"""Where a student's batches come from: fresh samples, an image pool, real data, and mixtures of these."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import drawn_by

from cpsc_jax import datasets, mesh, nets, pool, sources, streams
from cpsc_jax.setup import Noise
from cpsc_jax.state import State, TrainState, step_counter
from cpsc_jax.streams import Stream

DEVICES = mesh.make_mesh()
NOISE = Noise(latent_dim=6, num_labels=10, labelled=True, mesh=DEVICES)
KEY = jax.random.key(7)
SIZE = 10  # of the training split


def state_with(memory=None, generator=None):
  return State(step_counter(), jax.random.key(0), generator, None, {}, memory, None)


@functools.cache
def generator():
  """(a small generator, a state that has it)."""
  net = nets.generator("cifar", 10, 8, 3, 4)
  variables = nets.init(net, jax.random.key(1), *NOISE.draw(jax.random.key(2), 2))
  return net, state_with(generator=TrainState(variables["params"], variables["batch_stats"], None))


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def same_generator(a, b):
  return equal(a.generator.params, b.generator.params) and equal(a.generator.batch_stats, b.generator.batch_stats)


def filled_pool(batches, batch=4):
  """A pool whose images are all the number of their batch, and whose labels are ten times that and the row."""
  held = pool.empty(3, batch, images=((8, 8, 3), jnp.float32), labels=((), jnp.int32))
  for number in range(1, batches + 1):
    images = jnp.full((batch, 8, 8, 3), 100.0 * number)
    held = pool.add(held, images=images, labels=10 * number + jnp.arange(batch))
  return held


@pytest.fixture
def split():
  """Images that are all the number of their row, and labels that are this number too."""
  images = np.broadcast_to(np.arange(SIZE, dtype=np.uint8)[:, None, None, None], (SIZE, 8, 8, 3))
  return datasets.Split(jnp.asarray(images), jnp.arange(SIZE))


def test_noise_has_uniform_labels_and_normal_latents():
  z, y = NOISE.draw(jax.random.key(0), 20000)
  counts = np.bincount(y, minlength=10)
  assert z.shape == (20000, 6) and y.dtype == jnp.int32
  assert counts.size == 10 and np.all(np.abs(counts - 2000) < 200)
  assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


def test_noise_is_a_stream_of_its_own_for_latents_and_labels():
  """Latents and labels of one key are drawn from two others, neither of which is the key itself."""
  z, y = NOISE.draw(KEY, 50)
  assert np.array_equal(z, jax.random.normal(streams.key(KEY, Stream.LATENTS), (50, 6)))
  assert np.array_equal(y, jax.random.randint(streams.key(KEY, Stream.LABELS), (50,), 0, 10))
  other_z, other_y = NOISE.draw(jax.random.key(8), 50)
  assert not np.array_equal(z, other_z) and not np.array_equal(y, other_y)


@pytest.mark.parametrize("moves", [False, True])
def test_fresh_samples_are_the_generators_normalised_by_their_batch(moves):
  net, state = generator()
  after, x, y = drawn_by(sources.fresh(net, NOISE, 12, move_statistics=moves), state, KEY)
  z, labels = NOISE.draw(KEY, 12)
  want, stats = nets.forward(net, state.generator.variables, z, labels, train=True)
  np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)
  assert x.shape == (12, 8, 8, 3) and np.array_equal(y, labels)
  if not moves:
    assert same_generator(after, state)
    return
  assert equal(after.generator.params, state.generator.params)
  for ours, theirs in zip(jax.tree.leaves(after.generator.batch_stats), jax.tree.leaves(stats), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
  assert not equal(after.generator.batch_stats, state.generator.batch_stats)


def test_nothing_is_differentiated_through_fresh_samples():
  net, state = generator()

  def total(params):
    given = state.replace(generator=state.generator.replace(params=params))
    return jnp.sum(sources.fresh(net, NOISE, 4)(given, KEY, None)[1].images)

  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(state.generator.params)))


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_pooled_images_come_from_the_pool_with_their_labels(batches):
  state = state_with({"pool": filled_pool(batches)})
  after, x, y = drawn_by(sources.pooled(400, DEVICES), state, KEY)
  assert equal(after.memory, state.memory)
  assert x.shape == (400, 8, 8, 3) and np.ptp(np.asarray(x), axis=(1, 2, 3)).max() == 0
  assert np.array_equal(np.asarray(x)[:, 0, 0, 0] / 100, np.asarray(y) // 10), "images keep their labels"
  kept = range(max(1, batches - 2), batches + 1)
  assert set(np.asarray(y).tolist()) == {10 * number + row for number in kept for row in range(4)}
  _, _, others = drawn_by(sources.pooled(400, DEVICES), state, jax.random.key(8))
  assert not np.array_equal(y, others)


def real_batches(split, batch, steps, state=None, epoch=0):
  """(state, rows of each batch) of one epoch on the split, from its start or from a state within it."""
  source = jax.jit(sources.real(batch, (0.1, 0.2, 0.3), (0.5, 0.25, 1.0), DEVICES))
  if state is None:
    memory = sources.empty_order(batch * 5)
    state = sources.shuffle(state_with(memory), jax.random.fold_in(KEY, epoch), SIZE)
  rows = []
  for _ in range(steps):
    state, batch = source(state, KEY, split)
    x, y = batch.images, batch.labels
    want = (split.images[y] / 255.0 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 1.0])
    np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)
    rows.append(np.asarray(y).tolist())
  return state, rows


def test_an_epoch_on_real_data_is_whole_permutations(split):
  """Five batches of 4 out of 10 images: two permutations, each without repetition, in new orders."""
  state, rows = real_batches(split, 4, 5)
  order = sum(rows, [])
  first, second = order[:SIZE], order[SIZE:]
  assert sorted(first) == sorted(second) == list(range(SIZE)) and first != second
  assert int(state.memory["position"]) == 20 and np.array_equal(state.memory["order"], order)
  _, others = real_batches(split, 4, 5, epoch=1)
  assert sum(others, [])[:SIZE] not in (first, second, list(range(SIZE)))


def test_what_does_not_fill_a_permutation_is_its_beginning(split):
  """Five batches of 3 out of 10 images: a whole permutation and half of another."""
  _, rows = real_batches(split, 3, 5)
  order = sum(rows, [])
  assert sorted(order[:SIZE]) == list(range(SIZE)) and len(set(order[SIZE:])) == 5


def test_shuffling_begins_at_the_first_image_again(split):
  state, _ = real_batches(split, 4, 3)
  assert int(state.memory["position"]) == 12
  again = jax.jit(sources.shuffle, static_argnums=2)(state, jax.random.key(9), SIZE)
  assert int(again.memory["position"]) == 0 and again.memory["order"].shape == state.memory["order"].shape
  assert not np.array_equal(again.memory["order"], state.memory["order"])


def test_real_data_resume_where_they_stopped(split):
  """What a state has not seen yet is in it: a restored one goes on as if it had never stopped."""
  _, whole = real_batches(split, 4, 5)
  stopped, begun = real_batches(split, 4, 2)
  restored = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), stopped.memory)
  _, rest = real_batches(split, 4, 3, state=stopped.replace(memory=restored))
  assert begun + rest == whole


def test_a_mixture_has_the_shares_of_its_parts_in_order():
  net, state = generator()
  state = state.replace(memory={"pool": filled_pool(2)})
  parts = [sources.fresh(net, NOISE, 3), sources.pooled(9, DEVICES)]
  after, x, y = drawn_by(sources.mixture(parts, DEVICES), state, KEY)
  assert x.shape == (12, 8, 8, 3) and y.shape == (12,)
  z, labels = NOISE.draw(streams.nth(KEY, Stream.PARTS, 0), 3)
  fresh, _ = sources.sample_images(net, state.generator.variables, z, labels)
  np.testing.assert_allclose(x[:3], fresh, rtol=1e-4, atol=1e-5)
  drawn = pool.draw(state.memory["pool"], streams.nth(KEY, Stream.PARTS, 1), 9)
  assert np.array_equal(x[3:], drawn["images"]) and np.array_equal(y[3:], drawn["labels"])
  assert np.array_equal(y[:3], labels) and same_generator(after, state)


def test_the_parts_of_a_mixture_have_keys_of_their_own():
  """The same source twice gives two batches, and neither is what the mixture's own key would give."""
  net, state = generator()
  part = sources.fresh(net, NOISE, 5)
  _, x, y = drawn_by(sources.mixture([part, part], DEVICES), state, KEY)
  _, plain, _ = drawn_by(part, state, KEY)
  for a, b in ((x[:5], x[5:]), (x[:5], plain), (x[5:], plain)):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 0.1


def test_the_parts_of_a_mixture_move_their_own_part_of_the_state(split):
  """A part that moves the position of the data and one that moves running statistics: both are moved afterwards."""
  net, state = generator()
  state = sources.shuffle(state.replace(memory=sources.empty_order(20)), KEY, SIZE)
  parts = [sources.real(4, (0, 0, 0), (1, 1, 1), DEVICES), sources.fresh(net, NOISE, 4, move_statistics=True)]
  after, x, y = drawn_by(sources.mixture(parts, DEVICES), state, KEY, split)
  assert int(after.memory["position"]) == 4 and np.array_equal(y[:4], state.memory["order"][:4])
  np.testing.assert_allclose(x[:4, 0, 0, 0] * 255, y[:4], rtol=1e-5)
  assert not equal(after.generator.batch_stats, state.generator.batch_stats)
  assert equal(after.generator.params, state.generator.params)
