"""python benchmarks/convolution.py

Gradients of a 3x3 convolution inside a compiled loop: `cpsc_jax.nets.convolution` against the native ones, as a ratio
within one run. On CPUs the native gradients are slow there (jax-ml/jax#12868); elsewhere both are the same program and
the ratio is 1. The third column is the same ratio for forward passes, which differ on maps of few pixels.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from cpsc_jax.nets.convolution import conv_general_dilated

NHWC = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
STEPS, ROUNDS = 10, 3


def seconds(function: Callable[..., Any], *inputs: jax.Array) -> float:
  """The median over ROUNDS of the time of one call, after a first one."""
  jax.block_until_ready(function(*inputs))
  taken = []
  for _ in range(ROUNDS):
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    taken.append(time.perf_counter() - start)
  return sorted(taken)[ROUNDS // 2]


def in_a_loop(step: Callable[..., Any]) -> Callable[..., Any]:
  """A program that calls `step` STEPS times, each time on inputs that depend on the last call."""

  def iteration(state, _):
    return jax.tree.map(lambda a, b: a + 1e-9 * b, state, step(*state)), None

  def loop(x, w):
    return lax.scan(iteration, (x, w), length=STEPS)[0]

  return jax.jit(loop)


def gradients(conv: Callable[..., jax.Array]) -> Callable[..., Any]:
  def loss(x, w):
    return jnp.sum(jnp.square(conv(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)))

  return in_a_loop(jax.grad(loss, (0, 1)))


def forward(conv: Callable[..., jax.Array]) -> Callable[..., Any]:
  return in_a_loop(lambda x, w: (conv(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC), w))


def main() -> None:
  print(f"{jax.devices()[0].device_kind}, batch 128, native / ours (above 1: ours is faster)")
  print(f"{'map':>12} {'gradients':>10} {'forward':>10}")
  for size, channels in ((16, 16), (8, 16), (4, 32), (2, 64), (1, 64)):
    x, w = jnp.ones((128, size, size, channels)), jnp.full((3, 3, channels, channels), 0.01)
    ratios = [
      seconds(kind(lax.conv_general_dilated), x, w) / seconds(kind(conv_general_dilated), x, w)
      for kind in (gradients, forward)
    ]
    print(f"{size:>4}x{size}x{channels:<4} {ratios[0]:>10.2f} {ratios[1]:>10.2f}")


if __name__ == "__main__":
  main()
