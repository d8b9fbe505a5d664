"""VGG with batch norm (Simonyan & Zisserman, ICLR 2015): as data-free distillation uses it on CIFAR, and ImageNet's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax.errors import Refusal
from cpsc_jax.nets.layers import BatchNorm, Dtype, ReLU, classify, conv, max_pool, outputs
from cpsc_jax.state import Output


class VGG(nn.Module):
  """(N, H, W, K) -> `Output` with five stages of 3x3 convolutions (bias, batch norm, ReLU).

  2x2 max-pooling follows stages 1 to 3, and stage 4 only where images are 64 pixels high, as in the reference.
  """

  convs: tuple[int, ...]
  num_classes: int
  dtype: Dtype = None

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    height = x.shape[1]
    stages = []
    for stage, (count, width) in enumerate(zip(self.convs, (64, 128, 256, 512, 512), strict=True)):
      for index in range(count):
        x = conv(width, use_bias=True, dtype=self.dtype, name=f"block{stage}_conv{index}")(x)
        x = ReLU()(BatchNorm(name=f"block{stage}_bn{index}")(x, train))
      stages.append(x)
      if stage < 3 or (stage == 3 and height == 64):
        x = max_pool(x)
    return outputs(x, stages, self.num_classes, "classifier")


def vgg11(num_classes: int, dtype: Dtype = None) -> VGG:
  return VGG((1, 1, 2, 2, 2), num_classes, dtype)


def vgg13(num_classes: int, dtype: Dtype = None) -> VGG:
  return VGG((2, 2, 2, 2, 2), num_classes, dtype)


def vgg16(num_classes: int, dtype: Dtype = None) -> VGG:
  return VGG((2, 2, 3, 3, 3), num_classes, dtype)


class ImageNetVGG(nn.Module):
  """(N, H, W, K) -> `Output`: torchvision's VGG with batch norm, for images of 32 pixels and more.

  Five stages, each followed by max-pooling; adaptive average to 7x7; three linear layers, of which the second gives
  the features. Layers are numbered as in torchvision. Its two dropouts are left out: as a student it trains without.
  """

  convs: tuple[int, ...]
  num_classes: int
  dtype: Dtype = None
  hidden: int = 4096

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> Output:
    if min(x.shape[1:3]) < 32:
      raise Refusal(f"imagenet_vgg needs images of at least 32 pixels, got {min(x.shape[1:3])}.")
    stages, number = [], 0
    for count, width in zip(self.convs, (64, 128, 256, 512, 512), strict=True):
      for _ in range(count):
        x = conv(width, use_bias=True, dtype=self.dtype, name=f"features_{number}")(x)
        x = ReLU()(BatchNorm(name=f"features_{number + 1}")(x, train))
        number += 3
      stages.append(x)
      x = max_pool(x)
      number += 1
    x = adaptive_average(x, 7)
    x = jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1)
    for number in (0, 3):
      normal = nn.initializers.normal(0.01)
      x = ReLU()(nn.Dense(self.hidden, dtype=self.dtype, kernel_init=normal, name=f"classifier_{number}")(x))
    return classify(x, stages, self.num_classes, "classifier_6")


def adaptive_average(x: jax.Array, size: int) -> jax.Array:
  """(N, H, W, K) -> (N, size, size, K): PyTorch's adaptive average pooling, whose windows may overlap."""

  def averages(have):
    start, end = np.arange(size) * have // size, -(-np.arange(1, size + 1) * have // size)
    inside = (np.arange(have) >= start[:, None]) & (np.arange(have) < end[:, None])
    return jnp.asarray(inside / inside.sum(1, keepdims=True), x.dtype)

  return jnp.einsum("nhwk,ih,jw->nijk", x, averages(x.shape[1]), averages(x.shape[2]))


def imagenet_vgg11(num_classes: int, dtype: Dtype = None) -> ImageNetVGG:
  return ImageNetVGG((1, 1, 2, 2, 2), num_classes, dtype)


def imagenet_vgg13(num_classes: int, dtype: Dtype = None) -> ImageNetVGG:
  return ImageNetVGG((2, 2, 2, 2, 2), num_classes, dtype)


def imagenet_vgg16(num_classes: int, dtype: Dtype = None) -> ImageNetVGG:
  return ImageNetVGG((2, 2, 3, 3, 3), num_classes, dtype)


def imagenet_vgg19(num_classes: int, dtype: Dtype = None) -> ImageNetVGG:
  return ImageNetVGG((2, 2, 4, 4, 4), num_classes, dtype)
