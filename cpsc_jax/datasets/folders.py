"""Images of the user's own, in train/CLASS/ and test/CLASS/, looked through whole before anything is written."""

import pathlib

import numpy as np
from PIL import Image, ImageOps

from cpsc_jax.datasets import Dataset
from cpsc_jax.errors import Refusal, first_line

SUFFIXES = (".png", ".jpg", ".jpeg")
GREYSCALE = ("1", "L", "LA")
MODES = {None: None, 1: "L", 3: "RGB"}  # by channels
LAYOUT = "test/CLASS/*.png|jpg|jpeg and, where a teacher is to be trained, train/CLASS/* of the same classes"


def survey(folder, image_size=None, channels=None, photographs=True):
  """What is in a folder of images: (its `Dataset`, class names, {split: [(path, label)]}).

  Classes are the folders' names in alphabetical order, as torchvision's ImageFolder numbers them. Mean and standard
  deviation are the training split's; without one they are None.

  Args:
    folder: holds test/CLASS/*.png|jpg|jpeg and, optionally, train/CLASS/* of the same classes.
    image_size: what every image is resized and centre-cropped to; None: all are square and equal already.
    channels: 1 or 3; None: 1 if every image is greyscale, else 3.
    photographs: whether horizontal flips keep the class.

  Raises:
    Refusal: names the folder or the image that does not fit, and the mend.
  """
  folder = pathlib.Path(folder)
  if image_size is not None and image_size < 1:
    raise Refusal(f"--image_size is {image_size}; it must be at least 1.")
  if not folder.is_dir():
    raise Refusal(f"{folder} is no folder; for a data set of your own, --from takes a folder with {LAYOUT}.")
  splits = [split for split in ("train", "test") if split == "test" or (folder / split).is_dir()]
  files = {split: list_images(folder / split) for split in splits}
  classes = sorted(files["test"])
  for name in sorted(files["test"].keys() ^ files[splits[0]].keys()):
    raise Refusal(f"class '{name}' is in only one of {folder}/train and {folder}/test; both need the same classes.")
  if len(classes) < 2:
    raise Refusal(f"{folder / 'test'} has {len(classes)} class folder; it takes two classes or more.")
  rows = {
    split: [(path, label) for label, name in enumerate(classes) for path in listed[name]]
    for split, listed in files.items()
  }
  side, greyscale, mean, std = look_through(rows, image_size, MODES[channels])
  channels = channels or (1 if greyscale else 3)
  spec = Dataset(
    num_classes=len(classes),
    image_size=side,
    channels=channels,
    mean=mean and mean[:channels],
    std=std and std[:channels],
    sizes={split: len(listed) for split, listed in rows.items()},
    photographs=photographs,
  )
  return spec, classes, rows


def list_images(folder):
  """{class: [path]} of folder/CLASS/*; hidden files are passed over, any other file that is no image is refused."""
  if not folder.is_dir():
    raise Refusal(f"there is no {folder}; --from takes a folder with {LAYOUT}.")
  visible = lambda path: sorted(p for p in path.iterdir() if not p.name.startswith("."))
  listed = {}
  for path in visible(folder):
    if not path.is_dir():
      raise Refusal(f"{path} lies beside the class folders; images belong in {folder}/CLASS/.")
    listed[path.name] = visible(path)
    for image in listed[path.name]:
      if image.suffix.lower() not in SUFFIXES or image.is_dir():
        raise Refusal(f"{image} is not named as a {', '.join(SUFFIXES)} image; convert it or move it away.")
    if not listed[path.name]:
      raise Refusal(f"{path} has no images; fill it or remove it.")
  return listed


def look_through(rows, image_size, mode):
  """Reads every image once: (side, whether all are greyscale, mean, std of three channels or None without "train")."""
  first, greyscale = None, True
  count, total, squares = 0, np.zeros(3), np.zeros(3)
  for split, listed in rows.items():
    for path, _ in listed:
      image = read(path, image_size, mode)
      first = first or (path, image.size)
      if image.size != first[1] or image.width != image.height:
        size = lambda wh: "{}x{}".format(*wh)
        other = f", {first[0]} is {size(first[1])}" if image.size != first[1] else ""
        raise Refusal(
          f"{path} is {size(image.size)}{other}; images must be square and of one size: --image_size N makes them so."
        )
      greyscale = greyscale and image.mode == "L"
      if split == "train":
        pixels = np.asarray(image).reshape(image.width * image.height, -1) / 255.0
        count, total, squares = count + len(pixels), total + pixels.sum(0), squares + np.square(pixels).sum(0)
  if not count:
    return first[1][0], greyscale, None, None
  mean = total / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
  std[std < 1e-4] = 1.0  # a channel of one shade has nothing to be scaled by
  return first[1][0], greyscale, tuple(mean.round(4).tolist()), tuple(std.round(4).tolist())


def read(file, image_size=None, mode=None, where=None):
  """A PIL image in `mode` "L" or "RGB" from a path or an open file; alpha is dropped.

  `mode` None keeps greyscale images "L" and makes all others "RGB". With `image_size` the shorter side is resized to it
  and the middle is kept. `where` names the file in messages if it has no path.
  """
  where = where or file
  try:
    with Image.open(file, formats=("PNG", "JPEG")) as image:
      if image.mode[0] in "IF":
        raise Refusal(f"{where} has more than 8 bits per pixel; convert it to 8 bits.")
      image = image.convert("RGBA") if image.mode in ("P", "PA") else image  # a palette's colours first
      image = image.convert(mode or ("L" if image.mode in GREYSCALE else "RGB"))
  except Refusal:
    raise
  except Exception as error:  # Pillow raises assorted types for damaged files
    raise Refusal(f"{where} is damaged or no PNG or JPEG image ({first_line(error)}); restore or remove it.") from error
  return ImageOps.fit(image, (image_size, image_size)) if image_size else image
