"""Fake quantisation: a classifier whose weights and activations take few values, under training and evaluation.

The quantiser is that of ZeroQ and GDFQ (Xu et al., ECCV 2020, arXiv 2003.03603), which most work on data-free
quantisation shares: weights by each output channel's current minimum and maximum, activations per tensor and only after
each ReLU, from 0 to an end that is tracked while calibrating and then fixed. There it is the maximum; another choice is
the end with the least squared error (OMSE, Choukroun et al., ICCV workshops 2019). Images, pooled features and biases
stay float.
Rounding is to the nearest level, halves to even, as in ONNX; gradients pass straight through, also outside the range,
except with ends of least error, where they stop at it, as in PACT (Choi et al., 2018): much lies beyond these, and
training diverged when gradients kept pushing it.

Own code: of qwix 0.1.8, the library for this, QtProvider and PtqProvider fail with 4 bits on CPUs, OdmlQatProvider has
no asymmetric 3 bits, and all quantise what goes into operators in place of what comes out of ReLUs.
"""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.lax import stop_gradient

from cpsc_jax.errors import Refusal
from cpsc_jax.nets.layers import BatchNorm, ReLU
from cpsc_jax.state import Output, Tree, at_least_float32

FLOAT = 32  # as many bits: not quantised
LAYERS = (nn.Conv, nn.Dense)
SHARES = 32  # of the maximum that are tried as the end of a range
SAMPLED = 2**17  # activations of a batch on which they are, about
DEVIATIONS = 6.0  # of what leaves a batch norm, from its shift to the end of a range without data (DFQ, ICCV 2019)


def grid(low: jax.Array, high: jax.Array, bits: int, symmetric: bool = False) -> tuple[jax.Array, jax.Array]:
  """(scale, zero) of 2^bits levels 0, 1, ... from `low` to `high`, all of the same shape: level n is the number
  (n - zero) * scale. `zero` is a whole number; if `symmetric`, it is the middle level, and level 0 is never used.
  """
  if symmetric:
    scale = jnp.maximum(jnp.maximum(-low, high), 1e-8) / (2 ** (bits - 1) - 1)
    return scale, jnp.full_like(scale, 2 ** (bits - 1))
  scale = jnp.maximum(high - low, 1e-8) / (2**bits - 1)
  return scale, -jnp.round(low / scale)


def _rounding(cuts: bool) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]:
  """`fake_quantised`, whose gradient is 0, if it `cuts`, where x is beyond the last level."""

  def fake_quantised(x: jax.Array, scale: jax.Array, zero: jax.Array, highest: jax.Array) -> jax.Array:
    """x (..., K) rounded to levels 0 to `highest` of a `grid`, () or (K,), as numbers.

    The ONNX writer knows this function by its name.
    """
    level = jnp.clip(jnp.round(at_least_float32(x) / scale) + zero, 0, highest)
    return ((level - zero) * scale).astype(x.dtype)

  rounded = jax.custom_jvp(fake_quantised)

  @rounded.defjvp
  def _straight_through(primals, tangents):
    x, scale, zero, highest = primals
    inside = at_least_float32(x) <= (highest - zero) * scale
    return rounded(*primals), jnp.where(inside, tangents[0], 0) if cuts else tangents[0]

  return jax.jit(rounded)


# The gradient of the first is that of x itself, everywhere; that of the second is 0 beyond the last level.
fake_quantised, cut = _rounding(cuts=False), _rounding(cuts=True)


def quantised_weights(kernel: jax.Array, bits: int, symmetric: bool = False) -> jax.Array:
  """A kernel (..., K), each of whose K output channels has the levels between its own minimum and maximum."""
  return fake_quantised(kernel, *weight_grid(kernel, bits, symmetric), jnp.float32(2**bits - 1))


def weight_grid(kernel: jax.Array, bits: int, symmetric: bool = False) -> tuple[jax.Array, jax.Array]:
  """The `grid` (K,) of each output channel of a kernel (..., K)."""
  axes = tuple(range(kernel.ndim - 1))
  low, high = (stop_gradient(at_least_float32(end(kernel, axes))) for end in (jnp.min, jnp.max))
  return grid(low, high, bits, symmetric)


def least_error(x: jax.Array, bits: int) -> jax.Array:
  """The end () of the range of activations x (N, ...), none below 0, whose levels have the least mean squared error.

  Tried are SHARES equal shares of the maximum, on every so many images.
  """
  x = stop_gradient(at_least_float32(x))
  highs = jnp.max(x) * jnp.arange(1, SHARES + 1) / SHARES
  x = x[:: max(1, x.size // SAMPLED)]

  def error(high: jax.Array) -> jax.Array:
    steps = grid(jnp.zeros_like(high), high, bits)
    return jnp.mean(jnp.square(fake_quantised(x, *steps, jnp.float32(2**bits - 1)) - x))

  return highs[jnp.argmin(jax.lax.map(error, highs))]


class Quantised(nn.Module):
  """A classifier at few bits, (N, H, W, K) -> `Output`; its parameters are the classifier's own.

  Batch norms are always in evaluation mode; scales and shifts are trained. In training mode the first `calibration`
  batches move the ranges of activations, whose state lies beside the batch norms': each ReLU has "high" (), the end of
  its range, and "seen", the number of batches that have moved it. `quantise` makes one, `ranges_without_data` begins
  the ranges.

  Attributes:
    weights, activations: bits; FLOAT for none.
    first, last: bits of the weights of the first and of the last layer.
    symmetric: whether the levels of weights lie evenly around 0.
    layers: how many convolutions and linear layers a call goes through.
    calibration: batches that move the ranges.
    momentum: of the mean over these batches, which is exact from the first on.
    ranges: a batch's end of a range is its maximum, "max", or what `least_error` finds, "mse".
  """

  wrapped_module: nn.Module  # this name is taken: no layer of the module may have it
  weights: int
  activations: int
  first: int
  last: int
  symmetric: bool
  layers: int
  calibration: int = 0
  momentum: float = 0.9
  ranges: str = "max"

  def setup(self):
    nn.share_scope(self, self.wrapped_module)

  def __call__(self, x: jax.Array, train: bool) -> Output:
    numbers = itertools.count()

    def watch(next_call, args, kwargs, context):
      module = context.module
      if context.method_name == "__call__" and isinstance(module, ReLU) and self.activations < FLOAT:
        return self._activation(module, next_call(*args, **kwargs), train)
      number = next(numbers) if context.method_name == "__call__" and _is_layer(module) else None
      if number is None or self._bits(number) == FLOAT or self.is_initializing():
        return next_call(*args, **kwargs)
      bits, symmetric = self._bits(number), self.symmetric
      return _with_kernel(module, lambda kernel: quantised_weights(kernel, bits, symmetric), args, kwargs)

    with nn.intercept_methods(watch):
      return self.wrapped_module(x, train=False)

  def _bits(self, number: int) -> int:
    """Of the weights of a layer, by its number in a call."""
    return {0: self.first, self.layers - 1: self.last}.get(number, self.weights)

  def _activation(self, module: nn.Module, x: jax.Array, train: bool) -> jax.Array:
    high = module.variable("batch_stats", "high", jnp.zeros, (), jnp.float32)
    seen = module.variable("batch_stats", "seen", jnp.zeros, (), jnp.int32)
    if self.is_initializing():
      return x
    if train and module.is_mutable_collection("batch_stats"):
      moves = seen.value < self.calibration
      share = (1 - self.momentum) / (1 - self.momentum ** (seen.value + 1.0))
      if self.ranges == "mse":
        found = jax.lax.cond(moves, lambda: least_error(x, self.activations), lambda: high.value)
      else:
        found = stop_gradient(at_least_float32(jnp.max(x)))
      high.value = jnp.where(moves, high.value + share * (found - high.value), high.value)
      seen.value = seen.value + moves
    steps = grid(jnp.zeros_like(high.value), high.value, self.activations)
    rounded = cut if self.ranges == "mse" else fake_quantised
    return rounded(x, *steps, jnp.float32(2**self.activations - 1))

  @property
  def card(self) -> dict[str, Any]:
    """What `Quantised` needs beside the classifier to be built again."""
    return {name: getattr(self, name) for name in ("weights", "activations", "first", "last", "symmetric", "layers")}


def quantise(
  net: nn.Module,
  image_shape: tuple[int, ...],
  weights: int,
  activations: int,
  first: int = 0,
  last: int = 0,
  symmetric: bool = False,
  calibration: int = 0,
  momentum: float = 0.9,
  ranges: str = "max",
) -> Quantised:
  """`Quantised` of a classifier for images (H, W, K); `first` and `last` 0 are as `weights`. Nothing is computed.

  Raises:
    Refusal: it has parameters that are no convolution's or linear layer's, or no activation that can be quantised.
  """
  called, relus = [], []

  def watch(next_call, args, kwargs, context):
    if context.method_name == "__call__":
      called.extend([context.module.path] if _is_layer(context.module) else [])
      relus.extend([context.module.path] if isinstance(context.module, ReLU) else [])
    return next_call(*args, **kwargs)

  rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
  with nn.intercept_methods(watch):
    shapes = jax.eval_shape(lambda x: net.init(rngs, x, train=False), jnp.zeros((2, *image_shape)))
  flat = flatten_dict(shapes["params"])
  others = sorted({"/".join(path[:-1]) for path, leaf in flat.items() if leaf.ndim > 1 and path[:-1] not in called})
  name = type(net).__name__
  if others:
    raise Refusal(
      f"{name} has layers that cannot be quantised: {', '.join(others)}; only flax.linen.Conv and flax.linen.Dense can."
    )
  if activations < FLOAT and not relus:
    raise Refusal(
      f"{name} has no ReLU whose outputs could be quantised; write its ReLUs as cpsc_jax.nets.ReLU()(x), or set"
      " config.quantise.activations to 32."
    )
  ends = first or weights, last or weights
  return Quantised(net, weights, activations, *ends, symmetric, len(called), calibration, momentum, ranges)


def call_order(
  net: Quantised, variables: Tree, image_shape: tuple[int, ...]
) -> tuple[list[tuple[tuple[str, ...], int]], list[tuple[str, ...]]]:
  """([(path, bits of the weights) of each layer], [path of each ReLU]), as a call reaches them; nothing is computed."""
  layers, relus = [], []

  def watch(next_call, args, kwargs, context):
    if context.method_name == "__call__":
      if _is_layer(context.module):
        layers.append((context.module.path, net._bits(len(layers))))
      if isinstance(context.module, ReLU):
        relus.append(context.module.path)
    return next_call(*args, **kwargs)

  with nn.intercept_methods(watch):
    jax.eval_shape(lambda x: net.wrapped_module.apply(variables, x, train=False), jnp.zeros((1, *image_shape)))
  return layers, relus


def words(card: dict[str, Any]) -> str:
  """What `Quantised.card` says, such as "W4A4, first layer W8, simulated"."""
  weights, activations = card["weights"], card["activations"]
  ends = "".join(f", {end} layer W{card[end]}" for end in ("first", "last") if card[end] != weights)
  return f"W{weights}A{activations}{ends}, {'as 8-bit integers' if is_int8(card) else 'simulated'}"


def is_int8(card: dict[str, Any] | None) -> bool:
  """Whether a net of this `Quantised.card` can be computed with int8 kernels; None, a float one, cannot."""
  return (
    bool(card) and {card[name] for name in ("weights", "activations", "first", "last")} == {8} and card["symmetric"]
  )


def ranges_without_data(net: Quantised, variables: Tree, image_shape: tuple[int, ...]) -> Tree:
  """The batch statistics with ranges that no image has helped to find.

  What leaves a batch norm is taken to reach its shift and DEVIATIONS times its scale, whatever comes in; sums reach the
  sums of these bounds, and layers without a batch norm what their weights can make of them at most.
  """
  found = {}

  def watch(next_call, args, kwargs, context):
    module, x = context.module, args[0] if args else None
    if context.method_name != "__call__":
      return next_call(*args, **kwargs)
    if isinstance(module, BatchNorm | nn.BatchNorm):
      params = module.variables["params"]
      return jnp.broadcast_to(params["bias"] + DEVIATIONS * jnp.abs(params["scale"]), x.shape).astype(x.dtype)
    if _is_layer(module):
      return _with_kernel(module, jnp.abs, args, kwargs)
    y = next_call(*args, **kwargs)
    if isinstance(module, ReLU):
      found[module.path] = jnp.max(y)
    return y

  def bounds(variables):
    with nn.intercept_methods(watch):
      net.wrapped_module.apply(variables, jnp.ones((1, *image_shape)), train=False)
    return dict(found)

  stats = flatten_dict(variables["batch_stats"])
  for path, high in jax.jit(bounds)(variables).items():
    if (*path, "high") in stats:
      stats[*path, "high"] = high.astype(jnp.float32)
  return unflatten_dict(stats)


def _is_layer(module: nn.Module) -> bool:
  """Whether it is a layer of a net; the copies that `_with_kernel` applies stand by themselves, without a path."""
  return isinstance(module, LAYERS) and bool(module.path)


def _with_kernel(module: nn.Module, change: Callable[[jax.Array], jax.Array], args: tuple, kwargs: dict) -> jax.Array:
  """What a bound convolution or linear layer gives with a changed kernel."""
  params = module.variables["params"]
  copy = module.clone(parent=None, name=None)
  return copy.apply({"params": {**params, "kernel": change(params["kernel"])}}, *args, **kwargs)
