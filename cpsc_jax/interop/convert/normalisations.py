"""How a teacher's inputs were normalised, told from the statistics that its first batch norm has stored.

Those are the moments of one linear function of the training images, so that with images like these at hand, labelled or
not, the right normalisation reproduces them and others do not.
"""

import dataclasses
import functools
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import datasets, nets
from cpsc_jax.datasets import folders
from cpsc_jax.errors import Refusal
from cpsc_jax.state import Tree

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation per channel, of pixels in [0, 1]

KNOWN: dict[str, Statistics] = {
  "most CIFAR-10 code": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
  "CIFAR-10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
  "CIFAR-100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
  "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
  "-1 to 1": ((0.5,), (0.5,)),
  "0 to 1": ((0.0,), (1.0,)),
}
NUMBER, FEWEST = 1000, 50  # images that are looked at, and that are needed
AT_ONCE, MOST = 250 * 32**2, 2**28  # pixels of images that are looked at together; bytes that are read from a folder
CLOSE = 0.01  # the largest distance at which a normalisation can be the right one
APART = 3.0  # how much farther the next must be for a sure choice
DEAD = 1e-6  # variance of a channel that says nothing


@dataclasses.dataclass(frozen=True)
class Match:
  """How well one normalisation fits: the distance of moments, in nats per channel, and whether with random crops."""

  name: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  distance: float
  cropped: bool


def candidates(channels: int, own: Mapping[str, Statistics | None]) -> dict[str, Statistics]:
  """What is tried, by name: KNOWN, then `own` ones with other numbers."""
  found: dict[str, Statistics] = {}
  for name, statistics in [*KNOWN.items(), *own.items()]:
    if statistics is None:
      continue
    mean, std = (tuple(values) * (channels if len(values) == 1 else 1) for values in statistics)
    if len(mean) == len(std) == channels and not any(same((mean, std), other) for other in found.values()):
      found[name] = (mean, std)
  return found


def same(statistics: Statistics, other: Statistics) -> bool:
  """Whether two normalisations are one but for rounding."""
  return np.allclose(statistics, other, atol=2e-3)


def rank(net: Any, variables: Tree, images: np.ndarray, tried: Mapping[str, Statistics]) -> list[Match]:
  """The candidates, the best first; empty for a net without batch norm.

  The distance is the Kullback-Leibler divergence between normal distributions with the moments of the first batch
  norm's input and with those it has stored, the mean over its channels. Each candidate is tried on the images as they
  are and with the random crops and flips that most training has, and counts with the better of both.

  Args:
    images: (N, H, W, K) uint8, like those that the net was trained on.
  """
  layers = []

  def observe(x: jax.Array) -> None:
    layers.extend(getattr(nets.forward_observed(net, variables, x).statistics, "seen", ()))

  jax.eval_shape(observe, jnp.zeros((2, *images.shape[1:])))
  if not layers:
    return []
  first = layers[0]  # in the order in which they are applied
  stored = functools.reduce(operator.getitem, first, variables["batch_stats"])

  @jax.jit
  def distance(batches: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    def moments(batch):
      seen = nets.forward_observed(net, variables, (batch / 255 - mean) / std).statistics.seen[first]
      return seen["mean"], seen["var"]

    means, variances = jax.lax.map(moments, batches)  # one by one: images of ImageNet's size would fill the memory
    mean, var = means.mean(0), variances.mean(0) + means.var(0)
    each = jnp.log(stored["var"] / var) + (var + (mean - stored["mean"]) ** 2) / stored["var"] - 1
    return jnp.mean(each / 2, where=stored["var"] > DEAD)

  number = min(NUMBER, len(images))
  batch = min(max(1, AT_ONCE // images.shape[1] ** 2), number)
  chosen = images[np.linspace(0, len(images) - 1, number // batch * batch).astype(int)]
  views = {
    cropped: jnp.asarray(view.reshape(-1, batch, *images.shape[1:]))
    for cropped, view in ((False, chosen), (True, augmented(chosen)))
  }
  found = []
  for name, (mean, std) in tried.items():
    distances = {cropped: float(distance(x, jnp.asarray(mean), jnp.asarray(std))) for cropped, x in views.items()}
    cropped = min(distances, key=distances.get)
    found.append(Match(name, tuple(mean), tuple(std), distances[cropped], cropped))
  return sorted(found, key=lambda match: match.distance)


def augmented(images: np.ndarray) -> np.ndarray:
  """Random crops after padding by an eighth of black pixels, and random flips; the same for the same images."""
  random, side = np.random.default_rng(0), images.shape[1]
  pad = side // 8
  padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  corners = random.integers(0, 2 * pad + 1, (len(images), 2))
  crops = np.stack([image[y : y + side, x : x + side] for image, (y, x) in zip(padded, corners, strict=True)])
  flips = random.random(len(images)) < 0.5
  return np.where(flips[:, None, None, None], crops[:, :, ::-1], crops)


def is_sure(matches: Sequence[Match]) -> bool:
  """Whether the first fits, and no other nearly as well."""
  return matches[0].distance < CLOSE and (len(matches) < 2 or matches[1].distance > APART * matches[0].distance)


def images_below(folder: str | pathlib.Path, image_size: int, channels: int) -> np.ndarray:
  """Up to NUMBER PNG or JPEG images below a folder, (N, S, S, K) uint8, resized to `image_size` where they are not.

  Raises:
    Refusal: fewer than FEWEST, or one that cannot be read.
  """
  paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.suffix.lower() in folders.SUFFIXES and p.is_file())
  if len(paths) < FEWEST:
    raise Refusal(f"--images {folder} has {len(paths)} PNG or JPEG images; give a folder with {FEWEST} or more.")
  mode = folders.MODES.get(channels)
  if mode is None:
    raise Refusal(f"--images reads images of 1 or 3 channels, and this net takes {channels}; give --mean and --std.")
  most = max(FEWEST, min(NUMBER, MOST // (image_size**2 * channels)))
  some = paths[:: -(-len(paths) // most)]
  read = [np.asarray(folders.read(path, image_size, mode)) for path in some]
  return np.stack(read).reshape(len(some), image_size, image_size, channels)


def images_of(data: str, data_dir: str) -> np.ndarray:
  """The test images of a prepared data set, (N, H, W, K) uint8."""
  return np.asarray(datasets.find(data, data_dir).load_evaluation("test").images)
