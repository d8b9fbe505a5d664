"""The data sets as one table, and their splits as device-resident arrays.

A data set is a row of DATASETS and a TFDS builder; array_record files are read without TensorFlow. `load_test` serves
evaluation; `load_train` is for `cpsc_jax.teach` alone.
"""

import dataclasses
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax.errors import Refusal


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What is known about a data set before it is opened.

  Attributes:
    num_classes, image_size, channels: the shape of the problem; images are square.
    mean, std: per channel, of training pixels scaled to [0, 1]; the default normalisation of a teacher.
    test_split: the split that is evaluated on.
    sizes: images in each split.
    photographs: whether random crops and flips keep the label; digits do not survive a flip.
    bundled: prepared by itself on first use, from an installed package.
  """

  num_classes: int
  image_size: int
  channels: int
  mean: tuple[float, ...]
  std: tuple[float, ...]
  sizes: dict[str, int]
  test_split: str = "test"
  photographs: bool = True
  bundled: bool = False

  @property
  def image_shape(self):
    return (self.image_size, self.image_size, self.channels)


DATASETS = {
  "digits": Dataset(10, 8, 1, (0.3057,), (0.3762,), {"train": 1343, "test": 454}, photographs=False, bundled=True),
  "cifar10": Dataset(10, 32, 3, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), {"train": 50000, "test": 10000}),
  "cifar100": Dataset(100, 32, 3, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), {"train": 50000, "test": 10000}),
  "svhn_cropped": Dataset(
    10, 32, 3, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), {"train": 73257, "test": 26032}
  ),
  "tiny_imagenet": Dataset(
    200, 64, 3, (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821), {"train": 100000, "validation": 10000}, "validation"
  ),
}


@dataclasses.dataclass(frozen=True)
class Split:
  """images (N, H, W, K) uint8 and labels (N,) int32 on the device."""

  images: jax.Array
  labels: jax.Array

  def __len__(self):
    return self.labels.shape[0]

  def put(self, sharding):
    """The same split, placed by a sharding."""
    return Split(*jax.device_put((self.images, self.labels), sharding))


def describe(name):
  """The row of DATASETS called `name`; a Refusal if there is none."""
  if name not in DATASETS:
    raise Refusal(f"no data set '{name}'; choose one of {', '.join(DATASETS)}.")
  return DATASETS[name]


def resolve_data_dir(data_dir):
  """The directory that prepared data sets live in: as given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
  return os.path.abspath(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def require(name, data_dir):
  """Makes sure, at once and offline, that a data set is prepared; bundled ones are prepared here.

  Raises:
    Refusal: unknown name, or not prepared; the message names the preparing command.
  """
  spec = describe(name)
  data_dir = resolve_data_dir(data_dir)
  builder = _builder(name, data_dir)
  if builder.is_prepared():
    _check_sizes(builder, name, spec, data_dir)
  elif spec.bundled:
    from cpsc_jax.datasets.prepare import prepare

    prepare(name, data_dir)
  else:
    raise Refusal(
      f"data set '{name}' is not prepared in {data_dir}; run: python -m cpsc_jax.datasets.prepare {name}"
      f" --data_dir {data_dir} --from ARCHIVE"
    )


def load_test(name, data_dir):
  """The split of `name` that is evaluated on, whole, as a `Split`."""
  return _load(name, describe(name).test_split, data_dir)


def load_train(name, data_dir):
  """The training split. Data-free code must not call this: tests hold that only `cpsc_jax.teach` does."""
  return _load(name, "train", data_dir)


def normalise(images, mean, std):
  """uint8 (..., K) -> float32, (x / 255 - mean) / std per channel."""
  return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def denormalise(x, mean, std):
  """The inverse of `normalise` for display: values in [0, 1], clipped."""
  return np.clip(np.asarray(x) * np.asarray(std) + np.asarray(mean), 0.0, 1.0)


def augment(key, images, pad, flip, fill=0):
  """Random crops after padding by `pad` pixels of `fill` and, if `flip`, random horizontal flips of (N, H, W, K).

  `fill` is a number or one per channel, black in the images' own scale.
  """
  key_crop, key_flip = jax.random.split(key)
  if pad:
    n, h, w, k = images.shape
    canvas = jnp.broadcast_to(jnp.asarray(fill, images.dtype), (n, h + 2 * pad, w + 2 * pad, k))
    padded = canvas.at[:, pad : pad + h, pad : pad + w].set(images)
    corners = jax.random.randint(key_crop, (n, 2), 0, 2 * pad + 1)
    crop = lambda image, corner: jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, k))
    images = jax.vmap(crop)(padded, corners)
  if flip:
    flipped = jax.random.bernoulli(key_flip, shape=(images.shape[0], 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  return images


def _load(name, split, data_dir):
  source = _builder(name, resolve_data_dir(data_dir)).as_data_source(split=split)
  images = np.empty((len(source), *describe(name).image_shape), np.uint8)
  labels = np.empty((len(source),), np.int32)
  for i, example in enumerate(source):
    images[i], labels[i] = example["image"], example["label"]
  return Split(jnp.asarray(images), jnp.asarray(labels))


def _builder(name, data_dir):
  logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of every folder that is not there yet
  from cpsc_jax.datasets import builders

  return builders.BUILDERS[name](data_dir=data_dir, file_format="array_record")


def _check_sizes(builder, name, spec, data_dir):
  have = {split: info.num_examples for split, info in builder.info.splits.items()}
  if any(have.get(split) != size for split, size in spec.sizes.items()):
    raise Refusal(
      f"data set '{name}' in {data_dir} has splits {have}, not {spec.sizes}; delete {builder.data_dir} and prepare it"
      " again."
    )
