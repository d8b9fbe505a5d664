"""Residual networks of 16, 32 and 64 channels for small images, as public CIFAR code has them: two families."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cpsc_jax.errors import Refusal
from cpsc_jax.nets.layers import BatchNorm, Dtype, ReLU, classify, conv, outputs
from cpsc_jax.nets.resnet import projected
from cpsc_jax.state import Output

WIDTHS = (16, 32, 64)


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut, added; the ReLU after the addition belongs to the network.

  A free shortcut has no parameters: it takes every second pixel and fills new channels with zeros on both sides.
  Otherwise the shortcut is projected.
  """

  width: int
  stride: int
  free: bool
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    h = conv(self.width, 3, self.stride, dtype=self.dtype, name="conv1")(x)
    h = ReLU()(BatchNorm(name="bn1")(h, train))
    h = BatchNorm(name="bn2")(conv(self.width, 3, dtype=self.dtype, name="conv2")(h), train)
    if not self.free:
      return h + projected(x, self.width, self.stride, self.dtype, train)
    side = (self.width - x.shape[-1]) // 2
    return h + jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (side, side)))


class CifarResNet(nn.Module):
  """(N, H, W, K) -> `Output`: the CIFAR network of He et al. (CVPR 2016), depth 6n + 2, free shortcuts."""

  depth: int
  num_classes: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    x = ReLU()(BatchNorm(name="bn1")(conv(16, dtype=self.dtype, name="conv1")(x), train))
    stages = []
    for stage, width in enumerate(WIDTHS):
      for block in range((self.depth - 2) // 6):
        stride = 2 if stage > 0 and block == 0 else 1
        x = ReLU()(Block(width, stride, True, self.dtype, name=f"layer{stage + 1}_{block}")(x, train))
      stages.append(x)
    return outputs(x, stages, self.num_classes, "linear")


class SmallResNet(nn.Module):
  """(N, H, W, K) -> `Output`: depth 6n + 2, a stem of 64 channels, projected shortcuts, one ReLU at the end of a stage.

  The features are 4x4 averages of the last map, flattened channels first: 256 of them for images of 32 pixels.
  """

  depth: int
  num_classes: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    if min(x.shape[1:3]) < 16:
      raise Refusal(f"small_resnet{self.depth} needs images of at least 16 pixels, got {min(x.shape[1:3])}.")
    x = ReLU()(BatchNorm(name="bn1")(conv(64, dtype=self.dtype, name="conv1")(x), train))
    stages = []
    for stage, width in enumerate(WIDTHS):
      for block in range((self.depth - 2) // 6):
        stride = 2 if stage > 0 and block == 0 else 1
        x = Block(width, stride, False, self.dtype, name=f"layer{stage + 1}_{block}")(x, train)
      x = ReLU()(x)
      stages.append(x)
    pooled = nn.avg_pool(x, (4, 4), (4, 4))
    return classify(jnp.moveaxis(pooled, -1, 1).reshape(x.shape[0], -1), stages, self.num_classes, "linear")
