"""Class-conditional generators: every normalisation is a `CategoricalBatchNorm`, so the label enters everywhere.

With one class they are unconditional. `Pixels` is for methods that optimise images directly.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cpsc_jax.nets.convolution import SAVED
from cpsc_jax.nets.layers import CategoricalBatchNorm, Dtype, conv, linear, torch_uniform, upsample

SLOPE = 0.2


class CifarGenerator(nn.Module):
  """(latent (N, nz), labels (N,)) -> images (N, H, H, channels), normalised as the teacher's, for H divisible by 4.

  Generator "D" of the published CPSC-DFKD code: two nearest-neighbour upsamplings with 3x3 convolutions. The last
  categorical batch norm follows the tanh, so the output is not bounded by 1. With one class it has no scale and bias,
  as in DFAD's generator: an adversarial loss would increase the contrast without bound.
  """

  num_classes: int
  image_size: int
  channels: int = 3
  width: int = 64
  dtype: Dtype = None

  divisor = 4

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
    def cbn(x, name, affine=True):
      return CategoricalBatchNorm(num_classes=self.num_classes, affine=affine, name=name)(x, labels, train)

    side, wide, narrow = self.image_size // 4, 2 * self.width, self.width
    x = linear(wide * side * side, z.shape[-1], dtype=self.dtype, name="project")(z)
    x = cbn(x.reshape(-1, side, side, wide), "cbn0")
    x = nn.leaky_relu(cbn(_conv(wide, wide, self.dtype, "conv1")(upsample(x)), "cbn1"), SLOPE)
    x = nn.leaky_relu(cbn(_conv(narrow, wide, self.dtype, "conv2")(upsample(x)), "cbn2"), SLOPE)
    x = nn.tanh(_conv(self.channels, narrow, self.dtype, "conv3")(x))
    return cbn(x.astype(jnp.promote_types(x.dtype, jnp.float32)), "cbn3", affine=self.num_classes > 1)


class DCGANGenerator(nn.Module):
  """(latent (N, nz), labels (N,)) -> images (N, H, H, channels) bounded by tanh, for H divisible by 16.

  Generator "C" of the published CPSC-DFKD code: four transposed convolutions after Radford et al., ICLR 2016; their
  categorical batch norms have eps 0.8.
  """

  num_classes: int
  image_size: int
  channels: int = 3
  width: int = 64
  dtype: Dtype = None

  divisor = 16

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
    normal = nn.initializers.normal(0.02)

    def cbn(x, eps, name):
      return CategoricalBatchNorm(num_classes=self.num_classes, epsilon=eps, name=name)(x, labels, train)

    side, wide = self.image_size // 16, 8 * self.width
    x = nn.Dense(wide * side * side, dtype=self.dtype, kernel_init=normal, name="project")(z)
    x = cbn(x.reshape(-1, side, side, wide), 1e-3, "cbn0")
    for index, multiple in enumerate((4, 2, 1, 1), start=1):
      # Padding 2 around the dilated input is PyTorch's padding 1 of a 4x4 transposed convolution.
      x = nn.ConvTranspose(
        multiple * self.width,
        (4, 4),
        (2, 2),
        padding=((2, 2), (2, 2)),
        use_bias=False,
        dtype=self.dtype,
        kernel_init=normal,
        name=f"conv{index}",
      )(x)
      x = nn.leaky_relu(cbn(checkpoint_name(x, SAVED), 0.8, f"cbn{index}"), SLOPE)
    x = conv(self.channels, use_bias=True, dtype=self.dtype, init=normal, name="conv5")(x)
    return nn.tanh(x.astype(jnp.promote_types(x.dtype, jnp.float32)))


class Pixels(nn.Module):
  """(latent (N, H H channels), labels) -> the same numbers as images (N, H, H, channels): no parameters.

  Optimising its latent is optimising pixels (DeepInversion).
  """

  num_classes: int
  image_size: int
  channels: int = 3
  width: int = 64
  dtype: Dtype = None

  divisor = 1

  @property
  def latent_dim(self) -> int:
    return self.image_size**2 * self.channels

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
    return z.reshape(-1, self.image_size, self.image_size, self.channels)


def _conv(features, fan_in, dtype, name):
  init = torch_uniform(9 * fan_in)
  return conv(features, use_bias=True, dtype=dtype, init=init, bias_init=init, name=name)
