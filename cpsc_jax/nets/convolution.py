"""A convolution whose gradients are as fast inside compiled loops on CPUs as outside.

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


def _native(x, w, strides, padding, precision):
  return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT, precision=precision)


def _on_cpu(x, w, strides, padding, precision):
  if not _tiny(x, strides) and onednn.usable(x, w):
    return onednn.forward(x, w, strides, padding)
  return _spelled_out(x, w, strides, padding, precision)


def _spelled_out(x, w, strides, padding, precision):
  if _tiny(x, strides):
    return _patches(x, w.shape, strides, padding) @ w.reshape(-1, w.shape[3])
  return _native(x, w, strides, padding, precision)


def _forward(x, w, strides, padding, precision):
  options = {"strides": strides, "padding": padding, "precision": precision}
  return lax.platform_dependent(x, w, cpu=partial(_on_cpu, **options), default=partial(_native, **options))


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _conv(x, w, strides, padding, precision):
  return _forward(x, w, strides, padding, precision)


def _conv_fwd(x, w, strides, padding, precision):
  return _forward(x, w, strides, padding, precision), (x, w)


def _conv_bwd(strides, padding, precision, saved, dy):
  x, w = saved

  def on_cpu(x, w, dy):
    if not _tiny(x, strides) and onednn.usable(x, w, dy):
      dx = onednn.input_gradient(dy, w, x.shape, strides, padding)
      return dx, onednn.weight_gradient(x, dy, w.shape, strides, padding)
    (kh, kw, _, o), (_, h, wd, _) = w.shape, x.shape
    rows = _patches(x, w.shape, strides, padding).reshape(-1, w.size // o)
    dw = (rows.T @ dy.reshape(-1, o)).reshape(w.shape)
    spaced = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in strides), (0, 0, 0)])
    edge = [
      (k - 1 - low, size + low - have)
      for k, (low, _), size, have in zip((kh, kw), padding, (h, wd), spaced.shape[1:3], strict=True)
    ]
    flipped = jnp.swapaxes(w[::-1, ::-1], 2, 3)
    return _spelled_out(spaced, flipped, (1, 1), edge, precision), dw

  def default(x, w, dy):
    _, pull = jax.vjp(partial(_native, strides=strides, padding=padding, precision=precision), x, w)
    return pull(dy)

  return lax.platform_dependent(x, w, dy, cpu=on_cpu, default=default)


def _tiny(x, strides):
  """Whether the matrix product over patches wins over every convolution (benchmarks/convolution.py)."""
  return x.shape[1] * x.shape[2] <= 4 * strides[0] * strides[1]


def _patches(x, kernel_shape, strides, padding):
  """(N, H, W, I) -> (N, H', W', kh * kw * I), the inputs that each output pixel sees."""
  kh, kw = kernel_shape[:2]
  padded = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)])
  h, w = ((padded.shape[i] - k) // s + 1 for i, k, s in zip((1, 2), (kh, kw), strides, strict=True))

  def window(i, j):
    return padded[:, i : i + (h - 1) * strides[0] + 1 : strides[0], j : j + (w - 1) * strides[1] + 1 : strides[1]]

  return jnp.concatenate([window(i, j) for i in range(kh) for j in range(kw)], axis=-1)


_conv.defvjp(_conv_fwd, _conv_bwd)
