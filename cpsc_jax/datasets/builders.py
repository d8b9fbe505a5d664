"""TFDS builders that read original archives without TensorFlow and write array_record files.

The CIFAR and SVHN builders carry the stock builders' names, versions and features, so that what they prepare is what
`tfds.data_source` reads.
"""

import io
import os
import pathlib
import tarfile
import zipfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cpsc_jax.errors import Refusal


class FromArchive:
  """Mixin: `archive` is the original archive's path; None lets TFDS download it to its own cache."""

  archive = None

  def _open(self, dl_manager, url):
    path = pathlib.Path(self.archive or dl_manager.download(url))
    if not path.exists():
      raise Refusal(f"{path} does not exist; --from takes the original archive of '{self.name}' ({url}).")
    return path


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """scikit-learn's bundled 1,797 digits of 8x8 pixels; every fourth image of each class is the test split."""

  name = "digits"
  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    return _image_info(self, "Handwritten digits (UCI), as bundled with scikit-learn.", (8, 8, 1), 10)

  def _split_generators(self, dl_manager):
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target
    test = np.zeros(len(labels), bool)
    for label in range(10):
      test[np.flatnonzero(labels == label)[::4]] = True
    return {
      "train": self._generate_examples(images[~test], labels[~test]),
      "test": self._generate_examples(images[test], labels[test]),
    }

  def _generate_examples(self, images, labels):
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
      yield index, {"image": png(image), "label": int(label)}


class _Cifar(FromArchive):
  def _split_generators(self, dl_manager):
    info = self._cifar_info
    archive = self._open(dl_manager, info.url)
    wanted = [*info.train_files, *info.test_files, *info.label_files]
    try:
      with tarfile.open(archive) as tar:
        files = {name: tar.extractfile(info.prefix + name).read() for name in wanted}
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
      raise Refusal(
        f"{archive} is not the binary archive of '{self.name}' ({error}); get it from {info.url}."
      ) from error
    record = len(info.label_keys) + 3072
    for name in (*info.train_files, *info.test_files):
      if not files[name] or len(files[name]) % record:
        raise Refusal(f"{name} in {archive} has {len(files[name])} bytes, not a multiple of {record}; get it again.")
    for key, name in zip(info.label_keys, info.label_files, strict=True):
      self.info.features[key].names = [n for n in files[name].decode().split("\n") if n]
    join = lambda names: b"".join(files[n] for n in names)
    return {
      "train": self._generate_examples("train_", join(info.train_files)),
      "test": self._generate_examples("test_", join(info.test_files)),
    }

  def _generate_examples(self, prefix, data):
    keys = self._cifar_info.label_keys
    rows = np.frombuffer(data, np.uint8).reshape(-1, len(keys) + 3072)
    for index, row in enumerate(rows):
      image = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
      yield index, {**dict(zip(keys, map(int, row), strict=False)), "id": f"{prefix}{index:05d}", "image": png(image)}


class Cifar10(_Cifar, tfds.image_classification.Cifar10, skip_registration=True):
  name = "cifar10"


class Cifar100(_Cifar, tfds.image_classification.Cifar100, skip_registration=True):
  name = "cifar100"


class SvhnCropped(FromArchive, tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Reads a folder with train_32x32.mat, test_32x32.mat and extra_32x32.mat, the last one optional."""

  name = "svhn_cropped"
  VERSION = tfds.core.Version("3.1.0")
  URL = "http://ufldl.stanford.edu/housenumbers/"

  def _info(self):
    return _image_info(self, "Street View House Numbers, cropped digits (Netzer et al., 2011).", (32, 32, 3), 10)

  def _split_generators(self, dl_manager):
    files = {"train": "train_32x32.mat", "test": "test_32x32.mat", "extra": "extra_32x32.mat"}
    if self.archive is None:
      paths = {split: dl_manager.download(self.URL + name) for split, name in files.items()}
    else:
      paths = {split: pathlib.Path(self.archive) / name for split, name in files.items()}
      for split in ("train", "test"):
        if not paths[split].exists():
          raise Refusal(f"{paths[split]} does not exist; --from takes a folder with {', '.join(files.values())}.")
    return {split: self._generate_examples(path) for split, path in paths.items() if os.path.exists(path)}

  def _generate_examples(self, path):
    import scipy.io

    data = scipy.io.loadmat(path)
    labels = data["y"][:, 0].astype(int) % 10
    for index, label in enumerate(labels):
      yield f"{index:06d}", {"image": png(data["X"][..., index]), "label": int(label)}


class TinyImagenet(FromArchive, tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Tiny-ImageNet-200 from its original zip: 200 classes, 64x64; greyscale images become RGB."""

  name = "tiny_imagenet"
  VERSION = tfds.core.Version("1.0.0")
  URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

  def _info(self):
    return _image_info(
      self, "Tiny-ImageNet: 200 classes, 500 training and 50 validation images each.", (64, 64, 3), 200
    )

  def _split_generators(self, dl_manager):
    path = self._open(dl_manager, self.URL)
    try:
      archive = zipfile.ZipFile(path)
      root = "tiny-imagenet-200/"
      wnids = archive.read(root + "wnids.txt").decode().split()
      rows = [line.split("\t") for line in archive.read(root + "val/val_annotations.txt").decode().splitlines()]
    except (zipfile.BadZipFile, KeyError, OSError) as error:
      raise Refusal(f"{path} is not the archive of '{self.name}' ({error}); get it from {self.URL}.") from error
    self.info.features["label"].names = wnids
    train = [
      (n, n.split("/")[2]) for n in sorted(archive.namelist()) if n.startswith(root + "train/") and n.endswith(".JPEG")
    ]
    validation = [(f"{root}val/images/{row[0]}", row[1]) for row in rows]
    return {
      "train": self._generate_examples(archive, train),
      "validation": self._generate_examples(archive, validation),
    }

  def _generate_examples(self, archive, rows):
    names = self.info.features["label"]
    for path, wnid in rows:
      image = np.asarray(Image.open(io.BytesIO(archive.read(path))).convert("RGB"))
      yield path, {"image": png(image), "label": names.str2int(wnid)}


BUILDERS = {
  "digits": Digits,
  "cifar10": Cifar10,
  "cifar100": Cifar100,
  "svhn_cropped": SvhnCropped,
  "tiny_imagenet": TinyImagenet,
}


def _image_info(builder, description, shape, num_classes):
  features = {
    "image": tfds.features.Image(shape=shape, encoding_format="png"),
    "label": tfds.features.ClassLabel(num_classes=num_classes),
  }
  return tfds.core.DatasetInfo(
    builder=builder,
    description=description,
    features=tfds.features.FeaturesDict(features),
    supervised_keys=("image", "label"),
  )


def png(image):
  """A uint8 image (H, W) or (H, W, K) as encoded bytes, the one form that TFDS stores without TensorFlow."""
  image = np.asarray(image)
  buffer = io.BytesIO()
  Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image).save(buffer, "PNG")
  return buffer.getvalue()
