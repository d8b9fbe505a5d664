"""Convolutions, plain, transposed and after upsampling, as fast inside compiled loops on CPUs as outside.

XLA's CPU backend turns the gradients of a convolution into forms that it runs 10 to 30 times slower within a loop body
(jax-ml/jax#12868), and here a whole epoch is a loop. On CPUs convolutions are therefore those of oneDNN where it is
installed (cpsc_jax.nets.onednn), and else the gradients are spelled out as a plain convolution and a matrix product
over patches; every other platform lowers to the native ones.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from cpsc_jax.nets import onednn

LAYOUT = ("NHWC", "HWIO", "NHWC")
FEW_PIXELS = 16  # up to which a product over patches is the fastest weight gradient (docs/performance.md)
SAVED = "convolution"  # the name of every convolution's output, for policies of rematerialisation


def conv_general_dilated(
  x: jax.Array,
  w: jax.Array,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: lax.ConvDimensionNumbers | None = None,
  **kw: Any,
) -> jax.Array:
  """Drop-in for `lax.conv_general_dilated` in `flax.linen.Conv`; unusual convolutions go to the original.

  x (N, H, W, I), w (kh, kw, I, O) -> (N, H', W', O), under the name SAVED.
  """
  usual = (
    x.ndim == 4
    and not isinstance(padding, str)
    and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    and kw.get("feature_group_count", 1) == 1
    and dimension_numbers == lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
  )
  if usual:
    y = _conv(x, w, tuple(strides), tuple(map(tuple, padding)), kw.get("precision"))
  else:
    y = lax.conv_general_dilated(
      x, w, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers=dimension_numbers, **kw
    )
  return checkpoint_name(y, SAVED)


def after_upsampling(
  x: jax.Array,
  w: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  precision: Any = None,
  **_: Any,
) -> jax.Array:
  """`conv_general_dilated` of x, doubled in height and width by nearest neighbours; for 3x3 kernels and padding 1.

  x (N, H, W, I), w (3, 3, I, O) -> (N, 2H, 2W, O), under the name SAVED. Neighbours are equal, so that an output sees
  2x2 different inputs: this is the transposed convolution of stride 2 with sums of the kernel's taps, 4 products in
  place of 9.
  """
  assert w.shape[:2] == (3, 3) and tuple(strides) == (1, 1) and all(tuple(pads) == (1, 1) for pads in padding)
  return checkpoint_name(_after_upsampling(x, w, precision), SAVED)


def transposed(
  x: jax.Array,
  w: jax.Array,
  strides: Sequence[int],
  padding: Sequence[tuple[int, int]],
  *,
  precision: Any = None,
  **_: Any,
) -> jax.Array:
  """Drop-in that makes `flax.linen.Conv` PyTorch's ConvTranspose2d of the same kernel, stride and padding.

  x (N, H, W, I), w (kh, kw, I, O), which is flipped, as Flax keeps kernels of transposed convolutions ->
  (N, s (H - 1) + kh - pads, ..., O), under the name SAVED.
  """
  w = jnp.swapaxes(w[::-1, ::-1], 2, 3)
  return checkpoint_name(_transposed(x, w, tuple(strides), tuple(map(tuple, padding)), precision), SAVED)


def upsample(x: jax.Array, factor: int = 2) -> jax.Array:
  """Nearest-neighbour upsampling of (N, H, W, K) by `factor` in both directions."""
  n, h, w, k = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, factor, w, factor, k))
  return x.reshape(n, h * factor, w * factor, k)


def _native(x, w, strides, padding, precision):
  return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT, precision=precision)


def _spelled_out(x, w, strides, padding, precision):
  if _tiny(x.shape, strides):
    return _patches(x, w.shape, strides, padding) @ w.reshape(-1, w.shape[3])
  return _native(x, w, strides, padding, precision)


def _forward(x, w, strides, padding, precision):
  def on_cpu(x, w):
    if not _tiny(x.shape, strides) and onednn.usable(x, w):
      return onednn.forward(x, w, strides, padding)
    return _spelled_out(x, w, strides, padding, precision)

  def default(x, w):
    return _native(x, w, strides, padding, precision)

  return lax.platform_dependent(x, w, cpu=on_cpu, default=default)


def _input_gradient(dy, w, shape, strides, padding, precision):
  """By x of this shape, from dy (N, H', W', O)."""

  def on_cpu(dy, w):
    if not _tiny(shape, (1, 1)) and onednn.usable(dy, w):
      return onednn.input_gradient(dy, w, shape, strides, padding)
    spaced = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)])
    edge = [
      (k - 1 - low, size + low - have)
      for k, (low, _), size, have in zip(w.shape[:2], padding, shape[1:3], spaced.shape[1:3], strict=True)
    ]
    flipped = jnp.swapaxes(w[::-1, ::-1], 2, 3)
    return _spelled_out(spaced, flipped, (1, 1), edge, precision)

  def default(dy, w):
    x = jax.ShapeDtypeStruct(shape, dy.dtype)
    return jax.linear_transpose(lambda x: _native(x, w, strides, padding, precision), x)(dy)[0]

  return lax.platform_dependent(dy, w, cpu=on_cpu, default=default)


def _weight_gradient(x, dy, shape, strides, padding, precision):
  """By w of this shape."""

  def on_cpu(x, dy):
    if dy.shape[1] * dy.shape[2] > FEW_PIXELS and onednn.usable(x, dy):
      return onednn.weight_gradient(x, dy, shape, strides, padding)
    rows = _patches(x, shape, strides, padding).reshape(-1, shape[0] * shape[1] * shape[2])
    return (rows.T @ dy.reshape(-1, shape[3])).reshape(shape)

  def default(x, dy):
    w = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda w: _native(x, w, strides, padding, precision), w)(dy)[0]

  return lax.platform_dependent(x, dy, cpu=on_cpu, default=default)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, w, *how):
  return _forward(x, w, *how)


def _conv_forward(x, w, *how):
  return _forward(x, w, *how), (x, w)


def _conv_backward(*args):
  *how, (x, w), dy = args
  return _input_gradient(dy, w, x.shape, *how), _weight_gradient(x, dy, w.shape, *how)


_conv.defvjp(_conv_forward, _conv_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _transposed(x, w, strides, padding, precision):
  """What the gradient of a convolution with w (kh, kw, O, I) makes of x (N, H, W, I) in place of dy."""
  sizes = zip(x.shape[1:3], w.shape[:2], strides, padding, strict=True)
  shape = (x.shape[0], *(s * (size - 1) + k - sum(pads) for size, k, s, pads in sizes), w.shape[2])
  return _input_gradient(x, w, shape, strides, padding, precision)


def _transposed_forward(x, w, *how):
  return _transposed(x, w, *how), (x, w)


def _transposed_backward(*args):
  *how, (x, w), dy = args
  return _forward(dy, w, *how), _weight_gradient(dy, x, w.shape, *how)


_transposed.defvjp(_transposed_forward, _transposed_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _after_upsampling(x, w, precision):
  on_cpu, default = _ways_to_upsample(precision)
  return lax.platform_dependent(x, w, cpu=on_cpu, default=default)


def _after_upsampling_forward(x, w, precision):
  return _after_upsampling(x, w, precision), (x, w)


def _after_upsampling_backward(precision, saved, dy):
  def pull(way):
    return lambda x, w, dy: jax.vjp(way, x, w)[1](dy)

  on_cpu, default = _ways_to_upsample(precision)
  return lax.platform_dependent(*saved, dy, cpu=pull(on_cpu), default=pull(default))


_after_upsampling.defvjp(_after_upsampling_forward, _after_upsampling_backward)


def _ways_to_upsample(precision):
  """(on CPUs, elsewhere): spelled out, a transposed convolution multiplies zeros too, and upsampling costs less."""
  one = ((1, 1), (1, 1))

  def as_transposed(x, w):
    return _transposed(x, _sums_of_taps(w), (2, 2), one, precision)

  def on_cpu(x, w):
    if not _tiny(x.shape, (1, 1)) and onednn.usable(x, w):
      return as_transposed(x, w)
    return _conv(upsample(x), w, (1, 1), one, precision)

  return on_cpu, as_transposed


def _sums_of_taps(w):
  """(3, 3, I, O) -> (4, 4, O, I): in each direction taps 2, 1 + 2, 0 + 1, 0, which are what reaches output pixels
  2i - 1 to 2i + 2 from input pixel i."""
  for axis in (0, 1):
    first, middle, last = (lax.index_in_dim(w, tap, axis, keepdims=True) for tap in range(3))
    w = jnp.concatenate([last, middle + last, first + middle, first], axis)
  return jnp.swapaxes(w, 2, 3)


def _tiny(shape, strides):
  """Whether, for x of this shape, the matrix product over patches wins over every convolution
  (benchmarks/convolution.py)."""
  return shape[1] * shape[2] <= 4 * strides[0] * strides[1]


def _patches(x, kernel_shape, strides, padding):
  """(N, H, W, I) -> (N, H', W', kh * kw * I), the inputs that each output pixel sees."""
  kh, kw = kernel_shape[:2]
  padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
  h, w = ((padded.shape[i] - k) // s + 1 for i, k, s in zip((1, 2), (kh, kw), strides, strict=True))

  def window(i, j):
    return padded[:, i : i + (h - 1) * strides[0] + 1 : strides[0], j : j + (w - 1) * strides[1] + 1 : strides[1]]

  return jnp.concatenate([window(i, j) for i in range(kh) for j in range(kw)], axis=-1)
