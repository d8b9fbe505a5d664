"""Data sets: read without TensorFlow, whole, and refused at once when they are not there."""

import dataclasses
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


def as_bytes(split):
  """The images of a split with their labels, one bytes object each, in the order of the split."""
  images, labels = np.asarray(split.images), np.asarray(split.labels)
  return [image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True)]


def digest(split):
  return hashlib.sha256(b"".join(sorted(as_bytes(split)))).hexdigest()


def test_digits_are_the_bundled_ones_split_once(digits_dir):
  from sklearn.datasets import load_digits

  digits = datasets.find("digits", digits_dir)
  train, test = digits.load_train("test"), digits.load_evaluation("test")
  assert (len(train), len(test)) == (1343, 454)
  assert test.images.shape == (454, 8, 8, 1) and test.images.dtype == jnp.uint8
  assert np.ptp(np.bincount(test.labels)) <= 2, "stratified"
  original = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
  assert sorted(as_bytes(train) + as_bytes(test)) == sorted(
    as_bytes(datasets.Split(original[..., None], load_digits().target))
  )
  x = np.asarray(train.images) / 255.0
  spec = digits.spec
  assert spec.mean[0] == pytest.approx(x.mean(), abs=1e-3) and spec.std[0] == pytest.approx(x.std(), abs=1e-3)


def test_the_split_is_fixed(digits_dir):
  test = datasets.find("digits", digits_dir).load_evaluation("test")
  assert digest(test) == DIGITS_TEST


DIGITS_TEST = "fe4cd4d6bcf197abd871f755e56a7dfda0df79d88b9e89e3eaec596fcbe5f30b"


# Validation.


def test_the_validation_part_is_pinned():
  """If it changed, a teacher that was trained before would be evaluated on images that it was trained on."""
  held_out = {name: np.flatnonzero(datasets.is_held_out(spec)) for name, spec in datasets.DATASETS.items()}
  assert {name: len(rows) for name, rows in held_out.items()} == {
    "digits": 268,
    "cifar10": 5000,
    "cifar100": 5000,
    "svhn_cropped": 7325,
    "tiny_imagenet": 10000,
  }
  assert held_out["digits"][:8].tolist() == DIGITS_HELD_OUT
  assert held_out["cifar10"][:8].tolist() == CIFAR10_HELD_OUT


DIGITS_HELD_OUT = [2, 5, 6, 13, 14, 17, 19, 23]
CIFAR10_HELD_OUT = [5, 6, 13, 14, 17, 19, 29, 47]
DIGITS_VALIDATION = "43c7684c94e790e2039586a8c9843df6a870e1ac00640b2e051f188240f4d282"


def test_validation_and_training_parts_are_disjoint_and_together_the_training_split(digits_dir):
  digits = datasets.find("digits", digits_dir)
  whole, train, validation = (
    digits.load_train("test"),
    digits.load_train("validation"),
    digits.load_evaluation("validation"),
  )
  assert (len(train), len(validation)) == (1343 - 268, 268) and digits.spec.validation_size == 268
  assert validation.images.shape == (268, 8, 8, 1) and validation.images.dtype == jnp.uint8
  assert sorted(as_bytes(train) + as_bytes(validation)) == sorted(as_bytes(whole))
  assert len({*as_bytes(whole)}) == 1343, "no image occurs twice"
  held_out = datasets.is_held_out(digits.spec)
  assert as_bytes(validation) == [row for row, held in zip(as_bytes(whole), held_out, strict=True) if held], "in order"
  assert as_bytes(train) == [row for row, held in zip(as_bytes(whole), held_out, strict=True) if not held]
  assert np.bincount(validation.labels, minlength=10).min() > 10, "every class occurs"
  assert digest(validation) == DIGITS_VALIDATION


@pytest.mark.parametrize(("train", "size"), [(0, 0), (4, 0), (5, 1), (9_999, 1_999), (10_000, 1_000), (73_257, 7_325)])
def test_the_size_of_the_validation_part(train, size):
  spec = dataclasses.replace(datasets.DATASETS["digits"], sizes={"train": train, "test": 3})
  held_out = datasets.is_held_out(spec)
  assert spec.validation_size == size == held_out.sum() and held_out.shape == (train,)


def test_splits_that_do_not_exist_are_refused(digits_dir):
  digits = datasets.find("digits", digits_dir)
  for load in (digits.load_evaluation, digits.load_train):
    with pytest.raises(Refusal, match="the evaluation split must be one of test, validation, got 'train'"):
      load("train")
  few = datasets.InMemory(digits.spec, np.zeros((2, 8, 8, 1), np.uint8), [0, 1])
  few.spec = dataclasses.replace(few.spec, sizes={"train": 4, "test": 2})
  with pytest.raises(Refusal, match="has only 4 training images to hold a validation part out of"):
    few.load_evaluation("validation")


# Long tails.


def test_a_long_tail_is_the_exponential_and_fixed(digits_dir):
  labels = datasets.find("digits", digits_dir).labels("train")
  there = np.bincount(labels)
  rows = datasets.long_tail(labels, 10, 25.0)
  kept = np.bincount(labels[rows])
  assert kept.tolist() == [int(there[0] * 25 ** (-c / 9) + 1e-9) for c in range(10)] and kept[-1] == 5
  assert np.array_equal(rows, np.unique(rows)), "in their order, none twice"
  assert rows[:8].tolist() == LONG_TAIL and np.array_equal(rows, datasets.long_tail(labels, 10, 25.0))
  assert np.isin(datasets.long_tail(labels, 10, 50.0), rows).all(), "a longer tail keeps none that a shorter one drops"
  assert np.array_equal(datasets.long_tail(labels, 10, 1.0), np.arange(len(labels)))


LONG_TAIL = [1, 3, 6, 8, 9, 10, 13, 17]


def test_a_class_keeps_no_more_than_it_has():
  labels = np.repeat([0, 1, 2], [100, 4, 50])
  assert np.bincount(labels[datasets.long_tail(labels, 3, 10.0)]).tolist() == [100, 4, 10]
  assert np.bincount(labels[datasets.long_tail(labels, 3, 100.0)]).tolist() == [100, 4, 1]
  with pytest.raises(Refusal, match="leaves class 2 without a training image: the first class has 100; set it to at"):
    datasets.long_tail(labels, 3, 101.0)
  with pytest.raises(Refusal, match="needs at least 3 classes"):
    datasets.long_tail(labels % 2, 2, 2.0)


def test_thirds_of_the_classes():
  thirds = datasets.thirds([5, 100, 20, 20, 1, 60, 3])
  assert thirds == {"head": [1, 2, 5], "middle": [0, 3], "tail": [4, 6]}


# Arrays.


SPEC = datasets.Dataset(3, 4, 2, (0.5, 0.5), (0.2, 0.2), {"train": 100, "test": 50})
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 2), dtype=np.uint8)
LABELS = [0, 1, 2, 2, 1, 0]


@pytest.mark.parametrize("labels", [LABELS, np.array(LABELS, np.uint8), np.array(LABELS, np.int64), jnp.array(LABELS)])
@pytest.mark.parametrize(
  "images",
  [IMAGES, jnp.asarray(IMAGES), IMAGES / 255, (IMAGES / 255).astype(np.float32), IMAGES.astype(np.float32) * (1 / 255)],
  ids=["uint8", "jax", "float64", "float32", "by the reciprocal"],
)
def test_arrays_are_a_data_set(images, labels):
  data = datasets.InMemory(SPEC, images, labels)
  data.require()
  test = data.load_evaluation("test")
  np.testing.assert_array_equal(test.images, IMAGES)
  assert test.images.dtype == jnp.uint8 and test.labels.dtype == jnp.int32 and test.labels.tolist() == LABELS
  assert (data.name, data.class_names(), data.spec.sizes) == ("arrays", ["0", "1", "2"], {"test": 6})
  assert dataclasses.replace(data.spec, sizes=SPEC.sizes) == SPEC


def test_arrays_are_copied_and_named():
  images = IMAGES.copy()
  data = datasets.InMemory(SPEC, images, LABELS, ["cat", "dog", "frog"], name="pets")
  images[:] = 0
  np.testing.assert_array_equal(data.load_evaluation("test").images, IMAGES)
  assert data.class_names() == ["cat", "dog", "frog"] and data.name == "pets"


def test_arrays_have_no_training_split():
  data = datasets.InMemory(SPEC, IMAGES, LABELS, name="pets")
  for split in datasets.EVALUATION_SPLITS:
    with pytest.raises(Refusal, match="data set 'pets' has no training split"):
      data.load_train(split)
  with pytest.raises(Refusal, match="'pets' has no training split to hold a validation part out of; .* 'test' instead"):
    data.load_evaluation("validation")


NAN = np.where(np.arange(IMAGES.size).reshape(IMAGES.shape) == 7, np.nan, IMAGES / 255)
WRONG_ARRAYS = {
  "no channels": ({"images": IMAGES[..., 0]}, r"must have shape \(N, 4, 4, 2\) .*got \(6, 4, 4\)"),
  "channels first": ({"images": IMAGES.transpose(0, 3, 1, 2)}, r"must have shape \(N, 4, 4, 2\) .*got \(6, 2, 4, 4\)"),
  "no images": ({"images": IMAGES[:0], "labels": []}, r"N of at least 1, got \(0, 4, 4, 2\)"),
  "too few labels": ({"labels": LABELS[1:]}, r"labels of 'arrays' must have shape \(6,\), one per image, got \(5,\)"),
  "one-hot labels": ({"labels": np.eye(3)[LABELS]}, r"must have shape \(6,\), one per image, got \(6, 3\)"),
  "float labels": ({"labels": np.array(LABELS, float)}, "labels of 'arrays' must be integers, got float64"),
  "boolean labels": ({"labels": np.array(LABELS) > 0}, "must be integers, got bool"),
  "label too large": ({"labels": [0, 1, 2, 3, 1, 0]}, "must be between 0 and 2, got 0 to 3"),
  "negative label": ({"labels": [0, 1, 2, -1, 1, 0]}, "must be between 0 and 2, got -1 to 2"),
  "integers": ({"images": IMAGES.astype(np.int64)}, r"must be uint8 or floats in \[0, 1\], got int64"),
  "booleans": ({"images": IMAGES > 100}, "must be uint8 or floats .*got bool"),
  "normalised": ({"images": (IMAGES / 255 - 0.5) / 0.2}, r"must be in \[0, 1\], got -2.* to 2.*; pass uint8 images"),
  "floats to 255": ({"images": IMAGES.astype(np.float32)}, r"must be in \[0, 1\], got .* to 2\d\d; pass uint8 images"),
  "not a number": ({"images": NAN}, r"must be in \[0, 1\], got nan to nan; pass uint8"),
  "between levels": ({"images": IMAGES / 255 * 0.999}, "whole multiples of 1/255, .*pass uint8 images instead"),
  "half precision": ({"images": (IMAGES / 255).astype(np.float16)}, "whole multiples of 1/255"),
  "too few names": ({"class_names": ["a", "b"]}, r"class names of 'arrays' must be 3 strings, got \['a', 'b'\]"),
  "numbers as names": ({"class_names": [1, 2, 3]}, "must be 3 strings"),
}


@pytest.mark.parametrize("name", WRONG_ARRAYS)
def test_wrong_arrays_are_refused(name):
  changes, word = WRONG_ARRAYS[name]
  with pytest.raises(Refusal, match=word) as caught:
    datasets.InMemory(**{"spec": SPEC, "images": IMAGES, "labels": LABELS, **changes})
  assert "\n" not in str(caught.value)


# Files.


def test_tensorflow_is_not_needed(digits_dir):
  code = f"""
import sys
from cpsc_jax import datasets
digits = datasets.find("digits", {digits_dir!r})
digits.require()
print(len(digits.load_evaluation("test")), digits.class_names()[3], "tensorflow" in sys.modules)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
  assert done.stdout.strip() == "454 3 False", done.stderr


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn_cropped", "tiny_imagenet"])
def test_missing_data_is_refused_at_once(name, tmp_path):
  start = time.monotonic()
  with pytest.raises(Refusal, match=f"run: cpsc-jax prepare {name} --data_dir {tmp_path} --from ARCHIVE"):
    datasets.find(name, str(tmp_path)).require()
  assert time.monotonic() - start < 20


def test_an_unknown_name_is_refused(tmp_path):
  with pytest.raises(
    Refusal, match=f"no data set 'mnist'; choose one of digits, .*: cpsc-jax prepare mnist --data_dir {tmp_path}"
  ):
    datasets.find("mnist", str(tmp_path))


def test_long_reading_is_reported(digits_dir, monkeypatch, capsys):
  monkeypatch.setattr(datasets, "SECONDS_BETWEEN_LINES", 0)
  datasets.find("digits", digits_dir).load_train("test")
  assert "reading digits: 500 of 1,343 images\n" in capsys.readouterr().out


def test_data_dir_defaults(monkeypatch):
  monkeypatch.setenv("TFDS_DATA_DIR", "/somewhere")
  assert datasets.resolve_data_dir("") == "/somewhere" and datasets.resolve_data_dir("/other") == "/other"
  monkeypatch.delenv("TFDS_DATA_DIR")
  assert datasets.resolve_data_dir("") == os.path.expanduser("~/tensorflow_datasets")


class Reader:
  """A net whose class is the level of an image's first pixel, to see which images were classified."""

  def apply(self, variables, x, train):
    level = jnp.round((x[:, 0, 0, 0] * 0.5 + 0.5) * 255).astype(jnp.int32)
    return Output(jax.nn.one_hot(level, 256), x.reshape(x.shape[0], -1), ())


@pytest.mark.parametrize("batch_size", [1, 3, 7, 10, 64])
def test_every_image_is_evaluated_exactly_once(batch_size):
  images = jnp.arange(10, dtype=jnp.uint8).reshape(10, 1, 1, 1) * 20
  classify = evaluate.compile_classifier(Reader(), (0.5,), (0.5,), batch_size, make_mesh())
  assert classify({}, images).labels.tolist() == [20 * i for i in range(10)]


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
