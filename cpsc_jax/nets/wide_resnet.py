"""Wide residual networks WRN-d-k (Zagoruyko & Komodakis, BMVC 2016), pre-activation, for small images."""

import flax.linen as nn
import jax

from cpsc_jax.nets.layers import BatchNorm, Dtype, ReLU, conv, outputs
from cpsc_jax.state import Output


class Block(nn.Module):
  width: int
  stride: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    activated = ReLU()(BatchNorm(name="bn1")(x, train))
    shortcut = x
    if x.shape[-1] != self.width:
      shortcut = conv(self.width, 1, self.stride, dtype=self.dtype, name="shortcut")(activated)
    h = conv(self.width, 3, self.stride, dtype=self.dtype, name="conv1")(activated)
    h = ReLU()(BatchNorm(name="bn2")(h, train))
    return shortcut + conv(self.width, 3, dtype=self.dtype, name="conv2")(h)


class WideResNet(nn.Module):
  """(N, H, W, K) -> `Output` with three stages of 16k, 32k, 64k channels and (depth - 4) / 6 blocks each."""

  depth: int
  widen: int
  num_classes: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    x = conv(16, dtype=self.dtype, name="conv1")(x)
    stages = []
    for group, width in enumerate((16, 32, 64), start=1):
      for block in range((self.depth - 4) // 6):
        stride = 2 if group > 1 and block == 0 else 1
        x = Block(width * self.widen, stride, self.dtype, name=f"block{group}_{block}")(x, train)
      stages.append(x)
    x = ReLU()(BatchNorm(name="bn1")(x, train))
    return outputs(x, stages, self.num_classes, "fc")
