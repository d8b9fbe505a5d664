"""The layers against PyTorch, NumPy and jax.lax."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from parity import assert_close

from cpsc_jax import nets
from cpsc_jax.nets import onednn
from cpsc_jax.nets.batch_norm import batch_norm, moments
from cpsc_jax.nets.convolution import after_upsampling, conv_general_dilated, transposed, upsample
from cpsc_jax.nets.layers import BatchNorm, CategoricalBatchNorm, observe_batch_norm, unit

NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))


@pytest.mark.parametrize(("size", "kernel"), [(s, k) for s, k in itertools.product((1, 2, 5, 8), (1, 3, 4))] + [(8, 7)])
def test_convolution_equals_lax(size, kernel):
  for stride, pad in itertools.product((1, 2, 3), (0, 1)):
    if size + 2 * pad < kernel:
      continue
    x = jax.random.normal(jax.random.key(0), (3, size, size, 5))
    w = jax.random.normal(jax.random.key(1), (kernel, kernel, 5, 6))

    def value(x, w, conv, stride=stride, pad=pad):
      return jnp.sum(jnp.square(conv(x, w, (stride, stride), ((pad, pad), (pad, pad)), dimension_numbers=NHWC)))

    ours = jax.jit(jax.value_and_grad(lambda x, w: value(x, w, conv_general_dilated), (0, 1)))(x, w)
    theirs = jax.jit(jax.value_and_grad(lambda x, w: value(x, w, lax.conv_general_dilated), (0, 1)))(x, w)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      assert_close(a, b, 1e-5, f"stride {stride} pad {pad}")


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_convolution_is_native_off_the_cpu(platform):
  """On accelerators forward and both gradients lower to three native convolutions and no matrix product."""
  layer = nn.Conv(6, (3, 3), padding=1, conv_general_dilated=conv_general_dilated)
  x = jnp.ones((2, 8, 8, 4))
  params = layer.init(jax.random.key(0), x)

  def loss(p, x):
    return jnp.sum(jnp.square(layer.apply(p, x)))

  text = jax.jit(jax.grad(loss, (0, 1))).trace(params, x).lower(lowering_platforms=(platform,)).as_text()
  assert text.count("stablehlo.convolution(") == 3
  assert "dot_general" not in text


@pytest.mark.parametrize("backend", ["oneDNN", "spelled out", "native"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 4), (8, 8)])
def test_convolution_after_upsampling_and_transposed(height, width, backend, monkeypatch):
  """Values and both gradients: of the upsampled image itself, and of Flax's transposed convolution."""
  if backend == "oneDNN" and not onednn.version():
    pytest.skip("oneDNN is not installed")
  if backend != "oneDNN":
    monkeypatch.setattr(onednn, "usable", lambda *arrays: False)
  if backend == "native":
    monkeypatch.setattr(lax, "platform_dependent", lambda *args, default, **_: default(*args))
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (3, height, width, 5))

  def of(function, w):
    def value(x, w):
      return jnp.sum(jnp.square(function(x, w)))

    return jax.tree.leaves(jax.jit(jax.value_and_grad(value, (0, 1)))(x, w))

  w, pads = jax.random.normal(keys[1], (3, 3, 5, 6)) / 5, ((1, 1), (1, 1))
  naive = of(lambda x, w: lax.conv_general_dilated(upsample(x), w, (1, 1), pads, dimension_numbers=NHWC), w)
  for a, b in zip(of(lambda x, w: after_upsampling(x, w, (1, 1), pads), w), naive, strict=True):
    assert_close(a, b, 1e-5)

  w = jax.random.normal(keys[2], (4, 4, 5, 6)) / 5
  layer = nn.ConvTranspose(6, (4, 4), (2, 2), padding=((2, 2), (2, 2)), use_bias=False)
  theirs = of(lambda x, w: layer.apply({"params": {"kernel": w}}, x), w)
  for a, b in zip(of(lambda x, w: transposed(x, w, (2, 2), pads), w), theirs, strict=True):
    assert_close(a, b, 1e-5)


def test_unusual_convolutions_pass_through():
  x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
  for options in ({"feature_group_count": 4}, {"padding": "SAME"}, {"kernel_dilation": 2}):
    ours = nn.Conv(4, (3, 3), conv_general_dilated=conv_general_dilated, **options)
    theirs = nn.Conv(4, (3, 3), **options)
    variables = theirs.init(jax.random.key(1), x)
    np.testing.assert_array_equal(ours.apply(variables, x), theirs.apply(variables, x))


@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (4, 1, 1, 3)])
def test_batch_norm_equals_pytorch(shape):
  torch = pytest.importorskip("torch")
  layer, theirs = BatchNorm(), torch.nn.BatchNorm2d(shape[-1])
  rng = np.random.default_rng(0)
  variables = layer.init(jax.random.key(0), jnp.zeros(shape), True)
  scale, bias = rng.normal(size=(2, shape[-1])).astype(np.float32)
  variables = {**variables, "params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}
  theirs.load_state_dict({"weight": torch.tensor(scale), "bias": torch.tensor(bias)}, strict=False)
  for train in (True, True, False):
    theirs.train(train)
    x = rng.normal(2, 3, size=shape).astype(np.float32)
    y, stats = nets.forward(layer, variables, jnp.asarray(x), train=train)
    want = theirs(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy()
    assert_close(y, np.moveaxis(want, 1, -1), 1e-5)
    assert_close(stats["mean"], theirs.running_mean.numpy(), 1e-6)
    assert_close(stats["var"], theirs.running_var.numpy(), 1e-6)
    variables = {**variables, "batch_stats": stats}


def test_categorical_batch_norm_is_its_formula():
  rng = np.random.default_rng(1)
  x, labels = rng.normal(1, 2, (6, 3, 2, 4)), np.array([0, 2, 1, 1, 0, 2])
  gamma, beta = rng.normal(size=(2, 3, 4))
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
  want = gamma[labels][:, None, None] * (x - mean) / np.sqrt(var + 1e-3) + beta[labels][:, None, None]
  layer = CategoricalBatchNorm(num_classes=3)
  variables = layer.init(jax.random.key(0), jnp.asarray(x, jnp.float32), jnp.asarray(labels), True)
  assert np.all(variables["params"]["scale"] == 1) and np.all(variables["params"]["bias"] == 0)
  assert np.all(variables["batch_stats"]["mean"] == 0) and np.all(variables["batch_stats"]["var"] == 1)
  variables = {**variables, "params": {"scale": jnp.asarray(gamma), "bias": jnp.asarray(beta)}}
  y, stats = nets.forward(layer, variables, jnp.asarray(x, jnp.float32), jnp.asarray(labels), train=True)
  assert_close(y, want, 1e-6)
  n = 6 * 3 * 2
  assert_close(stats["mean"], 0.1 * mean, 1e-6)
  assert_close(stats["var"], 0.9 + 0.1 * var * n / (n - 1), 1e-6)


def two_passes(x, scale, bias):
  """Batch norm as it is defined, for JAX to differentiate."""
  axes = tuple(range(x.ndim - 1))
  mean = jnp.mean(x, axes)
  var = jnp.mean(jnp.square(x - mean), axes)
  return (x - mean) / jnp.sqrt(var + 1e-3) * scale + bias, mean, var


@pytest.mark.parametrize("shape", [(6, 3, 2, 4), (7, 5)])
@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale for each sample"])
def test_one_pass_and_its_gradients_are_those_of_two(shape, each):
  with jax.enable_x64(True):
    keys = jax.random.split(jax.random.key(0), 6)
    x = 2 * jax.random.normal(keys[0], shape) + 3
    affine = (shape[0],) + (1,) * (len(shape) - 2) + shape[-1:] if each else shape[-1:]
    scale, bias = jax.random.normal(keys[1], affine), jax.random.normal(keys[2], affine)
    weights = jax.random.normal(keys[3], shape), *jax.random.normal(keys[4], (2, shape[-1]))
    near = jax.random.normal(keys[5], shape[-1:])

    def of(norm):
      def value(*inputs):
        return sum(jnp.sum(w * jnp.sin(out)) for w, out in zip(weights, norm(*inputs), strict=True))

      return jax.jit(jax.value_and_grad(value, (0, 1, 2)))(x, scale, bias)

    ours, theirs = of(lambda *inputs: batch_norm(*inputs, near, 1e-3)), of(two_passes)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
      assert_close(a, b, 1e-12)


@pytest.mark.parametrize("each", [False, True], ids=["one scale", "a scale for each sample"])
def test_norms_in_parts_are_those_of_each_part(each):
  layer = CategoricalBatchNorm(num_classes=3) if each else BatchNorm()
  x, labels = 2 * jax.random.normal(jax.random.key(0), (6, 3, 2, 4)) + 1, jnp.array([0, 2, 1, 1, 0, 2])
  variables = layer.init(jax.random.key(1), x, *[labels] * each, True)
  table = variables["params"]["scale"].shape
  scale, bias = jax.random.normal(jax.random.key(2), (2, *table))
  variables = {**variables, "params": {"scale": scale, "bias": bias}}

  def of(parts, x, labels):
    def value(params, x):
      y, stats = nets.forward(layer, {**variables, "params": params}, x, *labels, train=True, norm_parts=parts)
      return jnp.sum(jnp.sin(y)), (y, stats)

    (_, aux), grads = jax.value_and_grad(value, (0, 1), has_aux=True)(variables["params"], x)
    return *aux, *grads

  y, stats, of_params, of_x = of(2, x, [labels] * each)
  halves = [of(1, x[rows], [labels[rows]] * each) for rows in (slice(0, 3), slice(3, 6))]
  assert_close(y, jnp.concatenate([half[0] for half in halves]), 1e-6)
  assert_close(of_x, jnp.concatenate([half[3] for half in halves]), 1e-5)
  for name in ("mean", "var"):
    assert_close(stats[name], (halves[0][1][name] + halves[1][1][name]) / 2, 1e-6)
  for name in ("scale", "bias"):
    assert_close(of_params[name], halves[0][2][name] + halves[1][2][name], 1e-5)


def test_moments_far_from_zero_are_exact_with_a_point_nearby():
  x = np.random.default_rng(0).normal(1000, 0.5, (64, 8, 8, 3)).astype(np.float32)
  mean, var = moments(jnp.asarray(x), jnp.full(3, 999.0))
  assert_close(mean, np.mean(x, (0, 1, 2), np.float64), 1e-6)
  assert_close(var, np.var(x, (0, 1, 2), np.float64), 1e-4)


def test_batch_norm_reads_its_input_twice_and_sums_twice():
  """What a step costs in memory and in messages: two sums forward, two backward, whoever differentiates."""
  layer = BatchNorm()
  x = jnp.ones((4, 3, 3, 5), jnp.bfloat16)
  variables = layer.init(jax.random.key(0), x, True)

  def loss(params, x):
    return jnp.sum(jnp.sin(nets.forward(layer, {**variables, "params": params}, x, train=True)[0].astype(jnp.float32)))

  text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(variables["params"], x))
  assert text.count("reduce_sum[axes=(0, 1, 2)") == 4


def test_observing_sees_flax_batch_norm_too():
  class Foreign(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.BatchNorm(use_running_average=not train, name="first")(x)
      return BatchNorm(name="second")(2 * x + 1, train)

  x = jax.random.normal(jax.random.key(0), (5, 3, 3, 2)) * 3 + 1
  net = Foreign()
  variables = net.init(jax.random.key(1), x, False)
  _, seen = observe_batch_norm(lambda: net.apply(variables, x, False))
  assert list(seen) == [("first",), ("second",)]
  assert_close(seen[("first",)]["mean"], np.mean(x, (0, 1, 2)), 1e-6)
  assert_close(seen[("first",)]["var"], np.var(x, (0, 1, 2)), 1e-6)
  inside = 2 * x / np.sqrt(1 + 1e-5) + 1
  assert_close(seen[("second",)]["mean"], np.mean(inside, (0, 1, 2)), 1e-5)


def test_unit_rows_and_upsampling():
  assert_close(np.linalg.norm(unit(jnp.array([[3.0, 4.0], [1e-3, 0.0]])), axis=1), [1.0, 1.0], 1e-6)
  zero = unit(jnp.zeros((1, 2)))
  assert not np.any(zero)
  assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(unit(x)))(jnp.zeros((1, 2)))))
  x = jnp.arange(8.0).reshape(1, 2, 2, 2)
  np.testing.assert_array_equal(upsample(x), np.repeat(np.repeat(x, 2, 1), 2, 2))
