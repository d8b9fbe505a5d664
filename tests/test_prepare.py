"""Preparing data sets: from archives and folders, with checksums, whole or not at all, or refused in one sentence."""

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import pathlib
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
import zlib

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from conftest import REPOSITORY, shared
from PIL import Image

from cpsc_jax import datasets
from cpsc_jax.datasets import builders, folders
from cpsc_jax.datasets.prepare import main, prepare
from cpsc_jax.errors import Refusal

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_files(name, per_file=20):
  """{file name: bytes} of a CIFAR binary version with few images of noise."""
  rng = np.random.default_rng(0)
  if name == "cifar10":
    parts, classes = [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"], (10,)
    names = {"batches.meta.txt": CIFAR10_NAMES}
  else:
    parts, classes = ["train.bin", "test.bin"], (20, 100)
    names = {
      "coarse_label_names.txt": [f"coarse_{i:02d}" for i in range(20)],
      "fine_label_names.txt": [f"fine_{i:03d}" for i in range(100)],
    }
  files = {}
  for part in parts:
    labels = [rng.integers(0, k, (per_file, 1)) for k in classes]
    rows = np.concatenate([*labels, rng.integers(0, 256, (per_file, 3072))], axis=1)
    files[part] = rows.astype(np.uint8).tobytes()
  return {**files, **{file: ("\n".join(listed) + "\n\n").encode() for file, listed in names.items()}}


def pack(path, prefix, files):
  with tarfile.open(path, "w:gz") as tar:
    for name, data in files.items():
      info = tarfile.TarInfo(prefix + name)
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))
  return path


def unpack(folder, files):
  for name, data in files.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  return folder


def as_original(monkeypatch, name, sizes, files=()):
  """Lets few images pass for the real ones: these split sizes, these checksums."""
  monkeypatch.setitem(datasets.DATASETS, name, dataclasses.replace(datasets.DATASETS[name], sizes=sizes))
  if files:
    md5 = {part: hashlib.md5(data).hexdigest() for part, data in files.items() if part.endswith(".bin")}
    monkeypatch.setattr(builders.BUILDERS[name], "MD5", md5)


@pytest.fixture
def cifar10(monkeypatch):
  files = cifar_files("cifar10")
  as_original(monkeypatch, "cifar10", {"train": 100, "test": 20}, files)
  return files


def listing(folder):
  return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def pairs(images, labels):
  return sorted((int(y), np.asarray(x).tobytes()) for x, y in zip(images, labels, strict=True))


# Ready-made data sets.


@pytest.mark.parametrize("form", ["archive", "folder", "parent"])
def test_cifar10(tmp_path, cifar10, form):
  source = {
    "archive": lambda: pack(tmp_path / "c.tar.gz", "cifar-10-batches-bin/", cifar10),
    "folder": lambda: unpack(tmp_path / "anywhere", cifar10),
    "parent": lambda: unpack(tmp_path / "c" / "cifar-10-batches-bin", cifar10).parent,
  }[form]()
  data_dir = str(tmp_path / "d")
  prepare("cifar10", data_dir, str(source))
  data = datasets.find("cifar10", data_dir)
  train, test = data.load_train("test"), data.load_evaluation("test")
  rows = np.concatenate(
    [np.frombuffer(cifar10[f"data_batch_{k}.bin"], np.uint8).reshape(-1, 3073) for k in range(1, 6)]
  )
  original = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  assert pairs(train.images, train.labels) == pairs(original, rows[:, 0])
  assert len(test) == 20
  stock = tfds.data_source("cifar10", split="test", data_dir=data_dir)
  assert len(stock) == 20 and stock[0]["id"].decode().startswith("test_"), "stock TFDS reads it"
  assert tfds.builder("cifar10", data_dir=data_dir).info.features["label"].names == CIFAR10_NAMES
  assert prepare("cifar10", data_dir), "a second preparation finds it done"
  assert listing(tmp_path / "d") == ["cifar10"], "no scratch is left"


def test_cifar100(tmp_path, monkeypatch):
  files = cifar_files("cifar100")
  as_original(monkeypatch, "cifar100", {"train": 20, "test": 20}, files)
  prepare("cifar100", str(tmp_path), str(pack(tmp_path / "c.tar.gz", "cifar-100-binary/", files)))
  test = datasets.find("cifar100", str(tmp_path)).load_evaluation("test")
  rows = np.frombuffer(files["test.bin"], np.uint8).reshape(-1, 3074)
  assert sorted(np.asarray(test.labels)) == sorted(rows[:, 1]), "the fine labels"
  stock = tfds.data_source("cifar100", split="train", data_dir=str(tmp_path))
  assert len(stock) == 20 and {"label", "coarse_label"} <= stock[0].keys()


def test_svhn(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
  labels = np.array([[10], [1], [2], [3], [9], [10], [5]], np.uint8)
  mats = tmp_path / "mats"
  mats.mkdir()
  as_original(monkeypatch, "svhn_cropped", {"train": 7, "test": 7})
  with pytest.raises(Refusal, match=r"train_32x32.mat does not exist; --from takes a folder"):
    prepare("svhn_cropped", str(tmp_path / "d"), str(mats))
  for split in ("train", "test"):
    scipy.io.savemat(mats / f"{split}_32x32.mat", {"X": images, "y": labels})
  with pytest.raises(Refusal, match=r"train_32x32.mat is not the original \(checksum .*435e94d6"):
    prepare("svhn_cropped", str(tmp_path / "d"), str(mats))
  monkeypatch.setattr(
    builders, "published_sha256", lambda name, url: builders.digest_of(mats / url.rsplit("/", 1)[1], "sha256")
  )
  prepare("svhn_cropped", str(tmp_path / "d"), str(mats))
  test = datasets.find("svhn_cropped", str(tmp_path / "d")).load_evaluation("test")
  assert pairs(test.images, test.labels) == pairs(images.transpose(3, 0, 1, 2), labels[:, 0] % 10), "10 is the digit 0"
  assert len(tfds.data_source("svhn_cropped", split="train", data_dir=str(tmp_path / "d"))) == 7


def test_checksums_of_the_stock_builders_are_at_hand():
  for name, url in (
    ("cifar10", "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"),
    ("cifar100", "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"),
    ("svhn_cropped", builders.SvhnCropped.URL + "train_32x32.mat"),
    ("svhn_cropped", builders.SvhnCropped.URL + "test_32x32.mat"),
    ("svhn_cropped", builders.SvhnCropped.URL + "extra_32x32.mat"),
  ):
    assert len(builders.published_sha256(name, url)) == 64


@functools.cache
def tiny_files():
  """{file name: bytes} of a Tiny-ImageNet with one greyscale training image per class and one validation image."""
  wnids = [f"n{i:08d}" for i in range(200)]
  images = [builders.png(np.full((64, 64), i, np.uint8)) for i in range(200)]
  return {
    "wnids.txt": "\n".join(reversed(wnids)).encode(),
    **{f"train/{wnid}/images/{wnid}_0.JPEG": images[i] for i, wnid in enumerate(wnids)},
    "val/images/val_0.JPEG": images[7],
    "val/val_annotations.txt": f"val_0.JPEG\t{wnids[7]}\t0\t0\t1\t1\n".encode(),
  }


@pytest.mark.parametrize("form", ["archive", "folder"])
def test_tiny_imagenet(tmp_path, monkeypatch, form):
  as_original(monkeypatch, "tiny_imagenet", {"train": 200, "validation": 1})
  monkeypatch.setattr(builders.TinyImagenet, "PER_CLASS", 1)
  source, data_dir = tmp_path / "tiny-imagenet-200", str(tmp_path / "d")
  if form == "folder":
    unpack(source, tiny_files())
  else:
    source = tmp_path / "t.zip"
    with zipfile.ZipFile(source, "w") as archive:
      for name, data in tiny_files().items():
        archive.writestr("tiny-imagenet-200/" + name, data)
    with pytest.raises(Refusal, match=r"t.zip is not the original \(checksum .*90528d7c"):
      prepare("tiny_imagenet", data_dir, str(source))
    monkeypatch.setattr(builders.TinyImagenet, "MD5", builders.digest_of(source, "md5"))
  prepare("tiny_imagenet", data_dir, str(source))
  data = datasets.find("tiny_imagenet", data_dir)
  train, test = data.load_train("test"), data.load_evaluation("test")
  assert test.images.shape == (1, 64, 64, 3) and test.labels.tolist() == [7], "the published validation split"
  assert len(data.load_evaluation("validation")) == 40, "held out of the training split"
  assert np.array_equal(train.images[:, 0, 0, 1], train.labels), "classes are in the order of their ids"


def test_a_damaged_tiny_imagenet_is_refused(tmp_path, monkeypatch):
  as_original(monkeypatch, "tiny_imagenet", {"train": 200, "validation": 1})
  monkeypatch.setattr(builders.TinyImagenet, "PER_CLASS", 1)
  some = "train/n00000003/images/n00000003_0.JPEG"
  for name, data, word in (
    (some, tiny_files()[some][:50], f"{some} is damaged"),
    (some, None, f"lacks {some}"),
    (some, builders.png(np.zeros((32, 32), np.uint8)), f"{some} must be 64x64, got 32x32"),
    ("wnids.txt", b"\xff" * 20, "does not list the 200 classes"),
    ("wnids.txt", b"n00000001\n", "does not list the 200 classes"),
    ("val/val_annotations.txt", b"val_0.JPEG\n", "does not give every image a class"),
    ("val/val_annotations.txt", b"val_0.JPEG\tn00000200\n", "does not give every image a class"),
    ("val/val_annotations.txt", None, "val_annotations.txt"),
  ):
    files = {k: v for k, v in {**tiny_files(), name: data}.items() if v is not None}
    shutil.rmtree(tmp_path / "t", ignore_errors=True)
    with pytest.raises(Refusal, match=word):
      prepare("tiny_imagenet", str(tmp_path / "d"), str(unpack(tmp_path / "t", files)))
    assert not listing(tmp_path / "d")


def test_wrong_cifar_sources_are_refused_and_leave_nothing(tmp_path, cifar10, monkeypatch):
  flipped = {**cifar10, "data_batch_3.bin": cifar10["data_batch_3.bin"][:-1] + b"!"}
  whole = pack(tmp_path / "whole", "cifar-10-batches-bin/", cifar10).read_bytes()
  for number, (data, word) in enumerate(
    (
      (pack(tmp_path / "a", "cifar-10-batches-bin/", flipped).read_bytes(), r"data_batch_3.bin in .* not the original"),
      (pack(tmp_path / "b", "cifar-10-batches-py/", cifar10).read_bytes(), "not the binary version"),
      (whole[: len(whole) // 2], "not the binary version"),
      (whole[:1000] + bytes(1000) + whole[2000:], "not the binary version"),
      (os.urandom(1000), "not the binary version"),
      (b"", "not the binary version"),
    )
  ):
    file = tmp_path / f"{number}.tar.gz"
    file.write_bytes(data)
    with pytest.raises(Refusal, match=word):
      prepare("cifar10", str(tmp_path / "d"), str(file))
    assert not listing(tmp_path / "d")
  with pytest.raises(Refusal, match=r"does not exist; --from takes cifar-10-binary.tar.gz \(http.*\) or the folder"):
    prepare("cifar10", str(tmp_path / "d"), str(tmp_path / "gone"))
  with pytest.raises(Refusal, match="not the binary version"):
    prepare("cifar10", str(tmp_path / "d"), str(tmp_path))
  for names in (CIFAR10_NAMES[:9], CIFAR10_NAMES[::-1], [*CIFAR10_NAMES[:9], "ship"]):
    listed = {**cifar10, "batches.meta.txt": "\n".join(names).encode()}
    with pytest.raises(Refusal, match="does not list the 10 classes"):
      prepare("cifar10", str(tmp_path / "d"), str(unpack(tmp_path / "u", listed)))
  as_original(monkeypatch, "cifar10", {"train": 100, "test": 21})
  with pytest.raises(Refusal, match="splits"):
    prepare("cifar10", str(tmp_path / "d"), str(pack(tmp_path / "c", "cifar-10-batches-bin/", cifar10)))
  assert not listing(tmp_path / "d")


# Downloads.


@pytest.fixture
def server(tmp_path, cifar10, monkeypatch):
  """Serves a CIFAR-10 archive at the place that the builder downloads from; yields the requests that came in."""
  folder = tmp_path / "served"
  folder.mkdir()
  archive = pack(folder / "cifar-10-binary.tar.gz", "cifar-10-batches-bin/", cifar10)
  seen = []

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args):
      super().__init__(*args, directory=folder)

    def log_message(self, *args):
      seen.append(args)

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    download_from(monkeypatch, f"http://127.0.0.1:{httpd.server_port}/cifar-10-binary.tar.gz")
    monkeypatch.setattr(builders, "published_sha256", lambda name, url: builders.digest_of(archive, "sha256"))
    yield seen
    httpd.shutdown()


def download_from(monkeypatch, url):
  info = tfds.image_classification.Cifar10._cifar_info.fget(builders.Cifar10)
  monkeypatch.setattr(builders.Cifar10, "_cifar_info", info._replace(url=url))
  monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_online_the_archive_is_downloaded_by_tfds(tmp_path, server, monkeypatch):
  monkeypatch.setattr(builders.Cifar10, "MD5", {"test_batch.bin": "what the archive as a whole vouches for"})
  prepare("cifar10", str(tmp_path / "d"))
  assert len(datasets.find("cifar10", str(tmp_path / "d")).load_evaluation("test")) == 20 and server
  assert listing(tmp_path / "d") == ["cifar10", "downloads"]


def test_offline_is_refused_within_seconds(tmp_path, monkeypatch, server):
  monkeypatch.setattr(builders, "SECONDS_TO_ANSWER", 0.5)
  with socket.socket() as silent:
    silent.bind(("127.0.0.1", 0))
    silent.listen()
    port = silent.getsockname()[1]
    for url in (
      "http://127.0.0.1:9/cifar-10-binary.tar.gz",  # nobody listens
      f"http://127.0.0.1:{port}/cifar-10-binary.tar.gz",  # nobody answers
      "http://nowhere.invalid/cifar-10-binary.tar.gz",
      builders.Cifar10._cifar_info.url.replace("cifar-10-binary", "gone/cifar-10-binary"),  # an answer, but a 404
    ):
      download_from(monkeypatch, url)
      start = time.monotonic()
      with pytest.raises(
        Refusal, match=r"cannot download .*get cifar-10-binary.tar.gz in another way and pass it by --from"
      ):
        prepare("cifar10", str(tmp_path / "d"))
      assert time.monotonic() - start < 5
  assert datasets.prepared("cifar10", str(tmp_path / "d")) is None


# A data set of one's own.


def deep_png():
  """A PNG of 8 x 8 pixels with 16 bits in each of three channels, which Pillow reads and cannot write."""
  rows = b"".join(b"\0" + bytes(8 * 3 * 2) for _ in range(8))
  parts = ((b"IHDR", struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
  chunks = (struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in parts)
  return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


DEEP = deep_png()


def write(path, pixels, **options):
  path.parent.mkdir(parents=True, exist_ok=True)
  (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(path, **options)
  return path


def flowers(folder, splits=(("train", 4), ("test", 2)), shape=(8, 8, 3), classes=("rose", "aster", "tulip")):
  """A folder of PNG images of noise."""
  rng = np.random.default_rng(0)
  for split, count in splits:
    for name in classes:
      for i in range(count):
        write(folder / split / name / f"{i}.png", rng.integers(0, 256, shape, dtype=np.uint8))
  return folder


def refused(source, word, **options):
  """Preparing `source` is refused with `word` and leaves nothing."""
  data_dir = source.parent / "refused"
  with pytest.raises(Refusal, match=word) as caught:
    prepare("flowers", str(data_dir), str(source), **options)
  assert "\n" not in str(caught.value)
  assert not listing(data_dir)


def test_a_folder_of_images(tmp_path, capsys):
  source, data_dir = flowers(tmp_path / "f"), str(tmp_path / "d")
  assert main(["flowers", "--data_dir", data_dir, "--from", str(source)]) == 0
  assert "3 classes, 8x8x3, 12 train, 6 test images" in capsys.readouterr().out
  spec = datasets.find("flowers", data_dir).spec
  assert (spec.num_classes, spec.image_shape, spec.sizes, spec.photographs) == (
    3,
    (8, 8, 3),
    {"train": 12, "test": 6},
    True,
  )
  data = datasets.find("flowers", data_dir)
  for split, ours in (("train", data.load_train("test")), ("test", data.load_evaluation("test"))):
    files = [
      (np.asarray(Image.open(f)), label)
      for label, name in enumerate(["aster", "rose", "tulip"])
      for f in (source / split / name).iterdir()
    ]
    assert pairs(ours.images, ours.labels) == pairs(*zip(*files, strict=True))
  x = np.stack([np.asarray(Image.open(f)) for f in source.glob("train/*/*")]) / 255.0
  assert np.allclose(spec.mean, x.mean((0, 1, 2)), atol=1e-4) and np.allclose(spec.std, x.std((0, 1, 2)), atol=1e-4)
  stock = tfds.data_source("flowers", split="train", data_dir=data_dir)
  assert len(stock) == 12, "stock TFDS reads it"
  names = tfds.builder_from_directory(os.path.join(data_dir, "flowers", "1.0.0")).info.features["label"].names
  assert names == ["aster", "rose", "tulip"]
  assert main(["flowers", "--data_dir", data_dir, "--from", str(source)]) == 0
  assert "is prepared already; delete" in capsys.readouterr().out
  assert listing(tmp_path / "d") == ["flowers"]


def test_without_a_training_split(tmp_path):
  prepare("flowers", str(tmp_path / "d"), str(flowers(tmp_path / "f", [("test", 2)])), photographs=False)
  spec = datasets.find("flowers", str(tmp_path / "d")).spec
  assert spec.sizes == {"test": 6} and spec.mean is None and spec.std is None and not spec.photographs
  data = datasets.find("flowers", str(tmp_path / "d"))
  assert len(data.load_evaluation("test")) == 6
  for load, word in ((data.load_train, "no training split"), (data.load_evaluation, "no training split to hold")):
    with pytest.raises(Refusal, match=f"data set 'flowers' has {word}"):
      load("validation")


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOUR = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)
ALPHA = np.full((8, 8, 1), 100, np.uint8)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
  ("picture", "options", "want"),
  [
    (GREY, {}, GREY[..., None]),
    (Image.fromarray(np.concatenate([GREY[..., None], ALPHA], -1)), {}, GREY[..., None]),
    (Image.fromarray(GREY > 31), {}, (GREY > 31).astype(np.uint8)[..., None] * 255),
    (COLOUR, {}, COLOUR),
    (np.concatenate([COLOUR, ALPHA], -1), {}, COLOUR),
    (Image.fromarray(COLOUR).quantize(64), {}, COLOUR),
    (Image.fromarray(COLOUR).quantize(64), {"transparency": bytes(range(64))}, COLOUR),
    (Image.fromarray(COLOUR).convert("CMYK"), {"format": "JPEG", "quality": 100, "subsampling": 0}, None),
  ],
  ids=["L", "LA", "1", "RGB", "RGBA", "P", "P+alpha", "CMYK"],
)
def test_every_kind_of_image(tmp_path, picture, options, want):
  folder = flowers(tmp_path / "f", [("test", 1)], shape=(8, 8) if want is None or want.shape[-1] == 1 else (8, 8, 3))
  write(folder / "test" / "aster" / "0.PNG", picture, **{"format": "PNG", **options})
  os.remove(folder / "test" / "aster" / "0.png")
  prepare("flowers", str(tmp_path / "d"), str(folder))
  test = datasets.find("flowers", str(tmp_path / "d")).load_evaluation("test")
  (image,) = np.asarray(test.images)[np.asarray(test.labels) == 0]
  if want is None:
    assert image.shape == (8, 8, 3) and np.abs(image.astype(int) - COLOUR).max() < 20
  else:
    np.testing.assert_array_equal(image, want)


def test_channels(tmp_path):
  mixed = flowers(flowers(tmp_path / "m", shape=(8, 8)), [("test", 1)], classes=("rose",))
  for source, channels, want in (
    (flowers(tmp_path / "g", shape=(8, 8)), None, 1),
    (tmp_path / "g", 3, 3),
    (mixed, None, 3),
    (mixed, 1, 1),
  ):
    data_dir = str(tmp_path / f"{source.name}{channels}")
    prepare("flowers", data_dir, str(source), channels=channels)
    spec = datasets.find("flowers", data_dir).spec
    assert spec.channels == want == len(spec.mean) == len(spec.std)
    assert datasets.find("flowers", data_dir).load_evaluation("test").images.shape == (6, 8, 8, want)


def test_image_size(tmp_path):
  folder = tmp_path / "f"
  wide = np.zeros((20, 60, 3), np.uint8)
  wide[:, 20:40] = 200  # the middle
  for name in ("a", "b"):
    write(folder / "test" / name / "wide.png", wide)
    write(folder / "test" / name / "square.png", np.full((10, 10, 3), 200, np.uint8))
  refused(folder, r"wide.png is 60x20, .*square.png is 10x10; images must be square .*--image_size")
  refused(folder, "--image_size must be at least 1 and at most 4,096, got 0", image_size=0)
  prepare("flowers", str(tmp_path / "d"), str(folder), image_size=10)
  images = np.asarray(datasets.find("flowers", str(tmp_path / "d")).load_evaluation("test").images)
  assert images.shape == (4, 10, 10, 3) and images.min() > 180, "resized, and the middle is kept"


def test_folders_that_do_not_fit_are_refused(tmp_path):
  refused(tmp_path / "gone", "gone is not a folder")
  (tmp_path / "file").write_text("")
  refused(tmp_path / "file", "file is not a folder")
  refused(flowers(tmp_path / "a", [("train", 1)]), r"a/test does not exist; --from takes a folder with test/CLASS")
  refused(flowers(tmp_path / "b", [("test", 1)], classes=("rose",)), "must have at least two class folders, got 1")
  refused(
    flowers(flowers(tmp_path / "c"), [("train", 1)], classes=("iris",)), "class 'iris' is only in one of .*train and"
  )
  refused(flowers(flowers(tmp_path / "d"), [("test", 1)], classes=("iris",)), "class 'iris' is only in one of")
  write(flowers(tmp_path / "e") / "train" / "0.png", GREY)
  refused(tmp_path / "e", "0.png is not in a class folder; move it to")
  (flowers(tmp_path / "f") / "train" / "rose" / "notes.txt").write_text("")
  refused(tmp_path / "f", "notes.txt is no file that ends in .png, .jpg, .jpeg")
  (flowers(tmp_path / "g") / "train" / "rose" / "deeper").mkdir()
  refused(tmp_path / "g", "deeper is no file that ends in")
  for kept in (flowers(tmp_path / "h") / "test" / "rose").iterdir():
    kept.unlink()
  refused(tmp_path / "h", "rose has no images")
  write(flowers(tmp_path / "i") / "test" / "rose" / "1.png", GREY.astype(np.uint16) * 256)
  refused(tmp_path / "i", "1.png has more than 8 bits per channel")
  (flowers(tmp_path / "j", [("test", 1)]) / "test" / "rose" / "0.png").write_bytes(DEEP)
  refused(tmp_path / "j", "0.png has more than 8 bits per channel")
  for name in ("rose ", "ro\nse", " rose", "Rose", "ro\u00a0se", "\uff52ose", "ro\u200bse"):
    folder = tmp_path / f"k{ord(name[0])}{len(name)}{ord(name[2])}"
    flowers(folder, [("test", 1)], classes=("rose", "ro se", name))
    refused(folder, "cannot be printed; rename it|differ in blanks or case alone; rename one")
  refused(flowers(tmp_path / "l", [("test", 1)]), "at most 4,096, got 10000", image_size=10_000)


def test_images_that_are_too_large_are_refused_before_they_are_read(tmp_path, monkeypatch):
  folder = flowers(tmp_path / "f", [("test", 1)], shape=(8, 8, 3))
  Image.new("1", (9_000, 9_000)).save(folder / "test" / "rose" / "0.png")  # 10 kB
  refused(folder, "0.png is 9000x9000, more than 67,108,864 pixels; make it smaller", image_size=8)
  Image.new("1", (20_000, 20_000)).save(folder / "test" / "rose" / "0.png")
  refused(folder, "0.png has more than 67,108,864 pixels; make it smaller", image_size=8)
  folder = flowers(tmp_path / "g", [("test", 1)], shape=(8, 8, 3))
  monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 8 * 8 * 3 * 3 - 1}[name])
  refused(folder, "GiB of memory; use fewer, or a smaller --image_size")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stand_upright(tmp_path, orientation):
  """As their EXIF entry says, which cameras write in place of turning the pixels."""
  upright = np.zeros((8, 8), np.uint8)
  upright[:2, :3] = 255
  image = Image.fromarray(upright)
  turns = {2: (0,), 3: (3,), 4: (1,), 5: (5,), 6: (2,), 7: (6,), 8: (4,)}  # Image.Transpose that undoes the camera's
  for turn in turns.get(orientation, ()):
    image = image.transpose(turn)
  exif = Image.Exif()
  exif[0x0112] = orientation
  path = write(tmp_path / "0.png", image, exif=exif)
  np.testing.assert_array_equal(np.asarray(folders.read(path)), upright)


def test_damaged_images_are_named(tmp_path):
  whole = builders.png(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
  gif = io.BytesIO()
  Image.fromarray(GREY).save(gif, "GIF")
  middle = len(whole) // 2
  for number, data in enumerate(
    (b"", b"no image", whole[:40], whole[:middle], whole[:middle] + b"!!!!" + whole[middle + 4 :], gif.getvalue())
  ):
    folder = flowers(tmp_path / str(number))
    (folder / "train" / "tulip" / "2.png").write_bytes(data)
    refused(folder, "train/tulip/2.png is damaged or not a PNG or JPEG")


def test_hidden_files_are_passed_over(tmp_path):
  folder = flowers(tmp_path / "f")
  for place in (folder, folder / "test", folder / "test" / "rose"):
    (place / ".DS_Store").write_bytes(b"x")
  prepare("flowers", str(tmp_path / "d"), str(folder))
  assert datasets.find("flowers", str(tmp_path / "d")).spec.sizes == {"train": 12, "test": 6}


def test_names(tmp_path, capsys):
  source = str(flowers(tmp_path / "f"))
  for name in ("Flowers", "my flowers", "../flowers", "/flowers", "flo-wers", "1st", "", "downloads"):
    assert main([name, "--data_dir", str(tmp_path / "d"), "--from", source]) == 2
    error = capsys.readouterr().err
    assert "the name of a data set must be lower-case letters" in error and f"got '{name}'" in error
  assert main(["cifar10", "--data_dir", str(tmp_path / "d"), "--from", source]) == 2
  assert "not the binary version of 'cifar10'" in capsys.readouterr().err
  for flag in (["--image_size", "8"], ["--channels", "1"], ["--no_flip"]):
    assert main(["cifar10", "--data_dir", str(tmp_path / "d"), "--from", source, *flag]) == 2
    assert "are for data sets of your own, not for 'cifar10'" in capsys.readouterr().err
  assert main(["cifar11", "--data_dir", str(tmp_path / "d")]) == 2
  assert "no data set 'cifar11'; choose one of digits, cifar10" in capsys.readouterr().err
  assert not listing(tmp_path / "d")


def test_a_constant_channel_can_be_normalised(tmp_path):
  folder = flowers(tmp_path / "f")
  for file in folder.glob("*/*/*"):
    pixels = np.asarray(Image.open(file)).copy()
    pixels[..., 2] = 0
    write(file, pixels)
  prepare("flowers", str(tmp_path / "d"), str(folder))
  spec = datasets.find("flowers", str(tmp_path / "d")).spec
  assert spec.mean[2] == 0.0 and spec.std[2] == 1.0


def test_what_was_prepared_is_checked_when_it_is_read(tmp_path):
  data_dir = str(tmp_path / "d")
  prepare("flowers", data_dir, str(flowers(tmp_path / "f")))
  folder = tmp_path / "d" / "flowers" / "1.0.0"
  (records,) = folder.glob("flowers-test*")
  whole = records.read_bytes()
  for damage in (lambda: records.write_bytes(whole[: len(whole) // 2]), records.unlink):
    damage()
    with pytest.raises(Refusal, match=f"{folder} is damaged .*delete it and prepare 'flowers' again"):
      datasets.find("flowers", data_dir).load_evaluation("test")
  record = json.loads((folder / "metadata.json").read_text())
  for edit, message in (
    ({"num_classes": 2}, "should have 2 classes and images"),
    ({"image_size": 9}, r"should have 3 classes and images of \(9, 9, 3\)"),
    ({"num_classes": "3"}, "num_classes is '3'"),
    ({"channels": 0}, "channels is 0"),
    ({"mean": [0.5, 0.5]}, "mean is"),
    ({"std": [0.5, 0.5, 0.0]}, "std is"),
    ({"std": [0.5, 0.5, float("inf")]}, "std is"),
    ({"sizes": [1]}, "sizes is None"),
    ({"sizes": {"train": 12}}, "test_split is wrong"),
    ({"more": 1}, "unexpected keyword"),
  ):
    (folder / "metadata.json").write_text(json.dumps(record | edit))
    with pytest.raises(Refusal, match=message):
      datasets.find("flowers", data_dir).require()
  for text in ("[]", "[" * 100_000, ""):
    (folder / "metadata.json").write_text(text)
    with pytest.raises(Refusal, match="metadata.json was not written by preparing data set 'flowers'"):
      datasets.find("flowers", data_dir).require()
  (folder / "metadata.json").write_text(json.dumps(record))
  features = (folder / "features.json").read_text()
  for text in ("{", "[]", features.replace('"image"', '"picture"'), features.replace('"label"', '"title"')):
    (folder / "features.json").write_text(text)
    with pytest.raises(Refusal, match="delete it and prepare"):
      datasets.find("flowers", data_dir).require()
  (folder / "features.json").write_text(features)
  info = json.loads((folder / "dataset_info.json").read_text())
  (folder / "dataset_info.json").write_text(json.dumps({**info, "fileFormat": "tfrecord"}))
  with pytest.raises(Refusal, match="written as tfrecord, which only TensorFlow reads"):
    datasets.find("flowers", data_dir).require()
  with pytest.raises(Refusal, match="written as tfrecord"):
    prepare("flowers", data_dir, str(tmp_path / "f"))
  (folder / "dataset_info.json").write_text("{")
  with pytest.raises(Refusal, match="is damaged .*delete it and prepare 'flowers' again"):
    datasets.find("flowers", data_dir).require()
  (folder / "metadata.json").write_text('{"num_classes": 3}')
  with pytest.raises(Refusal, match=r"metadata.json was not written by preparing data set 'flowers'"):
    datasets.find("flowers", data_dir).require()


# Interrupted, at once, and without room.


def spawn(data_dir, source):
  argv = [sys.executable, "-m", "cpsc_jax.datasets.prepare", "flowers", "--data_dir", data_dir, "--from", source]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
  return subprocess.Popen([*map(str, argv)], cwd=REPOSITORY, **pipes)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
  return flowers(tmp_path_factory.mktemp("many"), [("train", 100), ("test", 100)], shape=(64, 64, 3))


def test_killed_preparation_never_looks_finished(tmp_path, many):
  for stage in (".flowers.partial", ".flowers.partial/flowers/incomplete*"):
    process = spawn(tmp_path, many)
    while not list(tmp_path.glob(stage)) and process.poll() is None:
      time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert listing(tmp_path) == [".flowers.lock", ".flowers.partial"]
    assert datasets.prepared("flowers", str(tmp_path)) is None
    with pytest.raises(Refusal, match="no data set 'flowers'"):
      datasets.find("flowers", str(tmp_path)).require()
  prepare("flowers", str(tmp_path), str(many))
  assert len(datasets.find("flowers", str(tmp_path)).load_evaluation("test")) == 300
  assert listing(tmp_path) == ["flowers"], "what the dead left is gone"


def test_two_at_once(tmp_path, many):
  both = [spawn(tmp_path, many) for _ in range(2)]
  for process in both:
    out, error = process.communicate()
    assert process.returncode == 0 and "300 train, 300 test images" in out, error
  assert listing(tmp_path) == ["flowers"]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, capsys):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr("cpsc_jax.datasets.prepare.os.rename", interrupted)
  assert main(["flowers", "--data_dir", str(tmp_path / "d"), "--from", str(flowers(tmp_path / "f"))]) == 130
  assert "interrupted" in capsys.readouterr().err and not listing(tmp_path / "d")


def test_no_room(tmp_path, many):
  """A limit on the size of files fails in the writer as a full disk does."""
  limited = f"""
import resource, sys
from cpsc_jax.datasets.prepare import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.exit(main(["flowers", "--data_dir", {str(tmp_path / "d")!r}, "--from", {str(many)!r}]))
"""
  done = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, cwd=REPOSITORY, check=False)
  error = done.stderr
  assert done.returncode == 2 and error.startswith("cpsc_jax: cannot prepare data set 'flowers'"), error
  assert error.count("\n") == 1 and "File too large" in error and "--data_dir" in error
  assert not listing(tmp_path / "d")


def test_a_place_that_cannot_be_written(tmp_path, capsys):
  (tmp_path / "file").write_text("")
  for place in (tmp_path / "file", tmp_path / "file" / "d"):
    assert main(["flowers", "--data_dir", str(place), "--from", str(flowers(tmp_path / "f"))]) == 2
    assert "choose another --data_dir" in capsys.readouterr().err


# The real images.


@pytest.mark.slow
def test_real_cifar10(tmp_path):
  """The real images, prepared from the original archive and read back pixel for pixel."""
  script = shared("data", "unpack.py")
  subprocess.run([sys.executable, script, "cifar10", tmp_path], check=True)
  subprocess.run([sys.executable, script, "cifar10-npz", tmp_path], check=True)
  archive = next(pathlib.Path(tmp_path).glob("*.tar.gz"))
  prepare("cifar10", str(tmp_path / "d"), str(archive))
  data = datasets.find("cifar10", str(tmp_path / "d"))
  for split, ours in (("train", data.load_train("test")), ("test", data.load_evaluation("test"))):
    with np.load(tmp_path / f"cifar10_{split}.npz") as real:
      assert pairs(ours.images, ours.labels) == pairs(real["image"], real["label"])


@pytest.mark.parametrize("splits", [("test",), pytest.param(("train", "test"), marks=pytest.mark.slow)])
def test_twenty_classes_of_tiny_imagenet(tmp_path, splits):
  subprocess.run([sys.executable, shared("data", "unpack.py"), "tiny20", tmp_path], check=True)
  source = tmp_path / "tiny20"
  if "train" not in splits:
    shutil.rmtree(source / "train")
  prepare("tiny20", str(tmp_path / "d"), str(source))
  spec = datasets.find("tiny20", str(tmp_path / "d")).spec
  assert spec.image_shape == (64, 64, 3) and spec.sizes == {s: {"train": 10000, "test": 1000}[s] for s in splits}
  test = datasets.find("tiny20", str(tmp_path / "d")).load_evaluation("test")
  assert np.bincount(test.labels).tolist() == [50] * 20
