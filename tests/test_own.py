"""What users bring: their own Flax modules and their own images, through whole runs."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from conftest import REPOSITORY
from test_prepare import flowers
from test_run import command, refused, results_of

from cpsc_jax import checkpoint, nets
from cpsc_jax.datasets.prepare import prepare
from cpsc_jax.main import main


def terms_of(workdir):
  return set(json.loads((workdir / "history.json").read_text())["student"][0]["terms"])


def test_the_teacher_of_the_readme(tmp_path, digits_dir):
  """Exactly the block that stands in README.md, in a folder and a process of its own."""
  (block,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.S)
  environment = {**os.environ, "TFDS_DATA_DIR": digits_dir}
  argv = [sys.executable, "-c", block]
  done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert "the teacher has no batch norm: config.loss.generator.bn has nothing to act on and is off" in done.stdout
  results = results_of(tmp_path / "runs" / "plain")
  assert results["teacher"]["net"] == "plain" and results["teacher"]["accuracy"] > 0.9
  terms = terms_of(tmp_path / "runs" / "plain")
  assert {"generator/adversarial", "generator/ikd", "generator/scl", "generator/ce"} <= terms
  assert "generator/bn" not in terms


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


@pytest.fixture(scope="module", autouse=True)
def own_nets():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(nets.NETS, "small_bn", Small)
    patch.setitem(nets.NETS, "small", lambda num_classes, dtype: Small(num_classes, dtype, 16, batch_norm=False))
    yield


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


def test_moments_of_flax_batch_norm():
  import jax
  import jax.numpy as jnp

  net, x = Small(3), jax.random.normal(jax.random.key(1), (4, 8, 8, 1))
  variables = nets.init(net, jax.random.key(0), x)
  variables["batch_stats"]["norm"]["mean"] += 2.0
  _, moments, running = nets.forward_observed(net, variables, x)
  kernel = variables["params"]["conv"]
  seen = nn.Conv(8, (3, 3)).apply({"params": kernel}, x)
  np.testing.assert_allclose(moments["norm",]["mean"], jnp.mean(seen, (0, 1, 2)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(moments["norm",]["var"], jnp.var(seen, (0, 1, 2)), rtol=1e-5)
  np.testing.assert_allclose(running["norm",]["mean"], 2.0)
  bare = Small(3, batch_norm=False)
  output, moments, running = nets.forward_observed(bare, {"params": nets.init(bare, jax.random.key(0), x)["params"]}, x)
  assert output.logits.shape == (4, 3) and moments == {} == running


def test_has_batch_norm():
  names = ("resnet18", "vgg11", "wrn_10_1")
  assert all(nets.has_batch_norm(nets.classifier(name, 10), (32, 32, 3)) for name in names)
  assert nets.has_batch_norm(Small(3), (8, 8, 1)) and not nets.has_batch_norm(Small(3, batch_norm=False), (8, 8, 1))


def test_teachers_that_are_not_known_are_refused(tmp_path, digits_dir, capsys, monkeypatch):
  card = {"net": "small", "num_classes": 10, "image_size": 8, "channels": 1, "mean": [0.3]}
  with pytest.raises(Exception, match="lacks std"):
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
  assert results["test_images"] == 60 and len(results["generator"]["label_fidelity_per_class"]) == 3
  card = checkpoint.read_card(flower_run[1] / "teacher")
  assert (card["num_classes"], card["image_size"], card["channels"], card["dataset"]) == (3, 8, 3, "flowers")


def test_a_run_with_test_images_alone(flower_run, tmp_path, capsys):
  source = flowers(tmp_path / "f", [("test", 20)])
  prepare("flowers", str(tmp_path / "d"), str(source), photographs=False)
  argv = command(tmp_path / "w", tmp_path / "d", *FLOWERS)[1:]
  refused(capsys, argv, "no training split", "config.teacher.checkpoint", "cpsc_jax.convert")
  argv.append(f"--config.teacher.checkpoint={flower_run[1] / 'teacher'}")
  refused(capsys, [*argv, "--config.arm=real_kd"], "config.arm 'real_kd'", "no training split")
  refused(capsys, [*argv, "--config.student.flip=True"], "do not survive a flip")
  assert not (tmp_path / "w").exists()
  assert main(["main", *argv]) == 0
  results = results_of(tmp_path / "w")
  assert results["test_images"] == 60
  assert results["teacher"]["digest"] == results_of(flower_run[1])["teacher"]["digest"]


def test_own_images_elsewhere_are_refused(flower_run, tmp_path, capsys):
  refused(
    capsys,
    command(tmp_path / "w", tmp_path, "--config.dataset.name=flowers")[1:],
    "no data set 'flowers'",
    f"python -m cpsc_jax.datasets.prepare flowers --data_dir {tmp_path} --from FOLDER",
  )
