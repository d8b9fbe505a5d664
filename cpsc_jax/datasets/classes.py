"""Some classes of a data set, as one phase of class-incremental learning sees them."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from cpsc_jax.datasets.data import Data, Split, is_held_out


class Classes(Data):
  """The first classes of a data set in an order of one's own: all of them to evaluate on, the last of them to train on.

  A label is the place of its class in the order. Of images of other classes nothing is read.
  """

  def __init__(self, base: Data, order: Sequence[int], known: int, seen: int):
    """Reads the labels of `base`, and no image.

    Args:
      base: the whole data set, which must have a training split.
      order: its classes, a permutation.
      known: training images of the first so many classes are not opened.
      seen: the classes that there are, `known` and new ones.
    """
    self.name, self.base = base.name, base
    self.order, self.known = tuple(order), known
    self._place = np.empty(base.spec.num_classes, np.int32)  # class of `base` -> label
    self._place[list(order)] = np.arange(len(order))
    sizes = {
      split: len(self._rows(split, first, seen)) for split, first in ((base.spec.test_split, 0), ("train", known))
    }
    self.spec = dataclasses.replace(base.spec, num_classes=seen, sizes=sizes, bundled=False)

  def require(self) -> None:
    self.base.require()

  def class_names(self) -> list[str]:
    names = self.base.class_names()
    return [names[each] for each in self.order[: self.spec.num_classes]]

  def load_evaluation(self, split: str) -> Split:
    self.base.check_split(split)
    if split == "test":
      return self._read(self.base.spec.test_split, 0, self.spec.num_classes)
    return self._read("train", 0, self.spec.num_classes, is_held_out(self.base.spec))

  def load_train(self, split: str) -> Split:
    return self._read("train", self.known, self.spec.num_classes, self._trained_on(split))

  def load_kept(self, split: str, each: int) -> Split:
    """The first `each` training images of every known class, for the control arm that keeps real images.

    A test checks that only `cpsc_jax.teach` calls it.
    """
    among = self._trained_on(split)
    rows = [self._rows("train", label, label + 1, among)[:each] for label in range(self.known)]
    return self._of_rows("train", np.sort(np.concatenate(rows)))

  def _trained_on(self, split: str) -> np.ndarray | None:
    """Which training images there are to train on when `split` is evaluated; None: all."""
    self.base.check_split(split)
    return None if split == "test" else ~is_held_out(self.base.spec)

  def _load(self, split: str, rows: np.ndarray | None = None) -> Split:
    everything = np.arange(self.base.spec.sizes[split])
    return self._of_rows(split, everything if rows is None else rows)

  def _read(self, split: str, first: int, end: int, among: np.ndarray | None = None) -> Split:
    return self._of_rows(split, self._rows(split, first, end, among))

  def _of_rows(self, split: str, rows: np.ndarray) -> Split:
    found = self.base._load(split, rows)
    return Split(found.images, jnp.asarray(self._place[np.asarray(found.labels)]))

  def _rows(self, split: str, first: int, end: int, among: np.ndarray | None = None) -> np.ndarray:
    """The images with labels from `first` to below `end`, of those `among` which are wanted ((N,) bool; None: all)."""
    labels = self._place[self.base.labels(split)]
    wanted = (labels >= first) & (labels < end)
    return np.flatnonzero(wanted if among is None else wanted & among)
