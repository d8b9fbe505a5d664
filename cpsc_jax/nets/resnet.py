"""ResNet-18/34/50 (He et al., CVPR 2016): for small images with a 3x3 stem and no max-pooling, or for ImageNet."""

import flax.linen as nn
import jax

from cpsc_jax.nets.layers import BatchNorm, Dtype, ReLU, conv, outputs
from cpsc_jax.state import Output


class BasicBlock(nn.Module):
  width: int
  stride: int
  dtype: Dtype = None
  expansion = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    h = conv(self.width, 3, self.stride, dtype=self.dtype, name="conv1")(x)
    h = ReLU()(BatchNorm(name="bn1")(h, train))
    h = BatchNorm(name="bn2")(conv(self.width, 3, dtype=self.dtype, name="conv2")(h), train)
    return ReLU()(h + projected(x, self.width, self.stride, self.dtype, train))


class Bottleneck(nn.Module):
  width: int
  stride: int
  dtype: Dtype = None
  expansion = 4

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    h = ReLU()(BatchNorm(name="bn1")(conv(self.width, 1, dtype=self.dtype, name="conv1")(x), train))
    h = conv(self.width, 3, self.stride, dtype=self.dtype, name="conv2")(h)
    h = ReLU()(BatchNorm(name="bn2")(h, train))
    width = self.width * self.expansion
    h = BatchNorm(name="bn3")(conv(width, 1, dtype=self.dtype, name="conv3")(h), train)
    return ReLU()(h + projected(x, width, self.stride, self.dtype, train))


def projected(x: jax.Array, width: int, stride: int, dtype: Dtype, train: bool) -> jax.Array:
  """The input itself, or its 1x1 projection where stride or width change; called inside a block's compact scope."""
  if stride == 1 and x.shape[-1] == width:
    return x
  return BatchNorm(name="shortcut_bn")(conv(width, 1, stride, dtype=dtype, name="shortcut_conv")(x), train)


class ResNet(nn.Module):
  """(N, H, W, K) -> `Output` with four stages of 64, 128, 256, 512 channels (times 4 with bottlenecks).

  With `imagenet` the stem is a 7x7 convolution and a 3x3 max-pooling, both of stride 2, as in torchvision.
  """

  blocks: tuple[int, ...]
  block: type[nn.Module]
  num_classes: int
  dtype: Dtype = None
  imagenet: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    kernel, stride = (7, 2) if self.imagenet else (3, 1)
    x = ReLU()(BatchNorm(name="bn1")(conv(64, kernel, stride, dtype=self.dtype, name="conv1")(x), train))
    if self.imagenet:
      x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
    stages = []
    for stage, count in enumerate(self.blocks):
      for block in range(count):
        stride = 2 if stage > 0 and block == 0 else 1
        x = self.block(64 * 2**stage, stride, self.dtype, name=f"layer{stage + 1}_{block}")(x, train)
      stages.append(x)
    return outputs(x, stages, self.num_classes, "linear")


def resnet18(num_classes: int, dtype: Dtype = None, imagenet: bool = False) -> ResNet:
  return ResNet((2, 2, 2, 2), BasicBlock, num_classes, dtype, imagenet)


def resnet34(num_classes: int, dtype: Dtype = None, imagenet: bool = False) -> ResNet:
  return ResNet((3, 4, 6, 3), BasicBlock, num_classes, dtype, imagenet)


def resnet50(num_classes: int, dtype: Dtype = None, imagenet: bool = False) -> ResNet:
  return ResNet((3, 4, 6, 3), Bottleneck, num_classes, dtype, imagenet)
