"""The data sets, and their splits as device-resident arrays.

A data set is a row of DATASETS with a TFDS builder, or a folder of images that `datasets.prepare` took in under a name
of the user's. array_record files are read without TensorFlow. `load_test` serves evaluation; `load_train` is for
`cpsc_jax.teach` alone.
"""

import dataclasses
import json
import logging
import os

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax.errors import Refusal, first_line

FILE_FORMAT = "array_record"
OWN_VERSION = "1.0.0"  # of data sets of the user's; TFDS wants one
OWN_RECORD = "metadata.json"  # where TFDS keeps what a builder has to add: here, the `Dataset` of such a data set


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What is known about a data set before it is opened.

  Attributes:
    num_classes, image_size, channels: the shape of the problem; images are square.
    mean, std: per channel, of training pixels scaled to [0, 1]; what a teacher trained here is normalised with. None
      without a training split: a given teacher brings its own.
    sizes: images in each split; without "train" there is no training split.
    test_split: the split that is evaluated on.
    photographs: whether random crops and flips keep the label; digits do not survive a flip.
    bundled: prepared by itself on first use, from an installed package.
  """

  num_classes: int
  image_size: int
  channels: int
  mean: tuple[float, ...] | None
  std: tuple[float, ...] | None
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


def describe(name, data_dir):
  """What is known about data set `name`: its row of DATASETS, or what was prepared under `data_dir` by that name.

  Raises:
    Refusal: neither is there, or what is there cannot be read.
  """
  if name in DATASETS:
    return DATASETS[name]
  path = os.path.join(resolve_data_dir(data_dir), name, OWN_VERSION, OWN_RECORD)
  try:
    with open(path) as file:
      return Dataset(**{key: tuple(v) if isinstance(v, list) else v for key, v in json.load(file).items()})
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Refusal(
      f"no data set '{name}'; choose one of {', '.join(DATASETS)}, or prepare your own: python -m"
      f" cpsc_jax.datasets.prepare {name} --data_dir {resolve_data_dir(data_dir)} --from FOLDER"
    ) from error
  except (OSError, ValueError, TypeError) as error:
    raise Refusal(f"{path} is not what preparing data set '{name}' writes ({error}); prepare it again.") from error


def resolve_data_dir(data_dir):
  """The directory that prepared data sets live in: as given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
  return os.path.abspath(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def require(name, data_dir):
  """The TFDS builder that reads a data set, found at once and offline; bundled ones are prepared here.

  Raises:
    Refusal: unknown name, or not prepared; the message names the preparing command.
  """
  spec, data_dir = describe(name, data_dir), resolve_data_dir(data_dir)
  if spec.bundled and not prepared(name, data_dir):
    from cpsc_jax.datasets.prepare import prepare

    prepare(name, data_dir)
  builder = prepared(name, data_dir)
  if not builder:
    raise Refusal(
      f"data set '{name}' is not prepared in {data_dir}; run: python -m cpsc_jax.datasets.prepare {name}"
      f" --data_dir {data_dir} --from ARCHIVE"
    )
  check(builder, spec)
  return builder


def prepared(name, data_dir):
  """A TFDS builder that reads what is prepared as `name` under `data_dir`, or None where nothing is.

  Raises:
    Refusal: something is, but it is damaged.
  """
  logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of what it could do better with other packages
  import tensorflow_datasets as tfds

  from cpsc_jax.datasets import builders

  folder = os.path.join(data_dir, name, str(builders.BUILDERS[name].VERSION) if name in DATASETS else OWN_VERSION)
  if not os.path.exists(os.path.join(folder, "dataset_info.json")):
    return None
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # TFDS raises assorted types
    raise Refusal(f"{folder} is damaged ({first_line(error)}); delete it and prepare '{name}' again.") from error


def check(builder, spec):
  """Raises a Refusal unless what a TFDS builder wrote has the splits of `spec` and can be read without TensorFlow."""
  have = {split: info.num_examples for split, info in builder.info.splits.items()}
  if any(have.get(split) != size for split, size in spec.sizes.items()):
    raise Refusal(
      f"data set '{builder.name}' has splits {have}, not {spec.sizes}; delete {builder.data_dir} and prepare it again."
    )
  if builder.info.file_format.value != FILE_FORMAT:
    raise Refusal(
      f"{builder.data_dir} was written as {builder.info.file_format.value}, which only TensorFlow reads; prepare"
      f" '{builder.name}' in another --data_dir."
    )


def load_test(name, data_dir):
  """The split of `name` that is evaluated on, whole, as a `Split`."""
  return _load(name, describe(name, data_dir).test_split, data_dir)


def load_train(name, data_dir):
  """The training split. Data-free code must not call this: tests hold that only `cpsc_jax.teach` does."""
  return _load(name, "train", data_dir)


def class_names(name, data_dir):
  """What the classes are called, in the order of their labels."""
  return list(require(name, data_dir).info.features["label"].names)


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
  builder = require(name, data_dir)
  try:
    source = builder.as_data_source(split=split)
    images = np.empty((len(source), *describe(name, data_dir).image_shape), np.uint8)
    labels = np.empty((len(source),), np.int32)
    for i, example in enumerate(source):
      images[i], labels[i] = example["image"], example["label"]
  except Exception as error:  # array_record and TFDS raise assorted types for missing and damaged files
    raise Refusal(
      f"{builder.data_dir} is damaged ({first_line(error)}); delete it and prepare '{name}' again."
    ) from error
  return Split(jnp.asarray(images), jnp.asarray(labels))
