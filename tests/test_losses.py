"""The loss terms against plain transcriptions of their formulas, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_close

from cpsc_jax import losses


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def contrast(views, labels, temperature):
  """Khosla et al. 2020, eq. 2, sample by sample."""
  rows = [(views[i, v], labels[i]) for v in range(views.shape[1]) for i in range(len(labels))]
  total = 0.0
  for i, (anchor, label) in enumerate(rows):
    others = [(r @ anchor / temperature, c) for j, (r, c) in enumerate(rows) if j != i]
    largest = max(s for s, _ in others)
    normaliser = largest + np.log(sum(np.exp(s - largest) for s, _ in others))
    total -= np.mean([s - normaliser for s, c in others if c == label])
  return temperature / 0.07 * total / len(rows)


def numerical_gradient(function, x, step=1e-5):
  grad = np.zeros_like(x)
  for index in np.ndindex(x.shape):
    high, low = x.copy(), x.copy()
    high[index] += step
    low[index] -= step
    grad[index] = (function(high) - function(low)) / (2 * step)
  return grad


def check(ours, theirs, x):
  with jax.enable_x64(True):
    value, grad = jax.value_and_grad(ours)(jnp.asarray(x))
    assert_close(value, theirs(x), 1e-9, "value")
    assert_close(grad, numerical_gradient(theirs, x), 1e-6, "gradient")


@pytest.fixture
def logits():
  rng = np.random.default_rng(0)
  return 3 * rng.normal(size=(6, 4)), 3 * rng.normal(size=(6, 4)), rng.integers(0, 4, 6)


def test_kl(logits):
  t, s, _ = logits
  formula = lambda t, s: np.mean(np.sum(softmax(t) * (np.log(softmax(t)) - np.log(softmax(s))), -1))
  check(lambda x: losses.kl(jnp.asarray(t), x), lambda x: formula(t, x), s)
  check(lambda x: losses.kl(x, jnp.asarray(s)), lambda x: formula(x, s), t)
  assert float(losses.kl(jnp.asarray(t), jnp.asarray(t))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["mse", "log"])
def test_inverse_distillation(logits, form):
  t, s, _ = logits
  generator = {"mse": lambda x: -np.mean((x - t) ** 2), "log": lambda x: -np.log(np.mean((x - t) ** 2))}[form]
  student = {"mse": lambda x: np.mean((x - t) ** 2), "log": lambda x: np.log(np.linalg.norm(x - t))}[form]
  check(lambda x: losses.ikd_generator(jnp.asarray(t), x, form), generator, s)
  check(lambda x: losses.ikd_student(jnp.asarray(t), x, form), student, s)
  for loss in (losses.ikd_generator, losses.ikd_student):
    assert not np.any(jax.grad(lambda x, loss=loss: loss(x, jnp.asarray(s), form))(jnp.asarray(t))), (
      "the teacher is detached"
    )


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(logits, double, smoothing):
  _, s, y = logits
  targets = np.full((6, 4), smoothing / 4)
  targets[np.arange(6), y] += 1 - smoothing
  formula = lambda x: -np.mean(np.sum(targets * np.log(softmax(softmax(x) if double else x)), -1))
  check(lambda x: losses.cross_entropy(x, jnp.asarray(y), double, smoothing), formula, s)


@settings(max_examples=25, deadline=None)
@given(
  n=st.integers(2, 7),
  views=st.integers(2, 3),
  classes=st.integers(1, 4),
  temperature=st.sampled_from([0.07, 0.5, 1.0]),
  seed=st.integers(0, 10**6),
)
def test_supervised_contrast(n, views, classes, temperature, seed):
  rng = np.random.default_rng(seed)
  x, y = rng.normal(size=(n, views, 3)), rng.integers(0, classes, n)
  x /= np.linalg.norm(x, axis=-1, keepdims=True)
  with jax.enable_x64(True):
    ours = jax.jit(losses.supervised_contrast)(x, y, temperature)
    assert float(ours) == pytest.approx(contrast(x, y, temperature), rel=1e-9)


def test_supervised_contrast_gradient():
  rng = np.random.default_rng(3)
  x, y = rng.normal(size=(4, 2, 3)), np.array([0, 1, 0, 2])
  check(lambda v: losses.supervised_contrast(v, jnp.asarray(y), 0.5), lambda v: contrast(v, y, 0.5), x)


def test_supervised_contrast_survives_long_rows():
  x = 30 * jax.random.normal(jax.random.key(0), (8, 2, 4))
  value, grad = jax.value_and_grad(losses.supervised_contrast)(x, jnp.arange(8) % 3)
  assert np.isfinite(value) and np.all(np.isfinite(grad))


@pytest.mark.parametrize("samples, block", [(64, 1024), (256, 100), (512, 128), (4096, 1024)])
def test_blockwise_contrast_is_the_dense_one(samples, block, dtype):
  key = jax.random.split(jax.random.key(samples))
  x = jax.random.normal(key[0], (samples, 2, 16), dtype)
  x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
  y = jax.random.randint(key[1], (samples,), 0, 20)
  dense = jax.jit(jax.value_and_grad(lambda x: 3 * losses.supervised_contrast(x, y, 0.1)))(x)
  blockwise = lambda x: 3 * losses.supervised_contrast_blockwise(x, y, 0.1, block)
  value, grad = jax.jit(jax.value_and_grad(blockwise))(x)
  tolerance = 1e-12 if dtype == np.float64 else 1e-5
  assert_close(value, dense[0], tolerance, "value")
  assert_close(grad, dense[1], tolerance, "gradient")


def test_blockwise_contrast_without_labels_and_with_long_rows():
  x = 30 * jax.random.normal(jax.random.key(0), (7, 3, 4))
  dense = jax.value_and_grad(losses.supervised_contrast)(x)
  value, grad = jax.value_and_grad(lambda x: losses.supervised_contrast_blockwise(x, block=4))(x)
  assert_close(value, dense[0], 1e-5)
  assert_close(grad, dense[1], 1e-4)


def test_bn_statistics():
  rng = np.random.default_rng(0)
  draw = lambda: {
    "a": {"mean": rng.normal(size=3), "var": rng.random(3)},
    "b": {"mean": rng.normal(size=2), "var": rng.random(2)},
  }
  seen, running = draw(), draw()
  want = sum(np.linalg.norm(seen[k][s] - running[k][s]) for k in seen for s in ("mean", "var"))
  assert float(losses.bn_statistics(seen, running)) == pytest.approx(want, rel=1e-6)
  assert float(losses.bn_statistics({}, {})) == 0.0


@pytest.mark.parametrize("double", [False, True])
def test_cross_entropy_until_confident(logits, double):
  t, _, y = logits
  p = softmax(t)[np.arange(6), y]
  each = -np.log(softmax(softmax(t) if double else t))[np.arange(6), y]
  threshold = float(np.median(p))
  want = np.sum(each[p < threshold]) / 6
  function = lambda x: losses.cross_entropy_until_confident(x, jnp.asarray(y), threshold, double)
  with jax.enable_x64(True):
    value, grad = jax.value_and_grad(function)(jnp.asarray(t))
    assert float(value) == pytest.approx(want, rel=1e-9)
    plain = losses.cross_entropy(jnp.asarray(t), jnp.asarray(y), double)
    assert float(losses.cross_entropy_until_confident(jnp.asarray(t), jnp.asarray(y), 1.0, double)) == pytest.approx(
      float(plain), rel=1e-9
    )
  assert not np.any(grad[p >= threshold]) and np.all(np.any(grad[p < threshold], axis=1))
