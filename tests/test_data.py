"""Data sets: prepared without TensorFlow, whole, and refused at once when they are not there."""

import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, shared

from cpsc_jax import datasets, evaluate
from cpsc_jax.datasets import builders
from cpsc_jax.datasets.prepare import main, prepare
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import make_mesh
from cpsc_jax.state import Output


def test_digits_are_the_bundled_ones_split_once(digits_dir):
  from sklearn.datasets import load_digits

  train, test = datasets.load_train("digits", digits_dir), datasets.load_test("digits", digits_dir)
  assert (len(train), len(test)) == (1343, 454)
  assert test.images.shape == (454, 8, 8, 1) and test.images.dtype == jnp.uint8
  assert np.ptp(np.bincount(test.labels)) <= 2, "stratified"
  as_set = lambda images: sorted(np.asarray(i).tobytes() for i in images)
  original = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
  assert sorted(as_set(train.images) + as_set(test.images)) == as_set(original)
  x = np.asarray(train.images) / 255.0
  spec = datasets.describe("digits")
  assert spec.mean[0] == pytest.approx(x.mean(), abs=1e-3) and spec.std[0] == pytest.approx(x.std(), abs=1e-3)


def test_the_split_is_fixed(digits_dir):
  test = datasets.load_test("digits", digits_dir)
  rows = sorted(np.asarray(i).tobytes() + bytes([int(y)]) for i, y in zip(test.images, test.labels, strict=True))
  assert hashlib.sha256(b"".join(rows)).hexdigest() == DIGITS_TEST


DIGITS_TEST = "fe4cd4d6bcf197abd871f755e56a7dfda0df79d88b9e89e3eaec596fcbe5f30b"


def test_tensorflow_is_not_needed(digits_dir):
  code = f"""
import sys
from cpsc_jax import datasets
datasets.require("digits", {digits_dir!r})
print(len(datasets.load_test("digits", {digits_dir!r})), "tensorflow" in sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
  assert done.stdout.strip() == "454 False", done.stderr


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn_cropped", "tiny_imagenet"])
def test_missing_data_is_refused_at_once(name, tmp_path):
  start = time.monotonic()
  with pytest.raises(Refusal, match=f"python -m cpsc_jax.datasets.prepare {name} --data_dir {tmp_path}"):
    datasets.require(name, str(tmp_path))
  assert time.monotonic() - start < 20


def test_data_dir_defaults(monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", "/somewhere")
  assert datasets.resolve_data_dir("") == "/somewhere"
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert datasets.resolve_data_dir("") == os.path.expanduser("~/tensorflow_datasets")


def cifar_archive(path, per_file=20, broken=False):
  """A CIFAR-10 binary archive with few images; `broken` cuts the last file short."""
  rng = np.random.default_rng(0)
  with tarfile.open(path, "w:gz") as tar:

    def add(name, data):
      info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      info.size = len(data)
      tar.addfile(info, io.BytesIO(data))

    kept = []
    for name in [f"data_batch_{k}.bin" for k in range(1, 6)] + ["test_batch.bin"]:
      rows = rng.integers(0, 256, (per_file, 3073), dtype=np.uint8)
      rows[:, 0] %= 10
      kept.append(rows)
      add(name, rows.tobytes()[: -5 if broken and name == "test_batch.bin" else None])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    add("batches.meta.txt", ("\n".join(names) + "\n\n").encode())
  return kept


def small(monkeypatch, train, test):
  import dataclasses

  spec = dataclasses.replace(datasets.DATASETS["cifar10"], sizes={"train": train, "test": test})
  monkeypatch.setitem(datasets.DATASETS, "cifar10", spec)


def test_cifar10_from_its_archive(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  small(monkeypatch, 100, 20)
  rows = cifar_archive(tmp_path / "c.tar.gz")
  prepare("cifar10", str(tmp_path / "d"), str(tmp_path / "c.tar.gz"))
  train, test = datasets.load_train("cifar10", str(tmp_path / "d")), datasets.load_test("cifar10", str(tmp_path / "d"))
  want = np.concatenate(rows[:5])
  pairs = lambda images, labels: sorted((int(y), np.asarray(x).tobytes()) for x, y in zip(images, labels, strict=True))
  original = want[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
  assert pairs(train.images, train.labels) == pairs(original, want[:, 0])
  assert len(test) == 20
  source = tfds.data_source("cifar10", split="test", data_dir=str(tmp_path / "d"))
  assert len(source) == 20 and source[0]["id"].decode().startswith("test_"), "stock TFDS reads it"
  assert prepare("cifar10", str(tmp_path / "d")), "a second preparation finds it done"
  assert [p.name for p in (tmp_path / "d").iterdir()] == ["cifar10"], "no scratch is left"


def test_wrong_archives_are_refused_and_leave_nothing(tmp_path, monkeypatch, capsys):
  cifar_archive(tmp_path / "few.tar.gz")
  cifar_archive(tmp_path / "cut.tar.gz", broken=True)
  (tmp_path / "noise.tar.gz").write_bytes(os.urandom(1000))
  for file, word in (
    ("few", "splits"),
    ("cut", "multiple of 3073"),
    ("noise", "not the binary archive"),
    ("gone", "does not exist"),
  ):
    with pytest.raises(Refusal, match=word):
      prepare("cifar10", str(tmp_path / "d"), str(tmp_path / f"{file}.tar.gz"))
    assert not list((tmp_path / "d").iterdir())
  with pytest.raises(SystemExit, match=r"cpsc_jax: no data set 'cifar11'"):
    main(["cifar11"])
  with pytest.raises(Refusal, match="not prepared"):
    datasets.require("cifar10", str(tmp_path / "d"))


def test_other_builders_from_small_archives(tmp_path, monkeypatch):
  import dataclasses
  import zipfile

  import scipy.io

  def shrink(name, sizes):
    monkeypatch.setitem(datasets.DATASETS, name, dataclasses.replace(datasets.DATASETS[name], sizes=sizes))

  rng = np.random.default_rng(0)
  (tmp_path / "svhn").mkdir()
  images = rng.integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
  labels = np.array([[10], [1], [2], [3], [9], [10], [5]], np.uint8)
  for split in ("train", "test"):
    scipy.io.savemat(tmp_path / "svhn" / f"{split}_32x32.mat", {"X": images, "y": labels})
  shrink("svhn_cropped", {"train": 7, "test": 7})
  prepare("svhn_cropped", str(tmp_path / "d"), str(tmp_path / "svhn"))
  test = datasets.load_test("svhn_cropped", str(tmp_path / "d"))
  assert sorted(np.asarray(test.labels).tolist()) == [0, 0, 1, 2, 3, 5, 9], "SVHN's 10 is the digit 0"

  wnids = [f"n{i:08d}" for i in range(200)]
  with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
    root = "tiny-imagenet-200/"
    archive.writestr(root + "wnids.txt", "\n".join(wnids))
    picture = builders.png(rng.integers(0, 256, (64, 64), dtype=np.uint8))  # greyscale, as some of the originals are
    for wnid in wnids[:4]:
      archive.writestr(f"{root}train/{wnid}/images/{wnid}_0.JPEG", picture)
    archive.writestr(root + "val/images/val_0.JPEG", picture)
    archive.writestr(root + "val/val_annotations.txt", f"val_0.JPEG\t{wnids[3]}\t0\t0\t1\t1\n")
  shrink("tiny_imagenet", {"train": 4, "validation": 1})
  prepare("tiny_imagenet", str(tmp_path / "d"), str(tmp_path / "t.zip"))
  validation = datasets.load_test("tiny_imagenet", str(tmp_path / "d"))
  assert validation.images.shape == (1, 64, 64, 3) and int(validation.labels[0]) == 3


def test_interrupted_preparation_never_looks_finished(tmp_path, monkeypatch):
  small(monkeypatch, 100, 20)
  cifar_archive(tmp_path / "c.tar.gz")

  def explode(*_, **__):
    raise KeyboardInterrupt

  monkeypatch.setattr("cpsc_jax.datasets.prepare.os.rename", explode)
  with pytest.raises(KeyboardInterrupt):
    prepare("cifar10", str(tmp_path / "d"), str(tmp_path / "c.tar.gz"))
  with pytest.raises(Refusal, match="not prepared"):
    datasets.require("cifar10", str(tmp_path / "d"))


class Reader:
  """A 'net' that reads the label out of the image, to see which images were classified."""

  def apply(self, variables, x, train):
    level = jnp.round((x[:, 0, 0, 0] * 0.5 + 0.5) * 255).astype(jnp.int32)
    return Output(jax.nn.one_hot(level, 256), x.reshape(x.shape[0], -1), ())


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 64])
def test_every_image_is_evaluated_exactly_once(batch_size):
  images = jnp.arange(10, dtype=jnp.uint8).reshape(10, 1, 1, 1) * 20
  classify = evaluate.compile_classifier(Reader(), (0.5,), (0.5,), batch_size, make_mesh())
  assert classify({}, images).tolist() == [20 * i for i in range(10)]


def test_normalise_and_back():
  images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
  spec = datasets.describe("cifar10")
  x = datasets.normalise(jnp.asarray(images), spec.mean, spec.std)
  np.testing.assert_allclose(datasets.denormalise(x, spec.mean, spec.std) * 255, images, atol=1e-3)


@pytest.mark.slow
def test_real_cifar10(tmp_path):
  """The real images, prepared from the original archive and read back pixel for pixel."""
  unpack = shared("data", "unpack.py")
  subprocess.run([sys.executable, unpack, "cifar10", tmp_path], check=True)
  subprocess.run([sys.executable, unpack, "cifar10-npz", tmp_path], check=True)
  archive = next(pathlib.Path(tmp_path).glob("*.tar.gz"))
  prepare("cifar10", str(tmp_path / "d"), str(archive))
  for split, load in (("train", datasets.load_train), ("test", datasets.load_test)):
    ours = load("cifar10", str(tmp_path / "d"))
    with np.load(tmp_path / f"cifar10_{split}.npz") as real:
      digest = lambda images, labels: sorted(zip(labels.tolist(), (hash(i.tobytes()) for i in images), strict=True))
      assert digest(np.asarray(ours.images), np.asarray(ours.labels)) == digest(real["image"], real["label"])


def test_augmentation_crops_and_flips():
  images = jnp.arange(2 * 4 * 4, dtype=jnp.uint8).reshape(2, 4, 4, 1) + 1
  key = jax.random.key(0)
  np.testing.assert_array_equal(datasets.augment(key, images, 0, False), images)
  seen = set()
  for seed in range(60):
    cropped = np.asarray(datasets.augment(jax.random.key(seed), images, 1, False))
    shifts = [
      (dy, dx)
      for dy in range(3)
      for dx in range(3)
      if np.array_equal(cropped[0], np.pad(images[0], ((1, 1), (1, 1), (0, 0)))[dy : dy + 4, dx : dx + 4])
    ]
    assert len(shifts) == 1
    seen.update(shifts)
  assert len(seen) == 9, "every shift occurs"
  flips = [np.asarray(datasets.augment(jax.random.key(s), images, 0, True)) for s in range(20)]
  assert all(np.array_equal(f[0], images[0]) or np.array_equal(f[0], images[0, :, ::-1]) for f in flips)
  assert len({f[0].tobytes() for f in flips}) == 2
  black = datasets.augment(key, jnp.ones((1, 2, 2, 2)), 2, False, fill=jnp.array([-1.0, -2.0]))
  assert set(np.unique(black[..., 0])) <= {1.0, -1.0} and set(np.unique(black[..., 1])) <= {1.0, -2.0}
