"""Normalisation by a batch's own statistics, each array read as few times as the mathematics allows.

Mean and variance come from one pass, and so do both sums that the gradient needs; split over devices, each pair is one
message. Gradients that JAX derives by itself take five sums, of which each is a pass and a message of its own.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from cpsc_jax.state import at_least_float32

_parts = contextvars.ContextVar("parts", default=1)


def moments(x: jax.Array, near: jax.Array | float = 0.0) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance over all axes but the last, in at least float32: two (K,).

  The variance is E[(x - near)^2] - (E[x] - near)^2, whose relative error grows with the square of the distance, in
  standard deviations, between the mean and `near`: a running mean keeps it at round-off.
  """
  away = at_least_float32(x) - jax.lax.stop_gradient(near)
  axes = tuple(range(x.ndim - 1))
  mean, square = jnp.mean(away, axes), jnp.mean(jnp.square(away), axes)
  return mean + jax.lax.stop_gradient(near), jnp.maximum(square - jnp.square(mean), 0.0)


@jax.custom_vjp
def batch_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """(x - mean) / sqrt(var + epsilon) * scale + bias in at least float32, and `moments(x, near)`.

  Args:
    x: (N, ..., K).
    scale, bias: (K,), or of each sample, (N, 1, ..., K).
    near: (K,), see `moments`; nothing is differentiated by it, nor by epsilon.
  """
  return _forward(x, scale, bias, near, epsilon)[0]


def _forward(x, scale, bias, near, epsilon):
  mean, var = moments(x, near)
  inverse = jax.lax.rsqrt(var + epsilon)
  y = (at_least_float32(x) - mean) * (inverse * scale) + bias
  return (y, mean, var), (x, scale, mean, inverse)


def _backward(kept, cotangents):
  """With u = x - mean: dx = scale dy / std - mean(scale dy) / std - u mean(scale dy u) / std^3, for dy alone."""
  (x, scale, mean, inverse), (dy, dmean, dvar) = kept, cotangents
  n, batch = x.size // x.shape[-1], tuple(range(x.ndim - 1))
  over, u = batch if scale.ndim == 1 else batch[1:], at_least_float32(x) - mean
  dbias, along = (jnp.sum(part, over, keepdims=scale.ndim > 1) for part in (dy, dy * u))
  level, slope = (part if scale.ndim == 1 else jnp.sum(part, batch) for part in (scale * dbias, scale * along))
  level = (dmean - inverse * level) / n
  slope = (2 * dvar - inverse**3 * slope) / n
  dx = dy * (scale * inverse) + u * slope + level
  return dx.astype(x.dtype), along * inverse, dbias, None, None


batch_norm.defvjp(_forward, _backward)


@contextlib.contextmanager
def in_parts(number: int) -> Iterator[None]:
  """Batch norms traced within the block take the statistics of so many equal parts of a batch, each by itself.

  This is ghost batch norm (Hoffer et al., NeurIPS 2017, arXiv 1705.08741, section 4). With a multiple of the number of
  devices no statistics travel between them.
  """
  before = _parts.set(number)
  try:
    yield
  finally:
    _parts.reset(before)


def normalise(
  x: jax.Array, scale: jax.Array, bias: jax.Array, near: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`batch_norm`, within `in_parts` of each part; then mean (K,) and unbiased variance (K,), averaged over parts."""
  parts = _parts.get()
  if parts == 1:
    y, mean, var = batch_norm(x, scale, bias, near, epsilon)
  else:

    def split(array):
      return array.reshape(parts, -1, *array.shape[1:])

    axis = None if scale.ndim == 1 else 0
    affine = (scale, bias) if axis is None else (split(scale), split(bias))
    y, mean, var = jax.vmap(batch_norm, (0, axis, axis, None, None))(split(x), *affine, near, epsilon)
    y, mean, var = y.reshape(x.shape), jnp.mean(mean, 0), jnp.mean(var, 0)
  n = x.size // x.shape[-1] // parts
  return y, mean, var * (n / max(n - 1, 1))
