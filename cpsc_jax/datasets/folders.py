"""The user's own images, in train/CLASS/ and test/CLASS/: all of them are read and checked before any is written."""

import io
import os
import pathlib
import warnings
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageOps

from cpsc_jax import files
from cpsc_jax.datasets import Dataset
from cpsc_jax.datasets.data import check_names
from cpsc_jax.errors import Refusal, first_line

SUFFIXES = (".png", ".jpg", ".jpeg")
GREYSCALE = ("1", "L", "LA")
MODES = {None: None, 1: "L", 3: "RGB"}  # by channels
LARGEST_IMAGE, LARGEST_SIDE = 2**26, 2**12  # pixels of an image that is read; of a side to which images are resized
LARGEST_FILE = 2**28  # bytes
LAYOUT = "test/CLASS/*.png|jpg|jpeg and, to train a teacher, train/CLASS/* of the same classes"


class Survey(NamedTuple):
  """What a folder of images contains.

  Attributes:
    spec: its `Dataset`.
    classes: class names in the order of the labels.
    rows: {split: [(path, label)]}.
  """

  spec: Dataset
  classes: list[str]
  rows: dict[str, list[tuple[pathlib.Path, int]]]


def survey(
  folder: str | pathlib.Path, image_size: int | None = None, channels: int | None = None, photographs: bool = True
) -> Survey:
  """Reads a folder of images.

  Classes are the names of the folders in alphabetical order, as torchvision's ImageFolder numbers them. Mean and
  standard deviation are those of the training split, or None without one.

  Args:
    folder: has test/CLASS/*.png|jpg|jpeg and, optionally, train/CLASS/* of the same classes.
    image_size: pixels a side to which every image is resized and centre-cropped; None if all images are square and of
      one size.
    channels: 1 or 3; None: 1 if every image is greyscale, else 3.
    photographs: whether horizontal flips keep the class.

  Raises:
    Refusal: names the folder or the image that is wrong, and what to do.
  """
  folder = pathlib.Path(folder)
  if image_size is not None and not 1 <= image_size <= LARGEST_SIDE:
    raise Refusal(f"--image_size must be at least 1 and at most {LARGEST_SIDE:,}, got {image_size}.")
  if not folder.is_dir():
    raise Refusal(f"{folder} is not a folder; for a data set of your own, --from takes a folder with {LAYOUT}.")
  splits = [split for split in ("train", "test") if split == "test" or os.path.lexists(folder / split)]
  found = {split: list_images(folder / split) for split in splits}
  classes = sorted(found["test"])
  for name in sorted(found["test"].keys() ^ found[splits[0]].keys()):
    raise Refusal(
      f"class '{name}' is only in one of {folder}/train and {folder}/test; both must have the same classes."
    )
  check_names(folder, classes)
  if len(classes) < 2:
    raise Refusal(f"{folder / 'test'} must have at least two class folders, got {len(classes)}.")
  rows = {
    split: [(path, label) for label, name in enumerate(classes) for path in listed[name]]
    for split, listed in found.items()
  }
  if image_size:  # before any is read
    _check_memory(folder, image_size**2 * (channels or 1) * max(map(len, rows.values())))
  side, greyscale, mean, std = read_all(rows, image_size, MODES[channels])
  channels = channels or (1 if greyscale else 3)
  _check_memory(folder, side**2 * channels * max(map(len, rows.values())))
  spec = Dataset(
    num_classes=len(classes),
    image_size=side,
    channels=channels,
    mean=mean and mean[:channels],
    std=std and std[:channels],
    sizes={split: len(listed) for split, listed in rows.items()},
    photographs=photographs,
  )
  return Survey(spec, classes, rows)


def _check_memory(folder: pathlib.Path, needed: int) -> None:
  """Refuses a split that a run could not hold: it is read whole, and then copied to the device."""
  there = files.memory()
  if 2 * needed > there:
    raise Refusal(
      f"the images of {folder} take {needed / 2**30:,.1f} GiB, twice while they are loaded, and this machine has"
      f" {there / 2**30:,.1f} GiB of memory; use fewer, or a smaller --image_size."
    )


def list_images(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """{class: [path]} of folder/CLASS/*, without hidden files; any other file that is not an image is refused."""
  if not folder.is_dir():
    wrong = "is no folder" if os.path.lexists(folder) else "does not exist"
    raise Refusal(f"{folder} {wrong}; --from takes a folder with {LAYOUT}.")
  listed = {}
  for path in _visible(folder):
    if not path.is_dir():
      raise Refusal(f"{path} is not in a class folder; move it to {folder}/CLASS/.")
    listed[path.name] = _visible(path)
    for image in listed[path.name]:
      if image.suffix.lower() not in SUFFIXES or not image.is_file():
        raise Refusal(f"{image} is no file that ends in {', '.join(SUFFIXES)}; convert it or move it away.")
    if not listed[path.name]:
      raise Refusal(f"{path} has no images; add some or remove it.")
  return listed


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def read_all(
  rows: dict[str, list[tuple[pathlib.Path, int]]], image_size: int | None, mode: str | None
) -> tuple[int, bool, tuple[float, ...] | None, tuple[float, ...] | None]:
  """Reads every image once: (side, whether all are greyscale, mean, std); mean and std are None without "train"."""
  first, greyscale = None, True
  count, total, squares = 0, np.zeros(3), np.zeros(3)
  for split, listed in rows.items():
    for path, _ in listed:
      image = read(path, image_size, mode)
      first = first or (path, image.size)
      if image.size != first[1] or image.width != image.height:
        other = f", {first[0]} is {first[1][0]}x{first[1][1]}" if image.size != first[1] else ""
        raise Refusal(
          f"{path} is {image.width}x{image.height}{other}; images must be square and of one size: resize them by"
          " --image_size N."
        )
      greyscale = greyscale and image.mode == "L"
      if split == "train":
        pixels = np.asarray(image).reshape(image.width * image.height, -1) / 255.0
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + np.square(pixels).sum(0)
  if not count:
    return first[1][0], greyscale, None, None
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
  std[std < 1e-4] = 1.0  # a constant channel is not scaled
  return first[1][0], greyscale, tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def read(
  file: str | pathlib.Path | BinaryIO,
  image_size: int | None = None,
  mode: str | None = None,
  where: str | None = None,
) -> Image.Image:
  """A PIL image in `mode` "L" or "RGB" from a path or an open file: upright by its EXIF entry; alpha is dropped.

  `mode` None keeps greyscale images "L" and makes all others "RGB". With `image_size` the shorter side is resized to it
  and the centre is kept. `where` is the name of the file in messages, if it has no path.

  Raises:
    Refusal: damaged, neither PNG nor JPEG, of more than 8 bits, or of more than LARGEST_IMAGE pixels.
  """
  where = where or file
  try:
    if isinstance(file, str | pathlib.Path):
      file = io.BytesIO(files.read_bytes(file, LARGEST_FILE))
    # Pillow warns of what it passes over, such as damaged EXIF entries.
    with warnings.catch_warnings(action="ignore"), Image.open(file, formats=("PNG", "JPEG")) as image:
      deep = any(";16" in str(tile[3]) for tile in image.tile)  # Pillow would drop the lower half of each
      if image.mode[0] in "IF" or deep:
        raise Refusal(f"{where} has more than 8 bits per channel; convert it to 8 bits.")
      if image.width * image.height > LARGEST_IMAGE:
        raise Refusal(f"{where} is {image.width}x{image.height}, more than {LARGEST_IMAGE:,} pixels; make it smaller.")
      image = ImageOps.exif_transpose(image)
      image = image.convert("RGBA") if image.mode in ("P", "PA") else image  # look up the colours of a palette first
      image = image.convert(mode or ("L" if image.mode in GREYSCALE else "RGB"))
  except Refusal:
    raise
  except Image.DecompressionBombError:
    raise Refusal(f"{where} has more than {LARGEST_IMAGE:,} pixels; make it smaller.") from None
  except Exception as error:  # Pillow raises various types for damaged files
    raise Refusal(
      f"{where} is damaged or not a PNG or JPEG image ({first_line(error)}); restore or remove it."
    ) from error
  return ImageOps.fit(image, (image_size, image_size)) if image_size else image
