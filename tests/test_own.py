"""What users bring: the example, their own Flax modules and their own images, through whole runs."""

import importlib.util
import json
import re
import textwrap
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from conftest import REPOSITORY
from test_prepare import flowers
from test_run import command, first_epoch, refused, results_of

from cpsc_jax import checkpoint, nets
from cpsc_jax.datasets.prepare import prepare
from cpsc_jax.errors import Refusal
from cpsc_jax.main import main

EXAMPLE = REPOSITORY / "examples" / "own_teacher.py"


def python_blocks(path):
  return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def test_the_example(tmp_path, monkeypatch, capsys):
  """A teacher that returns plain logits and has no batch norm; nothing is written."""
  monkeypatch.chdir(tmp_path)
  spec = importlib.util.spec_from_file_location("own_teacher", EXAMPLE)
  example = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(example)
  run = example.main("digits:smoke")
  shown = capsys.readouterr().out
  assert (
    "the teacher has no batch norm, so the term config.loss.generator.bn has nothing to compare and is off" in shown
  )
  teacher = run.results["teacher"]
  assert f"teacher {teacher['accuracy']:.4f}, student {run.accuracy:.4f}" in shown
  assert teacher["net"] == "Teacher" and teacher["parameters"] == 19466 and teacher["accuracy"] > 0.9
  assert run.results["evaluation"] == {"split": "test", "images": 454} and run.results["name"] == "digits_smoke"
  assert run.accuracy == run.results["student"]["last"]["accuracy"]
  terms = [entry["terms"].keys() for entry in run.history["student"]]
  assert len(terms) == 2 and terms[0] == terms[1] and "generator/bn" not in terms[0]
  assert {"generator/adversarial", "generator/ikd", "generator/scl", "generator/ce"} <= terms[0]
  samples = run.samples(per_class=3)
  assert samples.shape == (10, 3, 8, 8, 1) and 0 <= samples.min() < samples.max() <= 1
  assert not list(tmp_path.iterdir())


def test_docs_show_the_example_as_it_is():
  example = EXAMPLE.read_text()
  (block,) = [block for block in python_blocks(REPOSITORY / "docs" / "python.md") if "class Teacher" in block]
  module, call = block.split("\n\n\nmodule = ")
  assert module in example
  assert textwrap.indent(call[call.index("run = cpsc_jax.distill(") :].rstrip(), "  ") in example


class Small(nn.Module):
  """One convolution, with Flax's own batch norm or none."""

  num_classes: int
  dtype: Any = None
  width: int = 8
  batch_norm: bool = True

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Conv(self.width, (3, 3), dtype=self.dtype, name="conv")(x)
    if self.batch_norm:
      x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    x = nn.relu(x)
    return nets.outputs(x, (x,), self.num_classes, "linear")


def small_without_batch_norm(num_classes, dtype=None):
  return Small(num_classes, dtype, 16, batch_norm=False)


@pytest.fixture(scope="module", autouse=True)
def own_nets():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(nets.NETS, "small_bn", Small)
    patch.setitem(nets.NETS, "small", small_without_batch_norm)
    yield


@pytest.mark.slow
def test_a_teacher_with_flax_batch_norm_is_observed(tmp_path, digits_dir, capsys):
  """Its student has no batch norm and, for the widths differ, a head."""
  flags = ("--config.teacher.net=small_bn", "--config.student.net=small")
  assert main(command(tmp_path / "w", digits_dir, *flags)) == 0
  assert "no batch norm" not in capsys.readouterr().out
  history = json.loads((tmp_path / "w" / "history.json").read_text())["student"]
  assert all(entry["terms"]["generator/bn"] > 0 and "student/head" in entry["terms"] for entry in history)
  before = results_of(tmp_path / "w")
  flags = (*flags, f"--config.teacher.checkpoint={tmp_path / 'w' / 'teacher'}")
  assert main(command(tmp_path / "again", digits_dir, *flags)) == 0
  assert results_of(tmp_path / "again")["teacher"]["accuracy"] == before["teacher"]["accuracy"]
  assert results_of(tmp_path / "again")["student"] == before["student"]


@pytest.mark.slow
def test_a_saved_teacher_without_batch_norm(tmp_path, digits_dir, capsys):
  """Saved by a script and named in config.teacher.checkpoint."""
  import jax
  import jax.numpy as jnp

  net = small_without_batch_norm(10)
  params = nets.init(net, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))["params"]
  card = {"net": "small", "num_classes": 10, "image_size": 8, "channels": 1, "mean": [0.3], "std": [0.4]}
  digest = checkpoint.save_net(tmp_path / "t", {"params": params}, card)["digest"]
  assert main(command(tmp_path / "w", digits_dir, f"--config.teacher.checkpoint={tmp_path / 't'}")) == 0
  assert "the teacher has no batch norm" in capsys.readouterr().out
  results = results_of(tmp_path / "w")
  assert results["teacher"]["net"] == "small" and results["teacher"]["digest"] == digest
  entry = first_epoch(tmp_path / "w")
  assert {"generator/adversarial", "generator/ikd", "generator/scl", "generator/ce"} <= entry["terms"].keys()
  assert "generator/bn" not in entry["terms"]


def test_moments_of_flax_batch_norm():
  import jax
  import jax.numpy as jnp

  net, x = Small(3), jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  variables = nets.init(net, jax.random.key(0), x)
  variables["batch_stats"]["norm"]["mean"] += 2.0
  statistics = nets.forward_observed(net, variables, x).statistics
  kernel = variables["params"]["conv"]
  seen = nn.Conv(8, (3, 3)).apply({"params": kernel}, x)
  np.testing.assert_allclose(statistics.seen["norm",]["mean"], jnp.mean(seen, (0, 1, 2)), rtol=1e-5, atol=1e-6)
  # The running mean, around which squares are summed, lies some four standard deviations away here.
  np.testing.assert_allclose(statistics.seen["norm",]["var"], jnp.var(seen, (0, 1, 2)), rtol=1e-4)
  np.testing.assert_allclose(statistics.stored["norm",]["mean"], 2.0)
  bare = Small(3, batch_norm=False)
  output = nets.forward_observed(bare, {"params": nets.init(bare, jax.random.key(0), x)["params"]}, x)
  assert output.logits.shape == (4, 3) and output.statistics is None


def test_has_statistics():
  names = ("resnet18", "vgg11", "wrn_10_1")
  assert all(nets.has_statistics(nets.classifier(name, 10), (32, 32, 3)) for name in names)
  assert nets.has_statistics(Small(3), (8, 8, 1)) and not nets.has_statistics(Small(3, batch_norm=False), (8, 8, 1))


def test_teachers_that_are_not_known_are_refused(tmp_path, digits_dir, capsys, monkeypatch):
  card = {"net": "small", "num_classes": 10, "image_size": 8, "channels": 1, "mean": [0.3]}
  with pytest.raises(Refusal, match="lacks std"):
    checkpoint.save_net(tmp_path / "t", {"params": {}}, card)
  checkpoint.save_net(tmp_path / "t", {"params": {}}, {**card, "std": [0.4]})
  argv = command(tmp_path / "w", digits_dir, f"--config.teacher.checkpoint={tmp_path / 't'}")[1:]
  refused(capsys, argv, "cannot be read")
  monkeypatch.delitem(nets.NETS, "small")
  refused(capsys, argv, "no net 'small'")


# Images of one's own.


FLOWERS = ("--config.dataset.name=flowers", "--config.teacher.net=small_bn", "--config.student.net=small_bn")


@pytest.fixture(scope="module")
def flower_run(tmp_path_factory, own_nets):
  """(data directory, workdir) of a run on a folder of images with a training split."""
  tmp = tmp_path_factory.mktemp("flowers")
  source = flowers(tmp / "f", [("train", 50), ("test", 20)])
  prepare("flowers", str(tmp / "d"), str(source))
  assert main(command(tmp / "w", tmp / "d", *FLOWERS)) == 0
  return tmp / "d", tmp / "w"


def test_a_run_on_own_images(flower_run):
  results = results_of(flower_run[1])
  assert results["evaluation"] == {"split": "test", "images": 60}
  assert len(results["generator"]["label_fidelity_per_class"]) == 3
  card = checkpoint.read_card(flower_run[1] / "teacher")
  assert (card["num_classes"], card["image_size"], card["channels"], card["dataset"]) == (3, 8, 3, "flowers")
  assert checkpoint.read_card(flower_run[1] / "student")["class_names"] == ["aster", "rose", "tulip"]


def test_a_run_with_test_images_only(flower_run, tmp_path, capsys):
  source = flowers(tmp_path / "f", [("test", 20)])
  prepare("flowers", str(tmp_path / "d"), str(source), photographs=False)
  argv = command(tmp_path / "w", tmp_path / "d", *FLOWERS)[1:]
  refused(capsys, argv, "no training split", "config.teacher.checkpoint", "cpsc-jax convert")
  argv.append(f"--config.teacher.checkpoint={flower_run[1] / 'teacher'}")
  refused(capsys, [*argv, "--config.arm=real_kd"], "arm 'real_kd'", "no training split")
  refused(capsys, [*argv, "--config.evaluate.split=validation"], "config.evaluate.split", "no training split")
  refused(capsys, [*argv, "--config.student.flip=True"], "config.student.flip must be False for 'flowers'", "a flip")
  assert not (tmp_path / "w").exists()
  assert main(["main", *argv]) == 0
  results = results_of(tmp_path / "w")
  assert results["evaluation"] == {"split": "test", "images": 60}
  assert results["teacher"]["digest"] == results_of(flower_run[1])["teacher"]["digest"]


def test_own_images_elsewhere_are_refused(flower_run, tmp_path, capsys):
  refused(
    capsys,
    command(tmp_path / "w", tmp_path, "--config.dataset.name=flowers")[1:],
    "no data set 'flowers'",
    f"cpsc-jax prepare flowers --data_dir {tmp_path} --from FOLDER",
  )
