"""VGG with batch norm (Simonyan & Zisserman, ICLR 2015) as the data-free distillation literature uses it on CIFAR."""

from typing import Any

import flax.linen as nn

from cpsc_jax.nets.layers import BatchNorm, conv, max_pool, outputs


class VGG(nn.Module):
  """(N, H, W, K) -> `Output` with five stages of 3x3 convolutions (bias, batch norm, ReLU).

  2x2 max-pooling follows stages 1 to 3, and stage 4 only where images are 64 pixels high, as in the reference.
  """

  convs: tuple[int, ...]
  num_classes: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool):
    height = x.shape[1]
    stages = []
    for stage, (count, width) in enumerate(zip(self.convs, (64, 128, 256, 512, 512), strict=True)):
      for index in range(count):
        x = conv(width, use_bias=True, dtype=self.dtype, name=f"block{stage}_conv{index}")(x)
        x = nn.relu(BatchNorm(name=f"block{stage}_bn{index}")(x, train))
      stages.append(x)
      if stage < 3 or (stage == 3 and height == 64):
        x = max_pool(x)
    return outputs(x, stages, self.num_classes, "classifier")


def vgg11(num_classes, dtype=None):
  return VGG((1, 1, 2, 2, 2), num_classes, dtype)


def vgg13(num_classes, dtype=None):
  return VGG((2, 2, 2, 2, 2), num_classes, dtype)


def vgg16(num_classes, dtype=None):
  return VGG((2, 2, 3, 3, 3), num_classes, dtype)
