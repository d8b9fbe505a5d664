"""A data set made of arrays."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from cpsc_jax.datasets.data import Data, Dataset, Split, check_names
from cpsc_jax.errors import Refusal


class InMemory(Data):
  """A data set made of arrays: test images only, for a teacher that is given."""

  def __init__(
    self,
    spec: Dataset,
    images: ArrayLike,
    labels: ArrayLike,
    class_names: Sequence[str] | None = None,
    name: str = "arrays",
  ):
    """Checks the arrays; `sizes` of `spec` is replaced by the number of images.

    Args:
      spec: num_classes, image_size and channels that the arrays must have.
      images: (N, *spec.image_shape), uint8, or floats k / 255 for whole numbers k from 0 to 255.
      labels: (N,), integers from 0 to num_classes - 1.
      class_names: one name per class, in the order of the labels; the labels themselves if None.

    Raises:
      Refusal: arrays of another shape or type, or with values out of range.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    shape = ", ".join(map(str, spec.image_shape))
    if images.ndim != 4 or images.shape[1:] != spec.image_shape or not len(images):
      turned = spec.image_shape[-1:] + spec.image_shape[:-1]
      hint = "; pass images.transpose(0, 2, 3, 1)" if images.shape[1:] == turned else ""
      hint = "; pass images[..., None]" if (*images.shape[1:], 1) == spec.image_shape else hint
      raise Refusal(
        f"the images of '{name}' must have shape (N, {shape}) with N of at least 1, got {images.shape}{hint}."
      )
    if labels.shape != images.shape[:1]:
      one_hot = "; of one-hot ones take labels.argmax(axis=1)" if labels.ndim == 2 else ""
      raise Refusal(
        f"the labels of '{name}' must have shape ({len(images)},), one per image, got {labels.shape}{one_hot}."
      )
    if not np.issubdtype(labels.dtype, np.integer):
      raise Refusal(f"the labels of '{name}' must be integers, got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= spec.num_classes:
      raise Refusal(
        f"the labels of '{name}' must be between 0 and {spec.num_classes - 1}, got {labels.min()} to {labels.max()}."
      )
    names = [str(label) for label in range(spec.num_classes)] if class_names is None else list(class_names)
    if len(names) != spec.num_classes or not all(isinstance(each, str) for each in names):
      raise Refusal(f"the class names of '{name}' must be {spec.num_classes} strings, got {names}.")
    check_names(f"'{name}'", names)
    self.name, self.spec = name, dataclasses.replace(spec, sizes={spec.test_split: len(images)})
    self._images, self._labels, self._class_names = _as_uint8(images, name), labels.astype(np.int32), names

  def require(self) -> None:
    """Nothing to prepare: the arrays were checked when they were passed in."""

  def class_names(self) -> list[str]:
    return list(self._class_names)

  def _load(self, split: str, rows: np.ndarray | None = None) -> Split:
    rows = slice(None) if rows is None else rows
    return Split(jnp.asarray(self._images[rows]), jnp.asarray(self._labels[rows]))


def _as_uint8(images: np.ndarray, name: str) -> np.ndarray:
  """A copy as uint8: of floats k / 255 the numbers k, so that nothing is lost."""
  if images.dtype == np.uint8:
    return images.copy()
  if not np.issubdtype(images.dtype, np.floating):
    raise Refusal(
      f"the images of '{name}' must be uint8 or floats in [0, 1], got {images.dtype}; if they are whole numbers"
      " from 0 to 255, pass images.astype(np.uint8)."
    )
  images = images.astype(np.promote_types(images.dtype, np.float32), copy=False)
  if not (images.min() >= -1e-6 and images.max() <= 1 + 1e-6):  # NaN compares as false
    raise Refusal(
      f"float images of '{name}' must be in [0, 1], got {images.min():.4g} to {images.max():.4g}; pass uint8 images"
      " that are not normalised."
    )
  levels = np.round(images * 255)
  if np.abs(images - levels / 255).max() > 1e-6:
    raise Refusal(
      f"float images of '{name}' must be whole multiples of 1/255, because images are stored with 8 bits; pass uint8"
      " images instead: np.round(images * 255).astype(np.uint8)"
    )
  return levels.astype(np.uint8)
