"""MobileNetV2 (Sandler et al., CVPR 2018) with the layout and numbering of torchvision."""

import flax.linen as nn
import jax

from cpsc_jax.nets.layers import BatchNorm, Dtype, ReLU6, conv, outputs
from cpsc_jax.state import Output

# expansion, channels, blocks, stride of the first block
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class InvertedResidual(nn.Module):
  """1x1 expansion, 3x3 depthwise, 1x1 without activation; the input is added where shapes allow."""

  expansion: int
  width: int
  stride: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    hidden, first = x.shape[-1] * self.expansion, int(self.expansion > 1)
    h = x
    if first:
      h = _activated(h, hidden, 1, 1, 1, self.dtype, "conv_0", train)
    h = _activated(h, hidden, 3, self.stride, hidden, self.dtype, f"conv_{first}", train)
    h = conv(self.width, 1, dtype=self.dtype, name=f"conv_{first + 1}")(h)
    h = BatchNorm(name=f"conv_{first + 2}")(h, train)
    return x + h if self.stride == 1 and x.shape[-1] == self.width else h


class MobileNetV2(nn.Module):
  """(N, H, W, K) -> `Output` with seven stages. Its dropout is left out: as a student it trains without."""

  num_classes: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    x = _activated(x, 32, 3, 2, 1, self.dtype, "features_0", train)
    stages, number = [], 1
    for expansion, width, count, stride in GROUPS:
      for block in range(count):
        step = 1 if block else stride
        x = InvertedResidual(expansion, width, step, self.dtype, name=f"features_{number}")(x, train)
        number += 1
      stages.append(x)
    x = _activated(x, 1280, 1, 1, 1, self.dtype, f"features_{number}", train)
    return outputs(x, stages, self.num_classes, "classifier_1")


def _activated(x, width, kernel, stride, groups, dtype, name, train):
  x = conv(width, kernel, stride, groups=groups, dtype=dtype, name=f"{name}_0")(x)
  return ReLU6()(BatchNorm(name=f"{name}_1")(x, train))
