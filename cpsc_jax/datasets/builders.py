"""TFDS builders that read original archives, or folders of images, without TensorFlow and write array_record files.

The CIFAR and SVHN builders have the names, versions and features of the builders that come with TFDS, so that
`tfds.data_source` reads what they prepare.
"""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import queue
import struct
import tarfile
import threading
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable

import numpy as np
import tensorflow_datasets as tfds
from numpy.typing import ArrayLike
from PIL import Image

from cpsc_jax import files
from cpsc_jax.datasets import FILE_FORMAT, OWN_VERSION, folders
from cpsc_jax.errors import Refusal, first_line

SECONDS_TO_ANSWER = 5.0
UNREADABLE = (
  *(OSError, KeyError, EOFError, ValueError, RuntimeError, OverflowError),
  *(tarfile.TarError, zipfile.BadZipFile, zlib.error, struct.error),
)
LARGEST_ARCHIVE, LARGEST_FILE, LARGEST_UNPACKED = 2**32, 2**28, 2**29  # bytes: packed; of a part; of a whole tar
PIECE = 2**20  # bytes read at once


class FromArchive:
  """Mixin: `source` is the original archive or the folder unpacked from it; with None TFDS downloads the archive."""

  source: str | None = None

  def _fetch(self, dl_manager, url):
    """The path that the user gave, or the file that TFDS downloads from `url` and checks."""
    file = url.rsplit("/", 1)[1]
    if self.source is None:
      try:
        check_answers(url)
        return pathlib.Path(dl_manager.download(url))
      except Exception as error:  # TFDS raises various types
        raise Refusal(
          f"cannot download {url} ({first_line(error)}); get {file} in another way and pass it by --from."
        ) from error
    path = pathlib.Path(self.source)
    if not path.exists():
      raise Refusal(f"{path} does not exist; --from takes {file} ({url}) or the folder unpacked from it.")
    if not path.is_dir():
      try:
        with files.opened(path, LARGEST_ARCHIVE):
          pass
      except OSError as error:
        raise Refusal(
          f"{path} cannot be read ({error.strerror}); --from takes {file} ({url}) or the folder unpacked from it."
        ) from error
    return path

  def _name_classes(self, key, names, path):
    """Sets the class names of feature `key`; in every archive here they are in alphabetical order."""
    feature = self.info.features[key]
    if len(names) != feature.num_classes or names != sorted(set(names)) or not all(map(str.isprintable, names)):
      raise Refusal(
        f"{path} does not list the {feature.num_classes} classes of '{self.name}' ({key}) in alphabetical order; get it"
        " again."
      )
    feature.names = names


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
  """Reads the binary version: the published archive, or its files packed in another way, with known MD5 sums."""

  def _split_generators(self, dl_manager):
    info = self._cifar_info
    path = self._fetch(dl_manager, info.url)
    try:
      names = [*info.train_files, *info.test_files, *info.label_files]
      read = opener(path, info.prefix, names)
      parts = {name: read(name) for name in names}
      as_published = path.is_file() and digest_of(path, "sha256") == published_sha256(self.name, info.url)
    except UNREADABLE as error:
      raise Refusal(
        f"{path} is not the binary version of '{self.name}' ({first_line(error)}); get it from {info.url}."
      ) from error
    for name, md5 in {} if as_published else self.MD5.items():
      check_digest(f"{name} in {path}", hashlib.md5(parts[name]).hexdigest(), md5, info.url)
    for key, name in zip(info.label_keys, info.label_files, strict=True):
      self._name_classes(key, parts[name].decode(errors="replace").split(), path)
    train, test = (b"".join(parts[name] for name in part) for part in (info.train_files, info.test_files))
    return {
      "train": self._generate_examples("train_", train),
      "test": self._generate_examples("test_", test),
    }

  def _generate_examples(self, prefix, data):
    keys = self._cifar_info.label_keys
    rows = np.frombuffer(data, np.uint8).reshape(-1, len(keys) + 3072)
    for index, row in enumerate(rows):
      image = row[len(keys) :].reshape(3, 32, 32).transpose(1, 2, 0)
      yield index, {**dict(zip(keys, map(int, row), strict=False)), "id": f"{prefix}{index:05d}", "image": png(image)}


class Cifar10(_Cifar, tfds.image_classification.Cifar10, skip_registration=True):
  name = "cifar10"
  MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
  }


class Cifar100(_Cifar, tfds.image_classification.Cifar100, skip_registration=True):
  name = "cifar100"
  MD5 = {"train.bin": "6172c7755cfe09b2fe270c85cebc1b15", "test.bin": "4499cfba6c016c1be1438163640a0898"}


class SvhnCropped(FromArchive, tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Reads a folder with train_32x32.mat, test_32x32.mat and, optionally, extra_32x32.mat."""

  name = "svhn_cropped"
  VERSION = tfds.core.Version("3.1.0")
  URL = "http://ufldl.stanford.edu/housenumbers/"

  def _info(self):
    return _image_info(self, "Street View House Numbers, cropped digits (Netzer et al., 2011).", (32, 32, 3), 10)

  def _split_generators(self, dl_manager):
    mats = {split: f"{split}_32x32.mat" for split in ("train", "test", "extra")}
    if self.source is None:
      paths = {split: self._fetch(dl_manager, self.URL + mats[split]) for split in ("train", "test")}
    else:
      paths = {split: pathlib.Path(self.source) / file for split, file in mats.items()}
      for split in ("train", "test"):
        if not paths[split].is_file():
          raise Refusal(f"{paths[split]} does not exist; --from takes a folder with {', '.join(mats.values())}.")
    paths = {split: path for split, path in paths.items() if path.is_file()}
    for split, path in paths.items():
      url = self.URL + mats[split]
      check_digest(path, digest_of(path, "sha256"), published_sha256(self.name, url), url)
    return {split: self._generate_examples(path) for split, path in paths.items()}

  def _generate_examples(self, path):
    import scipy.io

    data = scipy.io.loadmat(path)
    labels = data["y"][:, 0].astype(int) % 10
    for index, label in enumerate(labels):
      yield f"{index:06d}", {"image": png(data["X"][..., index]), "label": int(label)}


class TinyImagenet(FromArchive, tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Tiny-ImageNet-200: 200 classes, 64x64; greyscale images become RGB.

  Classes are numbered in the order of their WordNet ids, as torchvision's ImageFolder does, not as in wnids.txt.
  """

  name = "tiny_imagenet"
  VERSION = tfds.core.Version("1.0.0")
  URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
  MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
  PER_CLASS = 500

  def _info(self):
    return _image_info(
      self, "Tiny-ImageNet: 200 classes, 500 training and 50 validation images each.", (64, 64, 3), 200
    )

  def _split_generators(self, dl_manager):
    path = self._fetch(dl_manager, self.URL)
    if path.is_file():
      check_digest(path, digest_of(path, "md5"), self.MD5, self.URL)
    try:
      read = opener(path, "tiny-imagenet-200/")
      wnids = sorted(read("wnids.txt").decode(errors="replace").split())
      annotations = read("val/val_annotations.txt").decode(errors="replace")
    except UNREADABLE as error:
      raise Refusal(f"{path} is not '{self.name}' ({first_line(error)}); get it from {self.URL}.") from error
    self._name_classes("label", wnids, path)
    lines = [line.split("\t") for line in annotations.splitlines()]
    classes = {line[0]: line[1] for line in lines if len(line) > 1}
    if not classes or set(classes.values()) - set(wnids):
      raise Refusal(f"val/val_annotations.txt in {path} does not give every image a class; get it again.")
    train = [(f"train/{wnid}/images/{wnid}_{i}.JPEG", wnid) for wnid in wnids for i in range(self.PER_CLASS)]
    validation = [(f"val/images/{file}", wnid) for file, wnid in classes.items()]
    return {
      "train": self._generate_examples(read, train),
      "validation": self._generate_examples(read, validation),
    }

  def _generate_examples(self, read, rows):
    for name, wnid in rows:
      try:
        data = io.BytesIO(read(name))
      except UNREADABLE as error:
        raise Refusal(f"'{self.name}' lacks {name} ({first_line(error)}); unpack it again.") from error
      image = folders.read(data, mode="RGB", where=name)
      if image.size != (64, 64):
        raise Refusal(f"{name} must be 64x64, got {image.width}x{image.height}; unpack '{self.name}' again.")
      yield name, {"image": png(image), "label": wnid}


class Folder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """A data set of the user's, from what `folders.survey` found; its `Dataset` is stored with it."""

  VERSION = tfds.core.Version(OWN_VERSION)

  def __init__(self, name, found, image_size, **kwargs):
    self.name, self.image_size = name, image_size
    self.spec, self.classes, self.rows = found
    super().__init__(**kwargs)

  def _info(self):
    record = tfds.core.MetadataDict(dataclasses.asdict(self.spec))
    info = _image_info(self, "A folder of images.", self.spec.image_shape, self.spec.num_classes, record)
    info.features["label"].names = self.classes
    return info

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(rows) for split, rows in self.rows.items()}

  def _generate_examples(self, rows):
    mode = folders.MODES[self.spec.channels]
    for path, label in rows:
      image = folders.read(path, self.image_size, mode)
      yield f"{label}/{path.name}", {"image": png(image), "label": label}


BUILDERS = {
  "digits": Digits,
  "cifar10": Cifar10,
  "cifar100": Cifar100,
  "svhn_cropped": SvhnCropped,
  "tiny_imagenet": TinyImagenet,
}


def from_archive(name: str, data_dir: str, source: str | None) -> tfds.core.DatasetBuilder:
  """The builder that writes under `data_dir` the row `name` of DATASETS, read from the archive or folder `source`."""
  builder = BUILDERS[name](data_dir=data_dir, file_format=FILE_FORMAT)
  builder.source = source
  return builder


def from_folder(name: str, data_dir: str, found: folders.Survey, image_size: int | None) -> tfds.core.DatasetBuilder:
  """The builder that writes under `data_dir`, as `name`, the images that `folders.survey` found."""
  return Folder(name, found, image_size, data_dir=data_dir, file_format=FILE_FORMAT)


def _image_info(builder, description, shape, num_classes, metadata=None):
  features = {
    "image": tfds.features.Image(shape=shape, encoding_format="png"),
    "label": tfds.features.ClassLabel(num_classes=num_classes),
  }
  return tfds.core.DatasetInfo(
    builder=builder,
    description=description,
    features=tfds.features.FeaturesDict(features),
    supervised_keys=("image", "label"),
    metadata=metadata,
  )


def png(image: ArrayLike | Image.Image) -> bytes:
  """A uint8 image (H, W) or (H, W, K) as PNG, the form that TFDS stores without TensorFlow."""
  image = np.asarray(image)
  buffer = io.BytesIO()
  Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image).save(buffer, "PNG")
  return buffer.getvalue()


def opener(path: pathlib.Path, prefix: str, names: Iterable[str] = ()) -> Callable[[str], bytes]:
  """name -> content of the file prefix + name in a .zip, a .tar or .tar.gz, or in a folder unpacked from it.

  No more than LARGEST_FILE bytes are read of a file, and LARGEST_UNPACKED are unpacked of a tar. `names` are those that
  a tar is searched for, which is read here and once.

  Raises:
    one of UNREADABLE, here or when a file is read.
  """
  if path.is_dir():
    root = path / prefix if (path / prefix).is_dir() else path
    return lambda name: files.read_bytes(root / name, LARGEST_FILE)
  if zipfile.is_zipfile(path):
    archive = zipfile.ZipFile(path)
    return lambda name: _unzipped(archive, prefix + name)
  wanted, found = {prefix + name for name in names}, {}
  with files.opened(path, LARGEST_ARCHIVE) as file:
    packed = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    with tarfile.open(fileobj=_Bounded(gzip.GzipFile(fileobj=file) if packed else file), mode="r:") as archive:
      for member in archive:
        if member.isfile() and member.name in wanted:
          found[member.name] = _content(archive.extractfile(member), member.size)
  return lambda name: found[prefix + name]


def _unzipped(archive, name):
  entry = archive.getinfo(name)
  if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    raise OSError(f"'{name}' in it is packed by another method than deflate")
  with archive.open(entry) as file:
    return _content(file, entry.file_size)


def _content(file, size):
  """What an unpacking file has, piece by piece: read at once, a small archive could fill the memory."""
  if size > LARGEST_FILE:
    raise OSError(f"a file in it has {size:,} bytes, more than {LARGEST_FILE:,}")
  pieces = []
  while sum(map(len, pieces)) <= size and (piece := file.read(PIECE)):
    pieces.append(piece)
  return b"".join(pieces)


class _Bounded:
  """An unpacked file for `tarfile`, which believes every size that an archive states."""

  def __init__(self, file):
    self._file = file

  def read(self, size: int) -> bytes:
    if not 0 <= size <= PIECE:
      raise OSError(f"a header in it has {size:,} bytes")
    self._check(self._file.tell() + size)
    return self._file.read(size)

  def seek(self, offset: int) -> int:
    self._check(offset)
    return self._file.seek(offset)

  def tell(self) -> int:
    return self._file.tell()

  def _check(self, offset):
    if offset > LARGEST_UNPACKED:
      raise OSError(f"it has more than {LARGEST_UNPACKED:,} bytes once it is unpacked")


def digest_of(path: str | pathlib.Path, algorithm: str) -> str:
  """The hex digest of a file; `algorithm` as in hashlib."""
  with files.opened(path, LARGEST_ARCHIVE) as file:
    return hashlib.file_digest(file, algorithm).hexdigest()


def published_sha256(name: str, url: str) -> str:
  """The checksum that TFDS has on record for a file of its data set `name`."""
  return tfds.builder_cls(name).url_infos[url].checksum


def check_digest(what: str | pathlib.Path, have: str, want: str, url: str) -> None:
  """Raises a Refusal unless both digests are equal."""
  if have != want:
    raise Refusal(f"{what} is not the original (checksum {have}, not {want}); get it again from {url}.")


def check_answers(url: str) -> None:
  """Raises within seconds if `url` cannot be opened: without a network TFDS tries for minutes."""
  answer = queue.SimpleQueue()

  def ask() -> None:
    try:
      urllib.request.urlopen(url, timeout=SECONDS_TO_ANSWER).close()
      answer.put(None)
    except Exception as error:
      answer.put(error)

  threading.Thread(target=ask, daemon=True).start()  # looking up a host name has no time limit
  try:
    error = answer.get(timeout=2 * SECONDS_TO_ANSWER)
  except queue.Empty:
    raise TimeoutError("no answer") from None
  if error:
    raise error
