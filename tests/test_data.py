"""Data sets: read without TensorFlow, whole, and refused at once when they are not there."""

import hashlib
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

from cpsc_jax import datasets, evaluate
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
  spec = datasets.describe("digits", digits_dir)
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
  spec = datasets.DATASETS["cifar10"]
  x = datasets.normalise(jnp.asarray(images), spec.mean, spec.std)
  np.testing.assert_allclose(datasets.denormalise(x, spec.mean, spec.std) * 255, images, atol=1e-3)


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
