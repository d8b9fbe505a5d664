"""RGAL's sampling and triplets against plain transcriptions of their formulas, on random and on edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close

from cpsc_jax import losses

FORMS = pytest.mark.parametrize("focal", [False, True], ids=["distance", "focal"])


def unit(rows):
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def probabilities(logits, labels, focal):
  """METHOD: each anchor's chances of each negative, one by one; an anchor without negatives has none."""
  e, d = unit(logits), logits.shape[1]
  chances = np.zeros((len(labels), len(labels)))
  for i in range(len(labels)):
    negatives = [j for j in range(len(labels)) if labels[j] != labels[i]]
    weights = []
    for j in negatives:
      distance = np.linalg.norm(e[i] - e[j])
      if focal:
        in_range = 0.5 < distance < 1.0
      else:
        distance = max(distance, 0.5)
        in_range = distance < 1.4
      weight = np.exp((2 - d) * np.log(distance) - (d - 3) / 2 * np.log(1 - distance**2 / 4)) if in_range else 0.0
      weights.append(weight)
    if negatives:
      weights = np.array(weights) if sum(weights) > 0 else np.ones(len(negatives))
      chances[i, negatives] = weights / weights.sum()
  return chances


def triplet_loss(stages, labels, drawn, margin, swapped):
  """METHOD: every pair of one label with the negative drawn for it; the mean over pairs, the sum over stages."""
  total, n = 0.0, len(labels)
  pairs = [(i, j) for i in range(n) for j in range(n) if i != j and labels[i] == labels[j] and len(set(labels)) > 1]
  for stage in stages:
    f = unit(stage.mean((1, 2)))
    terms = []
    for i, j in pairs:
      near, far = np.linalg.norm(f[i] - f[j]), np.linalg.norm(f[i] - f[drawn[i, j]])
      terms.append(max(0.0, (far - near if swapped else near - far) + margin))
    total += np.mean(terms) if terms else 0.0
  return total


def clustered(rng, n, classes, width, spread):
  """Logits around a direction per class, and labels."""
  labels = rng.integers(0, classes, n)
  return rng.normal(size=(classes, width))[labels] + spread * rng.normal(size=(n, width)), labels


def far_apart():
  return np.repeat(np.eye(3), 2, axis=0) * [[1], [1], [1], [1], [-1], [-1]], np.array([0, 0, 1, 1, 2, 2])


CASES = {
  "random": lambda rng: clustered(rng, 24, 5, 10, 0.3),
  "many classes": lambda rng: clustered(rng, 24, 20, 40, 0.6),
  "no negative in range": lambda rng: far_apart(),
  "one class": lambda rng: (rng.normal(size=(6, 4)), np.zeros(6, int)),
  "one sample per class": lambda rng: (rng.normal(size=(6, 6)), np.arange(6)),
  "identical embeddings": lambda rng: (np.ones((6, 4)), np.array([0, 0, 1, 1, 2, 2])),
  "two classes, one of a single sample": lambda rng: (rng.normal(size=(5, 4)), np.array([0, 0, 0, 0, 1])),
}
EACH = pytest.mark.parametrize("case", CASES)


@FORMS
@EACH
def test_weights(case, focal):
  logits, labels = CASES[case](np.random.default_rng(1))
  with jax.enable_x64(True):
    log_weights = np.asarray(losses.log_negative_weights(jnp.asarray(logits), jnp.asarray(labels), focal))
    weights = np.exp(log_weights)
    total = weights.sum(1, keepdims=True)
    ours = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
  np.testing.assert_allclose(ours, probabilities(logits, labels, focal), atol=1e-9)


@FORMS
@EACH
def test_draws_follow_the_weights(case, focal):
  logits, labels = CASES[case](np.random.default_rng(1))
  log_weights = losses.log_negative_weights(jnp.asarray(logits, jnp.float32), jnp.asarray(labels), focal)
  keys = jax.random.split(jax.random.key(0), 400)
  drawn = np.asarray(jax.jit(jax.vmap(lambda key: losses.draw_negatives(key, log_weights)))(keys))
  want, n = probabilities(logits, labels, focal), len(labels)
  for i in range(n):
    if want[i].sum():
      counts = np.bincount(drawn[:, i].reshape(-1), minlength=n)
      assert not counts[want[i] == 0].any(), "what has no weight is never drawn"
      share, size = counts / counts.sum(), counts.sum()
      assert np.all(np.abs(share - want[i]) < 5 * np.sqrt(want[i] * (1 - want[i]) / size) + 2e-4)


@pytest.mark.parametrize("swapped", [False, True], ids=["student", "synthesis"])
@EACH
def test_loss(case, swapped):
  rng = np.random.default_rng(2)
  logits, labels = CASES[case](rng)
  stages = [rng.normal(size=(len(labels), 2, 2, k)) for k in (3, 5)]
  if case == "identical embeddings":
    stages = [np.ones_like(stage) for stage in stages]
  key = jax.random.key(3)
  with jax.enable_x64(True):

    def loss(s):
      return losses.triplets(s, jnp.asarray(logits), jnp.asarray(labels), key, 0.2, focal=swapped, swapped=swapped)

    value, grads = jax.value_and_grad(loss)([jnp.asarray(stage) for stage in stages])
    drawn = losses.draw_negatives(key, losses.log_negative_weights(jnp.asarray(logits), jnp.asarray(labels), swapped))
  assert float(value) == pytest.approx(triplet_loss(stages, labels, np.asarray(drawn), 0.2, swapped), abs=1e-4)
  assert all(np.isfinite(g).all() for g in grads)
  assert all(np.abs(g).max() > 0 for g in grads) == (
    case in ("random", "many classes", "no negative in range") or case == "two classes, one of a single sample"
  )


def test_directions_are_opposite():
  """Steps down the student's loss bring equal labels together and others apart; down the swapped loss, the opposite."""
  rng = np.random.default_rng(4)
  logits, labels = clustered(rng, 30, 3, 8, 1.0)
  labels = jnp.asarray(labels)

  def gap(features):
    f = unit(np.asarray(features))
    distance = np.linalg.norm(f[:, None] - f[None], axis=-1)
    same = np.equal.outer(np.asarray(labels), np.asarray(labels))
    return distance[~same].mean() - distance[same].mean()

  for swapped, sign in ((False, 1), (True, -1)):
    features = jnp.asarray(rng.normal(size=(30, 8)))
    before = gap(features)

    def loss(f, key, swapped=swapped):
      return losses.triplets([f[:, None, None, :]], jnp.asarray(logits), labels, key, 0.2, swapped=swapped)

    step = jax.jit(jax.grad(loss))
    for i in range(200):
      features = features - 3.0 * step(features, jax.random.key(i))
    assert sign * (gap(features) - before) > 0.02


def test_nothing_is_differentiated_through_the_draw():
  logits, labels = CASES["random"](np.random.default_rng(1))
  stage = jnp.ones((24, 1, 1, 3)) * jnp.arange(24)[:, None, None, None] + jnp.arange(3)

  def loss(x):
    return losses.triplets([stage], x, jnp.asarray(labels), jax.random.key(0))

  assert_close(jax.grad(loss)(jnp.asarray(logits)), np.zeros_like(logits), 1e-30)
