"""cpsc_jax.distill: arrays and modules in, a run out, the same as on the command line, and every refusal."""

import inspect
import json
import math

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from test_own import python_blocks
from test_run import results_of

import cpsc_jax
from cpsc_jax import api, checkpoint, datasets, nets
from cpsc_jax.errors import Refusal

DIGITS = {"image_shape": (8, 8, 1), "num_classes": 10, "mean": (0.3057,), "std": (0.3762,), "photographs": False}


class Plain(nn.Module):
  """Plain logits, with Flax's batch norm and dropout."""

  num_classes: int = 10
  width: int = 16

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    x = nn.Dropout(0.1, deterministic=not train)(x.mean(axis=(1, 2)))
    return nn.Dense(self.num_classes)(x)


class OwnStudent(Plain):
  """A student is known by the name of its type."""


def variables_of(module, seed=0):
  return module.init(jax.random.key(seed), jnp.zeros((2, 8, 8, 1)), train=False)


@pytest.fixture(scope="module")
def test_images(digits_dir):
  split = datasets.find("digits", digits_dir).load_evaluation("test")
  return np.asarray(split.images), np.asarray(split.labels)


def distill(test, teacher=None, student="wrn_10_1", **changes):
  teacher = (Plain(), variables_of(Plain())) if teacher is None else teacher
  return cpsc_jax.distill(teacher, student, **{**DIGITS, "test": test, "config": "digits:smoke", **changes})


@pytest.fixture(scope="module")
def saved_run(finished, test_images):
  """From the saved teacher of a run of the command line, with nothing written."""
  return distill(test_images, teacher=finished / "teacher")


def test_the_command_line_computes_the_same(saved_run, finished):
  results = results_of(finished)
  for key in ("student", "generator", "agreement", "samples", "headline", "evaluation", "seed", "method"):
    assert saved_run.results[key] == results[key], key
  for key in ("net", "parameters", "accuracy", "digest"):
    assert saved_run.results["teacher"][key] == results["teacher"][key], key
  assert saved_run.history["student"] == json.loads((finished / "history.json").read_text())["student"]
  assert checkpoint.digest(saved_run.student[1]) == checkpoint.read_card(finished / "student")["digest"]
  assert checkpoint.digest(saved_run.generator[1]) == checkpoint.read_card(finished / "generator")["digest"]
  ours, theirs = (dict(run["config"]) for run in (saved_run.results, results))
  assert ours.pop("teacher") == {**theirs.pop("teacher"), "checkpoint": str(finished / "teacher")}
  assert ours.pop("dataset")["name"] == "arrays" and theirs.pop("dataset")["name"] == "digits"
  assert ours == theirs


def test_the_student_is_what_was_measured(saved_run, test_images):
  module, variables = saved_run.student
  x = datasets.normalise(jnp.asarray(test_images[0]), *saved_run.card["mean"], *saved_run.card["std"])
  predicted = module.apply(variables, x, train=False).logits.argmax(axis=1)
  assert saved_run.accuracy == pytest.approx(float(np.mean(np.asarray(predicted) == test_images[1])))
  assert saved_run.card["net"] == "wrn_10_1" and saved_run.card["class_names"] == [str(label) for label in range(10)]


def test_samples(saved_run):
  samples = saved_run.samples()
  assert samples.shape == (10, 16, 8, 8, 1) and 0 <= samples.min() < samples.max() <= 1
  np.testing.assert_array_equal(saved_run.samples(seed=0), samples)
  other = saved_run.samples(per_class=2, seed=1)
  assert other.shape == (10, 2, 8, 8, 1) and np.abs(other - samples[:, :2]).max() > 0.01


def test_export(saved_run, tmp_path):
  pytest.importorskip("onnxruntime")
  from safetensors.numpy import safe_open

  assert 0 <= saved_run.export(tmp_path / "student.onnx") < 1e-4
  assert saved_run.export(str(tmp_path / "student.safetensors")) == 0
  with safe_open(tmp_path / "student.safetensors", "numpy") as file:
    assert file.metadata()["digest"] == checkpoint.digest(saved_run.student[1])
    assert json.loads(file.metadata()["class_names"]) == saved_run.card["class_names"]
  for name, word in (("student.tflite", "student.tflite"), ("student", ".onnx"), ("student.onnx", "already exists")):
    with pytest.raises(Refusal, match=word):
      saved_run.export(tmp_path / name)
  with pytest.raises(Refusal, match="cannot write"):
    saved_run.export(tmp_path / "nowhere" / "student.onnx")
  assert {path.name for path in tmp_path.iterdir()} == {"student.onnx", "student.safetensors"}


OVERRIDES = {
  "schedule.epochs": 3,
  "student.lr": 0.03,
  "precision": "bfloat16",
  "evaluate.headline": "best",
  "generator.milestones": (1, 2),
}


@pytest.fixture(scope="module")
def own_run(tmp_path_factory, test_images):
  """(run, workdir, what on_epoch was given) of a student module of the user's own.

  Its arguments come as other libraries give them: frozen variables, arrays for numbers, images as floats.
  """
  workdir, entries = tmp_path_factory.mktemp("own") / "w", []
  names = [f"digit {label}" for label in range(10)]
  run = distill(
    (test_images[0].astype(np.float32) / 255, jnp.asarray(test_images[1])),
    teacher=(Plain(), flax.core.freeze(variables_of(Plain()))),
    student=OwnStudent(width=8),
    mean=np.array([[0.3057]]),
    std=np.float64(0.3762),
    num_classes=np.int64(10),
    image_shape=np.array([8, 8, 1]),
    overrides=OVERRIDES,
    workdir=workdir,
    class_names=names,
    on_epoch=entries.append,
  )
  return run, workdir, entries


def test_an_own_student(own_run, test_images):
  run, workdir, entries = own_run
  assert entries == run.history["student"] and [entry["epoch"] for entry in entries] == [1, 2, 3]
  config = run.results["config"]
  assert (config["student"]["lr"], config["precision"], config["student"]["net"]) == (0.03, "bfloat16", "OwnStudent")
  assert config["generator"]["milestones"] == [1, 2]
  assert all({"generator/bn", "student/head"} <= entry["terms"].keys() for entry in entries), "8 features, and 16"
  assert run.results["student"]["parameters"] == 9 * 8 + 2 * 8 + 8 * 10 + 10, "what is deployed has no head"
  assert run.accuracy == run.results["student"]["best"]["accuracy"] == max(entry["accuracy"] for entry in entries)
  module, variables = run.student
  x = datasets.normalise(jnp.asarray(test_images[0]), *run.card["mean"], *run.card["std"])
  predicted = module.apply(variables, x, train=False).logits.argmax(axis=1)
  assert run.accuracy == pytest.approx(float(np.mean(np.asarray(predicted) == test_images[1])))
  OwnStudent(width=8).apply(variables, x, train=False)  # the variables are those of the module itself
  assert run.card["class_names"][3] == "digit 3"
  assert {"results.json", "history.json", "student", "generator", "curves.png"} <= {p.name for p in workdir.iterdir()}
  assert run.results == results_of(workdir)


def test_exports_of_an_own_student(own_run, tmp_path):
  """Whole networks can be written; weights only in the naming of a PyTorch family."""
  pytest.importorskip("flatbuffers")
  run, _, _ = own_run
  assert run.export(tmp_path / "own.stablehlo") < 1e-4
  with pytest.raises(Refusal, match="no PyTorch family has a net 'OwnStudent'"):
    run.export(tmp_path / "own.safetensors")
  assert {path.name for path in tmp_path.iterdir()} == {"own.stablehlo"}


def test_a_finished_workdir_is_reopened(own_run, test_images, capsys):
  run, workdir, _ = own_run
  before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  again = distill(test_images, student=OwnStudent(width=8), overrides=OVERRIDES, workdir=str(workdir))
  assert "is finished already" in capsys.readouterr().out
  assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
  assert (again.results, again.history, again.accuracy) == (run.results, run.history, run.accuracy)
  assert again.card["class_names"] == run.card["class_names"] and again.latent_dim == run.latent_dim
  for ours, theirs in ((again.student, run.student), (again.generator, run.generator)):
    assert checkpoint.digest(ours[1]) == checkpoint.digest(theirs[1])
  np.testing.assert_array_equal(again.samples(2), run.samples(2))


def test_a_workdir_of_another_run_is_refused(own_run, test_images):
  _, workdir, _ = own_run
  student = OwnStudent(width=8)
  with pytest.raises(Refusal, match=r"belongs to another config \(it differs in seed, student.lr\)"):
    distill(test_images, student=student, overrides=OVERRIDES | {"seed": 1, "student.lr": 0.1}, workdir=workdir)
  with pytest.raises(Refusal, match="differs in teacher.checkpoint"):
    other = Plain(), variables_of(Plain(), seed=1)
    distill(test_images, teacher=other, student=student, overrides=OVERRIDES, workdir=workdir)


@pytest.mark.slow
def test_methods_without_a_generator_to_keep(test_images):
  """DeepInversion keeps a pool, and there is nothing to draw fresh samples from."""
  config = str(REPOSITORY / "configs" / "deepinversion_cifar10.py:digits_smoke")
  run = distill(test_images, config=config, overrides={"schedule.epochs": 1})
  assert run.generator is None and run.results["generator"]["pool"] == 64
  with pytest.raises(Refusal, match="no generator to sample from"):
    run.samples()


def test_the_block_of_the_readme(saved_run, tmp_path, monkeypatch, capsys):
  """Its arguments are right, and what it does with a run works; the run itself is one of seconds."""
  (block,) = python_blocks(REPOSITORY / "README.md")
  monkeypatch.chdir(tmp_path)
  signature = inspect.signature(cpsc_jax.distill)

  def checked(**arguments):
    signature.bind(**arguments)
    nets.classifier(arguments["student"], arguments["num_classes"])
    api._config("default", arguments["student"], arguments["overrides"])
    assert len(arguments["mean"]) == len(arguments["std"]) == arguments["image_shape"][2]
    assert (arguments["teacher"], arguments["test"]) == (("a module", "its variables"), ("the images", "the labels"))
    return saved_run

  monkeypatch.setattr(cpsc_jax, "distill", checked)
  names = {"module": "a module", "variables": "its variables", "images": "the images", "labels": "the labels"}
  exec(block, names)
  assert f"{saved_run.accuracy} (10, 16, 8, 8, 1)" in capsys.readouterr().out
  assert [path.name for path in tmp_path.iterdir()] == ["student.onnx"]


class NotFlax:
  pass


class TwoOutputs(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool):
    return nn.Dense(10)(x.mean(axis=(1, 2))), x


class Untold(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(10)(nn.BatchNorm(use_running_average=True)(x).mean(axis=(1, 2)))


class NeedsLargeImages(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool):
    return nn.Dense(10)(x[:, 10:].reshape(x.shape[0], 22 * 32))


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    (dict(overrides={"student.learning_rate": 0.1}), "the config has no key 'student.learning_rate'"),
    (dict(overrides={"student.momentun": 0.1}), r"no key 'student.momentun' \(did you mean 'student.momentum'\?\)"),
    (dict(overrides={"nothing": 1}), "the config has no key 'nothing'"),
    (dict(overrides={"student": 1}), "the config has no key 'student'"),
    (dict(overrides={"student.lr": "fast"}), "config.student.lr is 'fast'; it must be of type float, such as 0.1"),
    (dict(overrides={"student.steps": 1.5}), "config.student.steps is 1.5; it must be of type int, such as 1"),
    (dict(overrides={"student.lr": 0.1, "student.steps": 0}), "config.student.steps is 0"),
    (dict(overrides={"precision": "float8"}), "config.precision is 'float8'"),
    (dict(overrides={"arm": "real_kd"}), "config.arm is 'real_kd'"),
    (dict(overrides={"evaluate.split": "validation"}), "config.evaluate.split 'validation'"),
    (dict(overrides={"student.flip": True}), "config.student.flip must be False"),
    (dict(config="digit"), "no config 'digit'"),
    (dict(config="digits:quick"), "no variant 'quick'"),
    (dict(student="resnet19"), "no net 'resnet19'"),
    (dict(student=NotFlax()), "expected a flax.linen.Module, got NotFlax"),
    (dict(student=TwoOutputs()), "TwoOutputs returned tuple; expected logits"),
    (dict(student=NeedsLargeImages()), "NeedsLargeImages cannot be applied to images of shape"),
    (dict(student=Plain(5)), "the student gives 5 logits, and num_classes is 10"),
    (dict(teacher=Plain()), "teacher must be"),
    (dict(teacher=(Plain(),)), "teacher must be"),
    (dict(teacher=(NotFlax(), {})), "expected a flax.linen.Module, got NotFlax"),
    (dict(teacher=(NeedsLargeImages(), {})), "NeedsLargeImages cannot be applied to images of shape"),
    (dict(teacher=(Plain(), {"batch_stats": {}})), "variables have no 'params'; expected them as module.init returns"),
    (dict(teacher=(Plain(), None)), "variables have no 'params'"),
    (dict(teacher=(Plain(), variables_of(Plain(width=8)))), "the teacher cannot be applied to its variables"),
    (dict(teacher=(Plain(5), variables_of(Plain(5)))), "the teacher gives 5 logits, and num_classes is 10"),
    (dict(teacher="nowhere"), "no saved net in nowhere"),
    (dict(image_shape=(8, 8)), r"image_shape is \(8, 8\)"),
    (dict(image_shape=(8, 4, 1)), r"image_shape is \(8, 4, 1\); images must be square"),
    (dict(image_shape=(16, 16, 1)), r"must have shape \(N, 16, 16, 1\)"),
    (dict(mean=(0.3, 0.3, 0.3)), "mean is .*; it must be 1 finite number"),
    (dict(mean=(math.nan,)), "mean is .*; it must be 1 finite number"),
    (dict(std=(0.0,)), "std is .* above 0"),
    (dict(std="wide"), "std is 'wide'; it must be 1 finite number"),
    (dict(mean=(30.57,)), r"mean is \(30.57,\); it must be of pixels in \[0, 1\]: divide by 255"),
    (dict(num_classes=10.0), "num_classes is .*10.0.*; it must be of whole numbers above 0"),
    (dict(image_shape=None), "image_shape is None; it must be of whole numbers above 0"),
    (dict(test=None), "test must be"),
    (dict(test=(np.zeros((3, 8, 8, 1), np.uint8),)), "test must be"),
    (dict(test=(np.zeros((3, 8, 8), np.uint8), np.zeros(3, int))), r"must have shape \(N, 8, 8, 1\)"),
    (dict(test=(np.zeros((3, 8, 8, 1), np.uint8), np.zeros(2, int))), r"must have shape \(3,\)"),
    (dict(test=(np.zeros((3, 8, 8, 1), np.uint8), np.full(3, 10))), "between 0 and 9, got 10 to 10"),
    (dict(test=(np.full((3, 8, 8, 1), 0.123), np.zeros(3, int))), "pass uint8"),
    (dict(test=(np.zeros((3, 1, 8, 8), np.uint8), np.zeros(3, int))), r"pass images.transpose\(0, 2, 3, 1\)"),
    (dict(test=(np.zeros((3, 8, 8), np.uint8), np.zeros(3, int))), r"pass images\[..., None\]"),
    (dict(test=(np.zeros((3, 8, 8, 1), int), np.zeros(3, int))), r"pass images.astype\(np.uint8\)"),
    (dict(test=(np.zeros((3, 8, 8, 1), np.uint8), np.eye(10)[:3])), r"take labels.argmax\(axis=1\)"),
    (dict(class_names=["a", "b"]), "must be 10 strings"),
    (dict(class_names=[*"abcdefgh", "i j", "i  J"]), "differ in blanks or case alone"),
    (dict(class_names=[*"abcdefghi", "j\n"]), "characters that cannot be printed"),
    (dict(student=Untold()), "the student Untold takes no argument that says whether it is trained"),
    (dict(teacher=(Plain(), variables_of(Plain())["params"])), "variables have no 'params'.*{'params': ..., 'batch_st"),
  ],
)
def test_refusals(changes, word, test_images, tmp_path, monkeypatch):
  monkeypatch.setattr(nets, "NETS", dict(nets.NETS))
  arguments = {"test": test_images, "workdir": tmp_path / "w", **changes}
  with pytest.raises(Refusal, match=word) as refusal:
    distill(**arguments)
  assert str(refusal.value).count("\n") == (3 if "A subclass adapts it" in str(refusal.value) else 0)
  assert not (tmp_path / "w").exists(), "nothing is made before everything is right"


def test_a_saved_teacher_that_does_not_fit_is_refused(finished, test_images):
  teacher = finished / "teacher"
  with pytest.raises(Refusal, match=r"the teacher in .* has mean \[0.3057\], not \[0.5\]"):
    distill(test_images, teacher=teacher, mean=(0.5,))
  images = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, int)
  with pytest.raises(Refusal, match="has channels 1, data set 'arrays' has 3"):
    distill(images, teacher=str(teacher), image_shape=(8, 8, 3), mean=[0.3057] * 3, std=[0.3762] * 3)


@pytest.mark.slow
def test_a_config_of_ones_own(test_images):
  """It is copied; its own values stay where nothing overrides them."""
  from cpsc_jax.configs import digits

  config = digits.get_config("smoke")
  config.schedule.epochs, config.loss.generator.bn = 1, 0.0
  before = config.to_json()
  run = distill(test_images, config=config, overrides={"student.steps": 2})
  assert config.to_json() == before
  assert len(run.history["student"]) == 1 and "generator/bn" not in run.history["student"][0]["terms"]
  assert run.results["samples"]["student"] == 2 * 2 * 32
