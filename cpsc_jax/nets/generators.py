"""Class-conditional generators: every normalisation is a `CategoricalBatchNorm`, so the label enters everywhere.

With one class they are unconditional. `Pixels` is for methods that optimise images directly.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cpsc_jax.nets.convolution import after_upsampling, conv_general_dilated, transposed
from cpsc_jax.nets.layers import BatchNorm, CategoricalBatchNorm, Dtype, conv, linear, torch_uniform
from cpsc_jax.state import Tree, at_least_float32

SLOPE = 0.2


@dataclasses.dataclass(frozen=True)
class Form:
  """What the generators of different papers have in common but for this.

  Attributes:
    output: "tanh" ends as the published code of CPSC-DFKD; "sigmoid" makes pixels in [0, 1], which are then normalised
      by `mean` and `std`, as in CMI, FastDFKD and RGAL.
    epsilon: of all batch norms; 0: the net's own.
    init: "torch" has PyTorch's defaults; "normal" draws kernels from N(0, 0.02) and scales from N(1, 0.02), as those
      methods do when they start a generator anew. `dcgan` has kernels from N(0, 0.02) in any case.
    mean, std: of the teacher's input, per channel, of pixels in [0, 1].
  """

  output: str = "tanh"
  epsilon: float = 0.0
  init: str = "torch"
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()

  @classmethod
  def of(cls, options: Mapping[str, Any], card: Mapping[str, Any]) -> "Form":
    """The form that a config's section or a card asks for. `card` has mean and std."""
    chosen = {name: options[name] for name in ("output", "epsilon", "init")}
    return cls(**chosen, mean=tuple(card.get("mean", ())), std=tuple(card.get("std", ())))

  def norm(self, num_classes: int, own: float, name: str, affine: bool = True) -> CategoricalBatchNorm:
    """A categorical batch norm whose epsilon is `own` unless the form has another."""
    scale = _normal(1.0) if self.init == "normal" else nn.initializers.ones
    epsilon = self.epsilon or own
    return CategoricalBatchNorm(num_classes=num_classes, epsilon=epsilon, affine=affine, scale_init=scale, name=name)

  def pixels(self, x: jax.Array) -> jax.Array:
    """What a sigmoid makes of the last layer's output, normalised, in at least float32."""
    x = nn.sigmoid(at_least_float32(x))
    return (x - jnp.asarray(self.mean, x.dtype)) / jnp.asarray(self.std, x.dtype)


PLAIN = Form()  # as in the published code of CPSC-DFKD


def _normal(mean: float = 0.0) -> nn.initializers.Initializer:
  def init(key, shape, dtype=jnp.float32, **_):
    return mean + 0.02 * jax.random.normal(key, shape, dtype)

  return init


def redrawn(params: Tree, key: jax.Array) -> Tree:
  """A generator's parameters with its linear layer and its first norm drawn anew, kernel and scale from N(0, 0.02).

  FastDFKD's published code does so once; the scale's mean of 0, not 1, is its own.
  """
  key_kernel, key_scale = jax.random.split(key)

  def normal(key: jax.Array, leaf: jax.Array) -> jax.Array:
    return 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)

  project, norm = params["project"], params["cbn0"]
  new = {
    "project": {"kernel": normal(key_kernel, project["kernel"]), "bias": jnp.zeros_like(project["bias"])},
    "cbn0": {"scale": normal(key_scale, norm["scale"]), "bias": jnp.zeros_like(norm["bias"])},
  }
  return {**params, **new}


class CifarGenerator(nn.Module):
  """(latent (N, nz), labels (N,)) -> images (N, H, H, channels), normalised as the teacher's, for H divisible by 4.

  Generator "D" of the published CPSC-DFKD code: two nearest-neighbour upsamplings with 3x3 convolutions. The last
  categorical batch norm follows the tanh, so the output is not bounded by 1. With one class it has no scale and bias,
  as in DFAD's generator: an adversarial loss would increase the contrast without bound. A `form` that ends in a sigmoid
  has no norm there.
  """

  num_classes: int
  image_size: int
  channels: int = 3
  width: int = 64
  dtype: Dtype = None
  form: Form = PLAIN

  divisor = 4

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
    def cbn(x, name, affine=True):
      return self.form.norm(self.num_classes, 1e-3, name, affine)(x, labels, train)

    def conv3x3(features, fan_in, name, form=conv_general_dilated):
      init = torch_uniform(9 * fan_in)
      kernel, bias = (_normal(), nn.initializers.zeros) if self.form.init == "normal" else (init, init)
      return conv(features, use_bias=True, dtype=self.dtype, init=kernel, bias_init=bias, name=name, form=form)

    side, wide, narrow = self.image_size // 4, 2 * self.width, self.width
    if self.form.init == "normal":
      project = nn.Dense(wide * side * side, dtype=self.dtype, kernel_init=_normal(), name="project")
    else:
      project = linear(wide * side * side, z.shape[-1], dtype=self.dtype, name="project")
    x = cbn(project(z).reshape(-1, side, side, wide), "cbn0")
    x = nn.leaky_relu(cbn(conv3x3(wide, wide, "conv1", after_upsampling)(x), "cbn1"), SLOPE)
    x = nn.leaky_relu(cbn(conv3x3(narrow, wide, "conv2", after_upsampling)(x), "cbn2"), SLOPE)
    x = conv3x3(self.channels, narrow, "conv3")(x)
    if self.form.output == "sigmoid":
      return self.form.pixels(x)
    x = nn.tanh(x)
    return cbn(at_least_float32(x), "cbn3", affine=self.num_classes > 1)


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
  form: Form = PLAIN

  divisor = 16

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
    normal = nn.initializers.normal(0.02)

    def cbn(x, eps, name):
      return self.form.norm(self.num_classes, eps, name)(x, labels, train)

    side, wide = self.image_size // 16, 8 * self.width
    x = nn.Dense(wide * side * side, dtype=self.dtype, kernel_init=normal, name="project")(z)
    x = cbn(x.reshape(-1, side, side, wide), 1e-3, "cbn0")
    for index, multiple in enumerate((4, 2, 1, 1), start=1):
      options = {"padding": 1, "init": normal, "dtype": self.dtype, "name": f"conv{index}", "form": transposed}
      x = conv(multiple * self.width, 4, 2, **options)(x)
      x = nn.leaky_relu(cbn(x, 0.8, f"cbn{index}"), SLOPE)
    x = conv(self.channels, use_bias=True, dtype=self.dtype, init=normal, name="conv5")(x)
    if self.form.output == "sigmoid":
      return self.form.pixels(x)
    return nn.tanh(at_least_float32(x))


class Pixels(nn.Module):
  """(latent (N, H H channels), labels) -> the same numbers as images (N, H, H, channels): no parameters.

  Optimising its latent is optimising pixels (DeepInversion).
  """

  num_classes: int
  image_size: int
  channels: int = 3
  width: int = 64
  dtype: Dtype = None
  form: Form = PLAIN

  divisor = 1

  @property
  def latent_dim(self) -> int:
    return self.image_size**2 * self.channels

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
    return z.reshape(-1, self.image_size, self.image_size, self.channels)


class NoisyLayers(nn.Module):
  """(nothing (N, 0), labels (N,)) -> images of `generator`: random layers stand between it and an embedding of classes.

  The input of NAYER (Tran et al., CVPR 2024, section 3): the embedding of each label is batch-normalised and goes
  through one of `layers` linear layers, whose weights are drawn from N(0, 1), and what comes out, (N, width), takes the
  place of latents. Each layer serves `num_classes` samples, one after the other, so that a batch of whole lists of
  classes has every class once from each.

  The embedding, (num_classes, embedding_dim), is a parameter if it is `learned`; else it is kept in the collection
  "batch_stats", which no optimiser touches. There it is one-hot, unless `with_embedding` puts another in its place.
  """

  generator: nn.Module
  num_classes: int
  width: int
  layers: int
  embedding_dim: int
  learned: bool = False

  latent_dim = 0

  @property
  def form(self) -> Form:
    return self.generator.form

  @nn.compact
  def __call__(self, z: jax.Array, labels: jax.Array, train: bool) -> jax.Array:
    shape = (self.num_classes, self.embedding_dim)
    if self.learned:
      table = self.param("embedding", nn.initializers.normal(1.0), shape)
    else:
      table = self.variable("batch_stats", "embedding", jnp.eye, *shape, dtype=jnp.float32).value
    x = BatchNorm(name="norm")(table[labels], train)
    kernel, bias = _Noise(self.layers, self.width, name="noisy")(x)
    number, each = x.shape[0], self.num_classes
    groups = -(-number // each)
    x = jnp.pad(x, ((0, groups * each - number), (0, 0))).reshape(groups, each, -1)
    used = jnp.arange(groups) % self.layers
    x = jnp.einsum("gcd,gdw->gcw", x, kernel[used]) + bias[used][:, None]
    return self.generator(x.reshape(groups * each, -1)[:number], labels, train)


class _Noise(nn.Module):
  layers: int
  width: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    kernel = self.param("kernel", nn.initializers.normal(1.0), (self.layers, x.shape[-1], self.width))
    return kernel, self.param("bias", nn.initializers.zeros, (self.layers, self.width))


def with_embedding(batch_stats: Tree, rows: jax.Array) -> Tree:
  """The batch statistics of `NoisyLayers` with an embedding (num_classes, embedding_dim)."""
  return {**batch_stats, "embedding": rows.astype(batch_stats["embedding"].dtype)}
