"""Data sets, and their splits as arrays on the device.

`find` returns the prepared data set of a name: a row of DATASETS, or a folder of images that was prepared under a name
of the user's. `InMemory` makes a data set of arrays. Both are a `Data`, whose `load_evaluation` is for evaluation and
whose `load_train` is for `cpsc_jax.teach` alone. Prepared files are array_record and are read without TensorFlow.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cpsc_jax import files
from cpsc_jax.datasets.arrays import InMemory
from cpsc_jax.datasets.classes import Classes
from cpsc_jax.datasets.data import (
  EVALUATION_SPLITS,
  LARGEST_STATISTIC,
  Data,
  Dataset,
  Split,
  is_held_out,
  long_tail,
  thirds,
)
from cpsc_jax.errors import Refusal, first_line
from cpsc_jax.progress import SECONDS_BETWEEN_LINES, say

if TYPE_CHECKING:
  import tensorflow_datasets as tfds

__all__ = [
  "DATASETS",
  "EVALUATION_SPLITS",
  "LARGEST_STATISTIC",
  "Classes",
  "Data",
  "Dataset",
  "InMemory",
  "Prepared",
  "Split",
  "augment",
  "denormalise",
  "find",
  "is_held_out",
  "long_tail",
  "normalise",
  "thirds",
]

FILE_FORMAT = "array_record"
OWN_VERSION = "1.0.0"  # of data sets prepared from the user's images; TFDS requires one
OWN_RECORD = "metadata.json"  # where TFDS stores the metadata of a builder: here, the `Dataset` of such a data set
READ_AT_ONCE = 500  # images
KEPT = (("label", "num_classes"), ("image", "shape"))  # what of a builder's features must be as a `Dataset` says

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


class Prepared(Data):
  """A data set that was prepared under `data_dir`, or a bundled one, which is prepared there on first use."""

  def __init__(self, name: str, data_dir: str):
    """Raises a Refusal if the name is neither a row of DATASETS nor that of a data set prepared in `data_dir`."""
    self.name, self.data_dir = name, resolve_data_dir(data_dir)
    self.spec = DATASETS[name] if name in DATASETS else _read_record(name, self.data_dir)
    self._labels: dict[str, np.ndarray] = {}

  def builder(self) -> "tfds.core.DatasetBuilder":
    """The TFDS builder that reads the data set, found within seconds and without a network.

    Raises:
      Refusal: not prepared, or damaged; the message names the preparing command.
    """
    if self.spec.bundled and not prepared(self.name, self.data_dir):
      from cpsc_jax.datasets.prepare import prepare

      prepare(self.name, self.data_dir)
    builder = prepared(self.name, self.data_dir)
    if not builder:
      raise Refusal(
        f"data set '{self.name}' is not prepared in {self.data_dir}; run: cpsc-jax prepare {self.name}"
        f" --data_dir {self.data_dir} --from ARCHIVE"
      )
    check(builder, self.spec)
    return builder

  def require(self) -> None:
    self.builder()

  def class_names(self) -> list[str]:
    return list(self.builder().info.features["label"].names)

  def labels(self, split: str) -> np.ndarray:
    """As `Data.labels`; no image is decoded."""
    if split not in self._labels:
      with self._reading() as builder:
        source = builder.as_data_source(split=split, decoders={"image": _skip()})
        self._labels[split] = np.array([example["label"] for example in source], np.int32)
    return self._labels[split]

  def _load(self, split: str, rows: np.ndarray | None = None) -> Split:
    with self._reading() as builder:
      source = builder.as_data_source(split=split)
      rows = np.arange(len(source)) if rows is None else rows
      images = np.empty((len(rows), *self.spec.image_shape), np.uint8)
      labels = np.empty((len(rows),), np.int32)
      last_line = time.monotonic()
      for start in range(0, len(rows), READ_AT_ONCE):
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
          say(f"reading {self.name}: {start:,} of {len(rows):,} images")
          last_line = time.monotonic()
        for i, example in enumerate(source.__getitems__(rows[start : start + READ_AT_ONCE].tolist()), start):
          images[i], labels[i] = example["image"], example["label"]
    return Split(jnp.asarray(images), jnp.asarray(labels))

  @contextlib.contextmanager
  def _reading(self) -> Iterator["tfds.core.DatasetBuilder"]:
    builder = self.builder()
    try:
      yield builder
    except Exception as error:  # array_record and TFDS raise various types for missing and damaged files
      raise Refusal(
        f"{builder.data_dir} is damaged ({first_line(error)}); delete it and prepare '{self.name}' again."
      ) from error


def find(name: str, data_dir: str) -> Data:
  """The data set of a name: a row of DATASETS, or what was prepared under `data_dir` by that name. Opens no images.

  Raises:
    Refusal: neither exists, or what was prepared cannot be read.
  """
  return Prepared(name, data_dir)


def resolve_data_dir(data_dir: str) -> str:
  """The folder of prepared data sets, absolute: as given, else $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
  return os.path.abspath(os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def prepared(name: str, data_dir: str) -> "tfds.core.DatasetBuilder | None":
  """A TFDS builder that reads what is prepared as `name` under `data_dir`, or None if nothing is.

  Raises:
    Refusal: what is prepared is damaged.
  """
  logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns about optional packages
  import tensorflow_datasets as tfds

  from cpsc_jax.datasets import builders

  folder = os.path.join(data_dir, name, str(builders.BUILDERS[name].VERSION) if name in DATASETS else OWN_VERSION)
  if not os.path.exists(os.path.join(folder, "dataset_info.json")):
    return None
  try:
    return tfds.builder_from_directory(folder)
  except Exception as error:  # TFDS raises various types
    raise Refusal(f"{folder} is damaged ({first_line(error)}); delete it and prepare '{name}' again.") from error


def check(builder: "tfds.core.DatasetBuilder", spec: Dataset) -> None:
  """Raises a Refusal unless what a TFDS builder wrote has the splits of `spec` and can be read without TensorFlow."""
  have = {split: info.num_examples for split, info in builder.info.splits.items()}
  if any(have.get(split) != size for split, size in spec.sizes.items()):
    raise Refusal(
      f"data set '{builder.name}' should have splits {spec.sizes}, but {builder.data_dir} has {have}; delete it and"
      " prepare it again."
    )
  features = builder.info.features or {}
  found = [getattr(features[key], name, None) for key, name in KEPT if key in features]
  if found != [spec.num_classes, spec.image_shape]:
    raise Refusal(
      f"data set '{builder.name}' should have {spec.num_classes} classes and images of {spec.image_shape}, but"
      f" {builder.data_dir} has {found}; delete it and prepare it again."
    )
  if builder.info.file_format.value != FILE_FORMAT:
    raise Refusal(
      f"{builder.data_dir} was written as {builder.info.file_format.value}, which only TensorFlow reads; prepare"
      f" '{builder.name}' in another --data_dir."
    )


def normalise(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
  """uint8 (..., K) -> float32, (x / 255 - mean) / std per channel."""
  return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def denormalise(x: ArrayLike, mean: ArrayLike, std: ArrayLike) -> np.ndarray:
  """The inverse of `normalise` for display: values in [0, 1], clipped."""
  return np.clip(np.asarray(x) * np.asarray(std) + np.asarray(mean), 0.0, 1.0)


def augment(key: jax.Array, images: jax.Array, pad: int, flip: bool, fill: ArrayLike = 0) -> jax.Array:
  """Random crops and, if `flip`, random horizontal flips of images (N, H, W, K).

  Args:
    key: of this use alone.
    pad: a crop may be shifted by so many pixels in each direction.
    fill: what the shift brings in, a number or one per channel: black in the images' own scale.
  """
  key_crop, key_flip = jax.random.split(key)
  if pad:
    n, h, w, k = images.shape
    canvas = jnp.broadcast_to(jnp.asarray(fill, images.dtype), (n, h + 2 * pad, w + 2 * pad, k))
    padded = canvas.at[:, pad : pad + h, pad : pad + w].set(images)
    corners = jax.random.randint(key_crop, (n, 2), 0, 2 * pad + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
      return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (h, w, k))

    images = jax.vmap(crop)(padded, corners)
  if flip:
    flipped = jax.random.bernoulli(key_flip, shape=(images.shape[0], 1, 1, 1))
    images = jnp.where(flipped, images[:, :, ::-1], images)
  return images


def jitter(key: jax.Array, images: jax.Array, shift: int, flip: bool) -> jax.Array:
  """Images (N, H, W, K), all rolled by the same up to `shift` pixels in each direction and, if `flip`, perhaps flipped.

  What leaves on one side enters on the other (DeepInversion, in its published code).
  """
  key_roll, key_flip = jax.random.split(key)
  images = jnp.roll(images, jax.random.randint(key_roll, (2,), -shift, shift + 1), axis=(1, 2))
  return jnp.where(jax.random.bernoulli(key_flip), images[:, :, ::-1], images) if flip else images


def _skip() -> Any:
  import tensorflow_datasets as tfds

  return tfds.decode.SkipDecoding()


def _read_record(name: str, data_dir: str) -> Dataset:
  """The `Dataset` of a folder of images that was prepared as `name`."""
  path = os.path.join(data_dir, name, OWN_VERSION, OWN_RECORD)
  try:
    record = Dataset(**{key: tuple(v) if isinstance(v, list) else v for key, v in files.read_json(path).items()})
    if wrong := record.wrong():
      raise ValueError(wrong)
    return record
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Refusal(
      f"no data set '{name}'; choose one of {', '.join(DATASETS)}, or prepare your own: cpsc-jax prepare {name}"
      f" --data_dir {data_dir} --from FOLDER"
    ) from error
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise Refusal(f"{path} was not written by preparing data set '{name}' ({error}); prepare it again.") from error
