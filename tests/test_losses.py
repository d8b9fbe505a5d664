"""The loss terms against plain transcriptions of their formulas, values and gradients.

A per-sample loss is compared by its mean over the batch.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_close

from cpsc_jax import losses
from cpsc_jax.state import Statistics


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
    value, grad = jax.value_and_grad(lambda x: jnp.mean(ours(x)))(jnp.asarray(x))
    assert_close(value, theirs(x), 1e-9, "value")
    assert_close(grad, numerical_gradient(theirs, x), 1e-6, "gradient")


@pytest.fixture
def logits():
  rng = np.random.default_rng(0)
  return 3 * rng.normal(size=(6, 4)), 3 * rng.normal(size=(6, 4)), rng.integers(0, 4, 6)


def test_kl(logits):
  t, s, _ = logits

  def formula(t, s):
    return np.mean(np.sum(softmax(t) * (np.log(softmax(t)) - np.log(softmax(s))), -1))

  check(lambda x: losses.kl(jnp.asarray(t), x), lambda x: formula(t, x), s)
  check(lambda x: losses.kl(x, jnp.asarray(s)), lambda x: formula(x, s), t)
  assert float(jnp.mean(losses.kl(jnp.asarray(t), jnp.asarray(t)))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("form", ["mse", "log"])
def test_inverse_distillation(logits, form):
  t, s, _ = logits
  generator = {"mse": lambda x: -np.mean((x - t) ** 2), "log": lambda x: -np.log(np.mean((x - t) ** 2))}[form]
  student = {"mse": lambda x: np.mean((x - t) ** 2), "log": lambda x: np.log(np.linalg.norm(x - t))}[form]
  check(lambda x: losses.ikd(jnp.asarray(t), x, form), generator, s)
  check(lambda x: losses.l2(jnp.asarray(t), x, form), student, s)
  for loss in (losses.ikd, losses.l2):
    by_teacher = jax.grad(lambda x, loss=loss: jnp.mean(loss(x, jnp.asarray(s), form)))(jnp.asarray(t))
    assert not np.any(by_teacher), "the teacher is detached"


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(logits, double, smoothing):
  _, s, y = logits
  targets = np.full((6, 4), smoothing / 4)
  targets[np.arange(6), y] += 1 - smoothing

  def formula(x):
    return -np.mean(np.sum(targets * np.log(softmax(softmax(x) if double else x)), -1))

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


@pytest.mark.parametrize("samples, block", [(64, 1024), (256, 100), (512, 128), (2048, 1024)])
def test_blockwise_contrast_is_the_dense_one(samples, block, dtype):
  key = jax.random.split(jax.random.key(samples))
  x = jax.random.normal(key[0], (samples, 2, 16), dtype)
  x /= jnp.linalg.norm(x, axis=-1, keepdims=True)
  y = jax.random.randint(key[1], (samples,), 0, 20)
  dense = jax.jit(jax.value_and_grad(lambda x: 3 * losses.supervised_contrast(x, y, 0.1)))(x)

  def blockwise(x):
    return 3 * losses.supervised_contrast_blockwise(x, y, 0.1, block)

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

  def draw():
    return {
      "a": {"mean": rng.normal(size=3), "var": rng.random(3)},
      "b": {"mean": rng.normal(size=2), "var": rng.random(2)},
    }

  seen, stored = draw(), draw()
  want = sum(np.linalg.norm(seen[k][s] - stored[k][s]) for k in seen for s in ("mean", "var"))
  assert float(losses.bn_statistics(Statistics(seen, stored))) == pytest.approx(want, rel=1e-6)
  for nothing in (None, Statistics({}, {})):
    assert losses.bn_statistics(nothing).shape == () and losses.bn_statistics(nothing) == 0.0


@pytest.mark.parametrize("double", [False, True])
def test_cross_entropy_until_confident(logits, double):
  t, _, y = logits
  p = softmax(t)[np.arange(6), y]
  each = -np.log(softmax(softmax(t) if double else t))[np.arange(6), y]
  threshold = float(np.median(p))
  want = np.sum(each[p < threshold]) / 6

  def function(x, confidence=threshold):
    return jnp.mean(losses.cross_entropy_until_confident(x, jnp.asarray(y), confidence, double))

  with jax.enable_x64(True):
    value, grad = jax.value_and_grad(function)(jnp.asarray(t))
    assert float(value) == pytest.approx(want, rel=1e-9)
    plain = jnp.mean(losses.cross_entropy(jnp.asarray(t), jnp.asarray(y), double))
    assert float(function(jnp.asarray(t), 1.0)) == pytest.approx(float(plain), rel=1e-9)
  assert not np.any(grad[p >= threshold]) and np.all(np.any(grad[p < threshold], axis=1))


LOGITS = jax.random.normal(jax.random.key(0), (2, 6, 4))
LABELS = jnp.array([0, 1, 0, 2, 3, 1])
STAGES = [jax.random.normal(jax.random.key(i), (2, 6, 4, 4, 3 + i)) for i in range(2)]
TEACHER, STUDENT = ([stage[i] for stage in STAGES] for i in range(2))
VIEWS = jax.random.normal(jax.random.key(3), (6, 2, 5))
IMAGES = jax.random.normal(jax.random.key(4), (6, 4, 4, 3))
PROJECTED = [stage.mean((1, 2)) for stage in STUDENT]
MOMENTS = {"layer": {"mean": jnp.ones(3), "var": jnp.ones(3)}}

SEPARABLE = {
  "kl": lambda i: losses.kl(*LOGITS[:, i], 4.0),
  "kl_where_agreed": lambda i: losses.kl_where_agreed(*LOGITS[:, i]),
  "jensen_shannon": lambda i: losses.jensen_shannon(*LOGITS[:, i]),
  "l1": lambda i: losses.l1(*LOGITS[:, i]),
  "ikd": lambda i: losses.ikd(*LOGITS[:, i]),
  "l2": lambda i: losses.l2(*LOGITS[:, i]),
  "cross_entropy": lambda i: losses.cross_entropy(LOGITS[0, i], LABELS[i]),
  "cross_entropy, smooth": lambda i: losses.cross_entropy(LOGITS[0, i], LABELS[i], label_smoothing=0.1),
  "cross_entropy_until_confident": lambda i: losses.cross_entropy_until_confident(LOGITS[0, i], LABELS[i], 0.5),
  "activation": lambda i: losses.activation(LOGITS[0, i]),
  "attention": lambda i: losses.attention([t[i] for t in TEACHER], [s[i] for s in STUDENT]),
  "channel_distillation": lambda i: losses.channel_distillation([t[i] for t in TEACHER], [p[i] for p in PROJECTED]),
}

COUPLED = {
  "ikd, log": lambda i: losses.ikd(*LOGITS[:, i], "log"),
  "l2, log": lambda i: losses.l2(*LOGITS[:, i], "log"),
  "balance": lambda i: losses.balance(LOGITS[0, i]),
  "total_variation": lambda i: losses.total_variation(IMAGES[i]),
  "norm": lambda i: losses.norm(IMAGES[i]),
  "supervised_contrast": lambda i: losses.supervised_contrast(VIEWS[i], LABELS[i]),
  "supervised_contrast_blockwise": lambda i: losses.supervised_contrast_blockwise(VIEWS[i], LABELS[i], block=4),
  "triplets": lambda i: losses.triplets([t[i] for t in TEACHER], LOGITS[0, i], LABELS[i], jax.random.key(5)),
  "bn_statistics": lambda i: losses.bn_statistics(Statistics(MOMENTS, MOMENTS)),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_a_separable_term_gives_each_sample_its_own_loss(name):
  """(N,), whatever other samples are in the batch."""
  whole, few = SEPARABLE[name](slice(None)), SEPARABLE[name](slice(2, 5))
  assert whole.shape == (6,) and few.shape == (3,)
  np.testing.assert_allclose(few, whole[2:5], rtol=1e-6)


@pytest.mark.parametrize("name", COUPLED)
def test_a_coupled_term_gives_one_number(name):
  assert COUPLED[name](slice(None)).shape == ()


def test_tokens_are_maps_reshaped():
  """A stage (N, T, K) has the losses of the same stage as a map (N, H, W, K)."""
  teacher, student = ([stage.reshape(6, 16, -1) for stage in stages] for stages in (TEACHER, STUDENT))

  def of_both(term):
    np.testing.assert_allclose(term(teacher, student), term(TEACHER, STUDENT), rtol=1e-5)

  of_both(losses.attention)
  of_both(lambda t, _: losses.channel_distillation(t, PROJECTED))
  of_both(lambda _, s: losses.triplets(s, LOGITS[0], LABELS, jax.random.key(5)))


def test_stages_of_half_precision_are_compared_in_float32():
  teacher, student = ([stage.astype(jnp.bfloat16) for stage in stages] for stages in (TEACHER, STUDENT))
  terms = (
    losses.attention(teacher, student),
    losses.channel_distillation(teacher, PROJECTED),
    losses.triplets(student, LOGITS[0], LABELS, jax.random.key(5)),
  )
  assert all(term.dtype == jnp.float32 for term in terms)
