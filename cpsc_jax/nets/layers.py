"""Layers with PyTorch's arithmetic, and the categorical batch norm that carries the class."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cpsc_jax.nets import batch_norm
from cpsc_jax.nets.batch_norm import moments
from cpsc_jax.nets.convolution import conv_general_dilated
from cpsc_jax.state import Output, at_least_float32

Dtype = Any  # what jnp.dtype takes; None computes in the precision of inputs and parameters
HEAD = ("head_0", "head_2")  # the layers of `FeatureHead`, numbered as in PyTorch


def conv(
  features: int,
  kernel: int = 3,
  stride: int = 1,
  use_bias: bool = False,
  dtype: Dtype = None,
  name: str | None = None,
  init: nn.initializers.Initializer | None = None,
  bias_init: nn.initializers.Initializer = nn.initializers.zeros,
  groups: int = 1,
  padding: int | None = None,
  form: Callable[..., jax.Array] = conv_general_dilated,
) -> nn.Conv:
  """k x k convolution with PyTorch's symmetric padding, k // 2 by default (not 'SAME', which differs at stride 2).

  `form` is one of the functions of cpsc_jax.nets.convolution.
  """
  return nn.Conv(
    features,
    (kernel, kernel),
    (stride, stride),
    padding=kernel // 2 if padding is None else padding,
    use_bias=use_bias,
    dtype=dtype,
    kernel_init=init or nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
    bias_init=bias_init,
    feature_group_count=groups,
    conv_general_dilated=form,
    name=name,
  )


def torch_uniform(fan_in: int) -> nn.initializers.Initializer:
  """PyTorch's default for convolutions and linear layers: U(-1, 1) / sqrt(fan_in), weights and biases alike."""

  def init(key, shape, dtype=jnp.float32, **_):
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) * fan_in**-0.5

  return init


def linear(features: int, fan_in: int, dtype: Dtype = None, name: str | None = None) -> nn.Dense:
  """Linear layer from `fan_in` to `features`, initialised as in PyTorch."""
  init = torch_uniform(fan_in)
  return nn.Dense(features, dtype=dtype, kernel_init=init, bias_init=init, name=name)


class ReLU(nn.Module):
  """max(x, 0) as a layer with a name, so that what comes out of it can be quantised."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.relu(x)


class ReLU6(ReLU):
  """The same, and at most 6."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.relu6(x)


class _Normalise(nn.Module):
  """Batch statistics in training, running statistics otherwise; PyTorch's update, with the unbiased variance."""

  epsilon: float = 1e-5
  momentum: float = 0.1

  def normalise(self, x, scale, bias, train):
    shape = (x.shape[-1],)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
    running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
    if not train:
      return (x - running_mean.value) * jax.lax.rsqrt(running_var.value + self.epsilon) * scale + bias
    y, mean, var = batch_norm.normalise(x, scale, bias, running_mean.value, self.epsilon)
    if self.is_mutable_collection("batch_stats") and not self.is_initializing():
      running_mean.value = self.blend(running_mean.value, mean)
      running_var.value = self.blend(running_var.value, var)
    return y

  def blend(self, old, new):
    return (1 - self.momentum) * old + self.momentum * new


class BatchNorm(_Normalise):
  """PyTorch's BatchNorm2d on (N, H, W, K): eps 1e-5, momentum 0.1 in PyTorch's sense, unbiased running variance."""

  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    return self.normalise(x, scale, bias, train).astype(self.dtype or x.dtype)


class CategoricalBatchNorm(_Normalise):
  """Categorical feature embedding (CFE), the conditional batch norm of CPSC-DFKD.

  Normalises (N, ..., K) with batch statistics and no affine part, then scales and shifts every channel with rows of two
  embedding tables looked up by the label: `scale` and `bias`, (num_classes, K), starting at ones and zeros. Labels are
  (N,), or (N, num_classes) of samples between classes, whose rows are mixed by these shares. Running
  statistics are updated as in `BatchNorm`. With one class it is a plain batch norm, whatever the labels; without
  `affine` it only normalises.
  """

  num_classes: int = 10
  epsilon: float = 1e-3
  dtype: Dtype = None
  affine: bool = True
  scale_init: nn.initializers.Initializer = nn.initializers.ones

  @nn.compact
  def __call__(self, x: jax.Array, labels_N: jax.Array, train: bool) -> jax.Array:
    table = (self.num_classes, x.shape[-1])
    spread = (x.shape[0],) + (1,) * (x.ndim - 2) + (x.shape[-1],)
    if not self.affine:
      return self.normalise(x, jnp.ones(table[1:]), jnp.zeros(table[1:]), train).astype(self.dtype or x.dtype)
    scale, bias = self.param("scale", self.scale_init, table), self.param("bias", nn.initializers.zeros, table)
    if labels_N.ndim == 2:
      scale, bias = labels_N @ scale, labels_N @ bias
    else:
      labels_N = labels_N if self.num_classes > 1 else jnp.zeros_like(labels_N)
      scale, bias = scale[labels_N], bias[labels_N]
    scale, bias = scale.reshape(spread), bias.reshape(spread)
    return self.normalise(x, scale, bias, train).astype(self.dtype or x.dtype)


class FeatureHead(nn.Module):
  """A classifier whose features pass a two-layer MLP to another width, so that they can be compared with a teacher's.

  The MLP (width -> width -> `features`, ReLU between) reads the features at unit length, in float32; its output is
  scaled to unit length again if `normalise`. Logits, stages and pooled features are those of `net`.
  """

  net: nn.Module
  features: int
  normalise: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    out = self.net(x, train=train)
    width = out.features.shape[-1]
    first, second = (linear(n, width, name=name) for n, name in zip((width, self.features), HEAD, strict=True))

    def head(features):
      mapped = second(nn.relu(first(features)))
      return unit(mapped) if self.normalise else mapped

    return out.replace(features=head(out.features), head_features=head(jax.lax.stop_gradient(out.features)))


class StageProjections(nn.Module):
  """A classifier that also projects every stage, averaged over space, to a width of the teacher's, linearly.

  That is a 1x1 convolution before the average, in float32. Logits, features and stages are those of `net`.
  """

  net: nn.Module
  widths: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    out = self.net(x, train=train)
    means = [jnp.mean(stage, tuple(range(1, stage.ndim - 1))).astype(jnp.float32) for stage in out.stages]
    pairs = enumerate(zip(means, self.widths, strict=True))
    projected = tuple(linear(width, mean.shape[-1], name=f"stage_{i}")(mean) for i, (mean, width) in pairs)
    return out.replace(projected=projected)


class RelationMaps(nn.Module):
  """A classifier with two linear maps of its features to twice their width, which its terms apply (R-DFCIL).

  Parameters maps/before and maps/now, (D, 2 D), of the previous network's features and of `net`'s. Its output is
  that of `net`.
  """

  net: nn.Module

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    out = self.net(x, train=train)
    _Maps(name="maps")(out.pooled)
    return out


class _Maps(nn.Module):
  """The parameters of `RelationMaps`, as PyTorch draws those of a linear layer."""

  @nn.compact
  def __call__(self, features_ND: jax.Array) -> None:
    width = features_ND.shape[-1]
    for name in ("before", "now"):
      self.param(name, torch_uniform(width), (width, 2 * width))


def unit(features_ND: jax.Array) -> jax.Array:
  """Rows scaled to unit L2 norm; rows shorter than 1e-12 are divided by 1e-12, as PyTorch does."""
  x = at_least_float32(features_ND)
  squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x / jnp.sqrt(jnp.maximum(squared, 1e-24))


def outputs(x: jax.Array, stages: Sequence[jax.Array], num_classes: int, name: str) -> Output:
  """How most classifiers end: the last map (N, H, W, K) or tokens (N, T, K) averaged over space, then `classify`."""
  return classify(jnp.mean(x, tuple(range(1, x.ndim - 1))), stages, num_classes, name)


def classify(features_ND: jax.Array, stages: Sequence[jax.Array], num_classes: int, name: str) -> Output:
  """How every classifier ends: linear layer `name` on the features, and the features at unit length.

  Called inside a module's compact scope.
  """
  wide = at_least_float32(features_ND)
  logits = linear(num_classes, wide.shape[-1], name=name)(wide)
  return Output(logits, unit(features_ND), tuple(stages), pooled=wide)


def max_pool(x: jax.Array) -> jax.Array:
  """2x2 max-pooling of stride 2."""
  return nn.max_pool(x, (2, 2), (2, 2))


def observe_batch_norm(call: Callable[[], Any]) -> tuple[Any, dict[tuple[str, ...], dict[str, jax.Array]]]:
  """Runs `call` and returns (its result, what every batch norm layer in it saw).

  The second is {module path: {"mean": (K,), "var": (K,), "samples": (N, K)}} of the layer's input, in the order of the
  calls: mean and biased variance over batch and space, and each sample's mean over space. It reads Flax's own
  `nn.BatchNorm` as well as this package's, so that teachers from elsewhere are seen too.
  """
  seen = {}

  def watch(next_call, args, kwargs, context):
    if isinstance(context.module, BatchNorm | nn.BatchNorm) and context.method_name == "__call__":
      x = args[0]
      mean, var = moments(x, context.module.get_variable("batch_stats", "mean", 0.0))
      seen[context.module.path] = {"mean": mean, "var": var, "samples": jnp.mean(x, tuple(range(1, x.ndim - 1)))}
    return next_call(*args, **kwargs)

  with nn.intercept_methods(watch):
    result = call()
  return result, seen
