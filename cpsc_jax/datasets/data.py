"""What every data set is: a description, an evaluation split, a training split and a validation part of it."""

import abc
import dataclasses
import hashlib
import math
import unicodedata
from collections.abc import Sequence

import jax
import numpy as np

from cpsc_jax.errors import Refusal

EVALUATION_SPLITS = ("test", "validation")
VALIDATION_SEED = 20
LONG_TAIL_SEED = 21
LARGEST_STATISTIC = 4.0  # of a mean or a deviation of pixels in [0, 1]; one of pixels up to 255 is larger


@dataclasses.dataclass(frozen=True)
class Dataset:
  """What is known about a data set before it is opened.

  Attributes:
    num_classes, image_size, channels: the shape of the problem; images are square.
    mean, std: per channel, of the training pixels scaled to [0, 1]; a teacher trained on the data set is normalised
      with them. None without a training split: a given teacher has its own.
    sizes: number of images per split; a data set without "train" has no training split.
    test_split: the published split that serves as the test split.
    photographs: whether random crops and flips keep the class; a flipped digit is no longer that digit.
    bundled: prepared automatically on first use, from an installed package.
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

  def wrong(self) -> str:
    """What one of these, read from a file, has that it cannot have; an empty text if it is right."""
    numbers = {"num_classes": self.num_classes, "image_size": self.image_size, "channels": self.channels}
    for key, value in {**numbers, **(self.sizes if isinstance(self.sizes, dict) else {"sizes": None})}.items():
      if type(value) is not int or value < 1:
        return f"{key} is {value!r}"
    if type(self.photographs) is not bool or self.test_split not in self.sizes:
      return "photographs or test_split is wrong"
    for key, values in (("mean", self.mean), ("std", self.std)):
      numeric = isinstance(values, tuple) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
      if values is not None and not (numeric and len(values) == self.channels and (key == "mean" or min(values) > 0)):
        return f"{key} is {values!r}"
    return ""

  @property
  def image_shape(self) -> tuple[int, int, int]:
    return (self.image_size, self.image_size, self.channels)

  @property
  def validation_size(self) -> int:
    """How many training images are the validation part: a fifth of fewer than 10,000, a tenth of more."""
    train = self.sizes.get("train", 0)
    return train // (5 if train < 10_000 else 10)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
  """images (N, H, W, K) uint8 and labels (N,) int32 on the device."""

  images: jax.Array
  labels: jax.Array

  def __len__(self) -> int:
    return self.labels.shape[0]

  def digest(self) -> str:
    """sha256 of all images and labels, hex."""
    total = hashlib.sha256(f"{self.images.shape}".encode())
    for array in (self.images, self.labels):
      total.update(np.ascontiguousarray(array))
    return total.hexdigest()

  def put(self, sharding: jax.sharding.Sharding) -> "Split":
    """The same split, placed by a sharding."""
    return Split(*jax.device_put((self.images, self.labels), sharding))


def check_names(where: object, classes: Sequence[str]) -> None:
  """Refuses names of classes that cannot be told apart, or printed, later."""
  known: dict[str, str] = {}
  for name in classes:
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    if not name.isprintable() or name != name.strip():
      raise Refusal(f"class {name!r} in {where} has blanks at an end or characters that cannot be printed; rename it.")
    if plain in known:
      raise Refusal(f"classes '{known[plain]}' and '{name}' in {where} differ in blanks or case alone; rename one.")
    known[plain] = name


class Data(abc.ABC):
  """A data set: what is known about it and how its splits are loaded.

  Evaluation uses one of EVALUATION_SPLITS. "test" is the test split; training then uses the whole training split.
  "validation" is a part of the training split (`Dataset.validation_size` images, see `is_held_out`); training then
  uses the rest, though `mean` and `std` remain those of the whole. Choose settings on "validation" and evaluate on
  "test" once, at the end.

  Attributes:
    name: what messages, records and files call it.
    spec: its `Dataset`.
  """

  name: str
  spec: Dataset

  @abc.abstractmethod
  def require(self) -> None:
    """Raises a Refusal that names the preparing command unless the data set can be loaded."""

  @abc.abstractmethod
  def class_names(self) -> list[str]:
    """The names of the classes, in the order of their labels."""

  def load_evaluation(self, split: str) -> Split:
    """The images to evaluate on; `split` is "test" or "validation".

    Raises:
      Refusal: no such split, or it cannot be read.
    """
    self.check_split(split)
    if split == "test":
      return self._load(self.spec.test_split)
    return self._load("train", np.flatnonzero(is_held_out(self.spec)))

  def load_train(self, split: str) -> Split:
    """The images to train on when `split` is evaluated. A test checks that only `cpsc_jax.teach` calls it.

    Raises:
      Refusal: no training split, or it cannot be read.
    """
    if "train" not in self.spec.sizes:
      raise Refusal(f"data set '{self.name}' has no training split; it can only be evaluated on.")
    self.check_split(split)
    if split == "test":
      return self._load("train")
    return self._load("train", np.flatnonzero(~is_held_out(self.spec)))

  def labels(self, split: str) -> np.ndarray:
    """The labels of a stored split, in its order: (N,) int32."""
    return np.asarray(self._load(split).labels)

  def check_split(self, split: str) -> None:
    """Raises a Refusal of an evaluation split that there is not."""
    if split not in EVALUATION_SPLITS:
      raise Refusal(f"the evaluation split must be one of {', '.join(EVALUATION_SPLITS)}, got '{split}'.")
    if split == "validation" and not self.spec.validation_size:
      train = self.spec.sizes.get("train", 0)
      have = f"only {train} training images" if train else "no training split"
      raise Refusal(f"data set '{self.name}' has {have} to hold a validation part out of; evaluate on 'test' instead.")

  @abc.abstractmethod
  def _load(self, split: str, rows: np.ndarray | None = None) -> Split:
    """A stored split: all of it, or the images with indices `rows`, in this order."""


def is_held_out(spec: Dataset) -> np.ndarray:
  """Which images of the training split, in the order in which it is stored, are the validation part: (N,) bool.

  The choice depends on nothing but the number of images. It uses the raw output of PCG64, which NumPy guarantees to
  stay the same between versions, unlike that of its permutations.
  """
  train = spec.sizes.get("train", 0)
  order = np.argsort(np.random.PCG64(VALIDATION_SEED).random_raw(train), kind="stable")
  held_out = np.zeros(train, bool)
  held_out[order[: spec.validation_size]] = True
  return held_out


def long_tail(labels: np.ndarray, num_classes: int, imbalance: float) -> np.ndarray:
  """Which of some training images make a long-tailed training split, in their order: indices (M,).

  Class c, in the order of the labels, keeps floor(n * imbalance^(-c / (C - 1))) of its images, where n is how many
  class 0 has (the exponential profile of Cui et al., CVPR 2019, arXiv 1901.05555, section 5.1); or all of them, where
  it has fewer. The choice depends on nothing but the labels.

  Args:
    labels: of the images, (N,).
    imbalance: how many times as many images the first class has as the last; at least 1, and 1 keeps all images.

  Raises:
    Refusal: a class would be left without an image, or there are less than three classes.
  """
  if imbalance == 1:
    return np.arange(len(labels))
  if num_classes < 3:
    raise Refusal(f"config.dataset.imbalance is {imbalance:g}, which needs at least 3 classes; set it to 1.")
  there = np.bincount(labels, minlength=num_classes)
  profile = there[0] * imbalance ** (-np.arange(num_classes) / (num_classes - 1))
  wanted = np.minimum(np.floor(profile + 1e-9).astype(int), there)  # 500 / 100 is not to become 4
  if not wanted.all():
    largest = f"at most {there[0]}" if there.all() else "1"
    raise Refusal(
      f"config.dataset.imbalance is {imbalance:g}, which leaves class {int(np.argmin(wanted))} without a training"
      f" image: the first class has {there[0]}; set it to {largest}."
    )
  order = np.argsort(np.random.PCG64(LONG_TAIL_SEED).random_raw(len(labels)), kind="stable")
  kept = [order[labels[order] == label][:number] for label, number in enumerate(wanted)]
  return np.sort(np.concatenate(kept))


def thirds(images_per_class: Sequence[int]) -> dict[str, list[int]]:
  """{"head", "middle", "tail"}: the classes by their number of training images (C,), most first, in equal thirds.

  Where the classes are no multiple of three, the first thirds have one more.
  """
  order = np.argsort(-np.asarray(images_per_class), kind="stable")
  parts = np.array_split(order, 3)
  return {name: sorted(map(int, part)) for name, part in zip(("head", "middle", "tail"), parts, strict=True)}
