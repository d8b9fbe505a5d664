"""The configs: complete, explained, locked, and cifar100 as published."""

import pathlib
import re

import jax.numpy as jnp
import pytest
from cpsc_jax.configs import cifar10, cifar100, default, digits, tiny_imagenet

from cpsc_jax import optim, settings
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import make_mesh

MODULES = {"cifar10": cifar10, "cifar100": cifar100, "digits": digits, "tiny_imagenet": tiny_imagenet}


@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("name", MODULES)
def test_config_is_complete_and_resolves(name, variant):
  config = MODULES[name].get_config(variant)
  assert dict(settings._flatten(config)).keys() == dict(settings._flatten(default.get_config())).keys()
  assert config.is_locked and config.student.is_locked
  assert config.name == name + ("_smoke" if variant else "")
  settings.resolve(config, make_mesh())


def test_every_key_is_explained():
  source = pathlib.Path(default.__file__).read_text().split("def apply_variant")[0].splitlines()
  for number, line in enumerate(source):
    if re.match(r"  \w(\.\w+)+ = ", line) and "ConfigDict" not in line:
      assert "#" in line or source[number - 1].strip().startswith("#"), f"no word on {line.strip()}"


def test_cifar100_is_the_published_schedule():
  c = cifar100.get_config()
  assert (c.teacher.net, c.student.net) == ("resnet34", "resnet18")
  assert (c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size) == (600, 50, 512)
  assert (c.generator.steps, c.student.steps) == (6, 5)
  assert (c.generator.latent_dim, c.generator.lr, c.generator.b1, c.generator.b2) == (256, 1e-3, 0.5, 0.999)
  assert (c.student.lr, c.student.momentum, c.student.weight_decay, c.student.warmup_epochs) == (0.1, 0.9, 5e-4, 10)
  assert (c.teacher.epochs, c.teacher.batch_size, c.teacher.lr, c.teacher.crop_pad, c.teacher.flip) == (
    100,
    32,
    0.1,
    4,
    True,
  )
  g, s = c.loss.generator, c.loss.student
  assert (g.adversarial, g.ikd, g.bn, g.scl, g.ce) == (1.0, 5.0, 1.0, 0.7, 0.7)
  assert (s.kd, s.l2, s.ce) == (1.0, 5.0, 0.7)


def test_reference_turns_everything_on():
  config = digits.get_config()
  config.reference = True
  resolved = settings.resolve(config, make_mesh())
  assert all(resolved.quirks.values()) and resolved.precision == "float16"
  weights = {name: weight for name, weight in resolved.loss.generator.items() if weight}
  assert weights == {"adversarial": 1.0, "ikd": 5.0, "bn": 1.0, "scl": 0.7, "ce": 0.7}
  assert resolved.generator.lr == 1e-3
  assert not config.quirks.fresh_adam, "resolving must not touch the config it was given"
  config.dataset.name = "cifar10"
  assert not any(default.get_config().quirks.values())
  assert settings.resolve(config, make_mesh()).loss.ikd_form == "log"


@pytest.mark.parametrize(
  ("key", "value", "word"),
  [
    ("arm", "kd", "untrained_generator"),
    ("method", "dafl2", "cpsc"),
    ("precision", "float8", "bfloat16"),
    ("dataset.name", "mnist", "cifar100"),
    ("teacher.net", "resnet9", "resnet18"),
    ("student.net", "wrn_16", "wrn_D_K"),
    ("generator.net", "biggan", "dcgan"),
    ("generator.net", "dcgan", "divisible by 16"),
    ("schedule.epochs", 0, "greater than 0"),
    ("schedule.horizon", 20, "shorter than the run"),
    ("teacher.batch_size", 5000, "1343"),
    ("teacher.flip", True, "flip"),
    ("loss.ikd_form", "l1", "mse"),
  ],
)
def test_bad_values_are_refused(key, value, word):
  config = digits.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(Refusal, match=word):
    settings.resolve(config, make_mesh())


def test_differences_name_the_keys():
  import json

  config = settings.resolve(digits.get_config(), make_mesh())
  saved = json.loads(settings.dump(config))
  assert settings.differences(config, saved) == []
  saved["student"]["lr"], saved["seed"], saved["dataset"]["data_dir"] = 0.3, 5, "/elsewhere"
  assert settings.differences(config, saved) == ["seed", "student.lr"]


@pytest.mark.parametrize("optimiser", [optim.student_optimiser, optim.generator_optimiser])
def test_a_run_with_a_horizon_is_the_start_of_a_longer_one(optimiser):
  config = digits.get_config()
  config.generator.schedule = "cosine"
  weights, sizes = jnp.ones(2), {}
  for epochs, horizon in ((4, 0), (4, 8), (8, 0)):
    config.schedule.epochs, config.schedule.horizon = epochs, horizon
    tx = optimiser(config, 3)
    state, sizes[epochs, horizon] = tx.init(weights), []
    for _ in range(12):
      step, state = tx.update(weights, state, weights)
      sizes[epochs, horizon].append(float(step[0]))
  assert sizes[4, 8] == sizes[8, 0] and abs(sizes[4, 8][-1]) > 2 * abs(sizes[4, 0][-1])
