"""Every METHOD_cifar10 config is what its authors, or the benchmark that it names, ran."""

import ml_collections
import pytest

from cpsc_jax import main
from cpsc_jax.schema import flatten

# What the published commands and the defaults of the code behind them say. Sources: the repositories of CMI (with the
# benchmark of DAFL and DeepInversion), ZSKT, DFAD, RGAL and Fast-Datafree.
BENCHMARK_STUDENT = {
  "student.optimiser": "sgd",
  "student.lr": 0.1,
  "student.momentum": 0.9,
  "student.weight_decay": 1e-4,
  "student.schedule": "steps",
  "student.milestones": (121, 151, 181),  # the published ones, 120, 150 and 180, count epochs that are over
  "student.decay": 0.1,
  "student.warmup_epochs": 0,
  "teacher.net": "wrn_40_2",
  "student.net": "wrn_16_1",
  "schedule.epochs": 200,
}
CMI_GENERATOR = {
  "generator.net": "cifar",
  "generator.width": 64,
  "generator.conditional": False,
  "generator.output": "sigmoid",
  "generator.epsilon": 1e-5,
  "generator.optimiser": "adam",
  "generator.b1": 0.5,
  "generator.b2": 0.999,
  "generator.milestones": (),
}
FAST_STUDENT = {  # of FastDFKD, whose code NAYER builds on
  "student.lr": 0.2,
  "student.lr_end": 2e-4,
  "student.weight_decay": 1e-4,
  "student.schedule": "cosine",
  "student.warmup_epochs": 0,
  "student.crop_pad": 4,
  "student.flip": True,
  "loss.kd_temperature": 20.0,
}
PUBLISHED = {
  "dafl": BENCHMARK_STUDENT
  | CMI_GENERATOR
  | {
    "schedule.iterations": 80,
    "schedule.batch_size": 256,
    "generator.latent_dim": 512,
    "generator.lr": 1e-3,
    "generator.steps": 1,
    "student.steps": 5,
    "loss.kd_temperature": 1.0,
    "loss.generator": {"one_hot": 1.0, "activation": 0.001, "balance": 20.0},
    "loss.student": {"kd": 1.0},
  },
  "deepinversion": BENCHMARK_STUDENT
  | {
    "schedule.iterations": 1,
    "schedule.batch_size": 256,
    "pool.batch_size": 256,
    "pool.dtype": "uint8",
    "generator.net": "pixels",
    "generator.steps": 1000,
    "generator.lr": 0.1,
    "generator.b1": 0.5,
    "generator.b2": 0.99,
    "generator.jitter": "rolls",
    "generator.crop_pad": 4,
    "generator.flip": True,
    "generator.clip_pixels": True,
    "student.steps": 400,
    "student.crop_pad": 4,
    "student.flip": True,
    "loss.kd_temperature": 20.0,
    "loss.js_form": "clamped",
    "loss.generator": {"ce": 1.0, "bn": 10.0, "variation": 0.001, "adversarial": 1.0},
    "loss.student": {"kd": 1.0},
  },
  "cmi": BENCHMARK_STUDENT
  | CMI_GENERATOR
  | {
    "schedule.iterations": 1,
    "schedule.batch_size": 128,
    "pool.batch_size": 256,
    "pool.bank": 40960,
    "pool.dtype": "uint8",
    "generator.init": "normal",
    "generator.latent_dim": 256,
    "generator.lr": 1e-3,
    "generator.steps": 200,
    "generator.crop_pad": 4,
    "generator.flip": True,
    "student.steps": 400,
    "student.crop_pad": 4,
    "student.flip": True,
    "loss.kd_temperature": 20.0,
    "loss.views.temperature": 0.1,
    "loss.views.negatives": 4096,
    "loss.views.width": 256,
    "loss.views.lr": 1e-3,
    "loss.views.flip": True,
    "loss.views.features": "batch_norm",
    "loss.generator": {"bn": 1.0, "ce": 1.0, "adversarial": 0.5, "views": 0.8},
    "loss.student": {"kd": 1.0},
  },
  "rgal": CMI_GENERATOR
  | {
    "teacher.net": "wrn_40_2",
    "student.net": "wrn_16_1",
    "schedule.epochs": 200,
    "schedule.iterations": 1,
    "schedule.batch_size": 2 * 128,
    "pool.views": 2,
    "pool.batch_size": 256,
    "generator.init": "normal",
    "generator.labels": "balanced",
    "generator.lr": 1e-3,
    "generator.steps": 400,
    "generator.crop_pad": 4,
    "generator.flip": True,
    "student.steps": 400,
    "student.optimiser": "sgd",
    "student.lr": 0.1,
    "student.weight_decay": 1e-4,
    "student.schedule": "cosine",
    "student.warmup_epochs": 0,
    "loss.kd_temperature": 20.0,
    "loss.triplet.margin": 0.2,
    "loss.triplet.focal": True,
    "loss.triplet.swapped": False,
    "loss.triplet.synthesis_of": "student",
    "loss.triplet.synthesis_from": 2,
    "loss.triplet.student_features": "pooled",
    "loss.generator": {
      "bn": 1.0,
      "ce": 1.0,
      "adversarial": 1.0,
      "triplet": 0.1,
      "activation": 0.001,
      "balance": 0.1,
    },
    "loss.student": {"kd": 1.0, "channel": 0.1, "triplet": 0.1},
  },
  "zskt": {
    "teacher.net": "wrn_40_2",
    "student.net": "wrn_16_1",
    "schedule.epochs": 200,
    "schedule.iterations": 400,  # 80,000 pseudo-batches
    "schedule.batch_size": 128,
    "generator.latent_dim": 100,
    "generator.conditional": False,
    "generator.epsilon": 1e-5,
    "generator.lr": 1e-3,
    "generator.b1": 0.9,
    "generator.schedule": "cosine",
    "generator.clip": 5.0,
    "generator.steps": 1,
    "generator.student_mode": "train",
    "student.steps": 10,
    "student.optimiser": "adam",
    "student.lr": 2e-3,
    "student.momentum": 0.9,
    "student.weight_decay": 0.0,
    "student.schedule": "cosine",
    "student.warmup_epochs": 0,
    "student.clip": 5.0,
    "loss.kd_temperature": 1.0,
    "loss.kl_classes": "mean",
    "loss.generator": {"adversarial": 1.0},
    "loss.student": {"kd": 1.0, "attention": 250.0},
  },
  "dfad": {
    "teacher.net": "resnet34",
    "student.net": "resnet18",
    "schedule.epochs": 500,
    "schedule.iterations": 50,
    "schedule.batch_size": 256,
    "generator.latent_dim": 256,
    "generator.conditional": False,
    "generator.epsilon": 1e-5,
    "generator.lr": 1e-3,
    "generator.b1": 0.9,
    "generator.milestones": (100, 200),
    "generator.student_mode": "train",
    "generator.steps": 1,
    "student.steps": 5,
    "student.init": "torch",
    "student.lr": 0.1,
    "student.momentum": 0.9,
    "student.weight_decay": 5e-4,
    "student.schedule": "steps",
    "student.milestones": (100, 200),
    "student.decay": 0.1,
    "student.warmup_epochs": 0,
    "loss.generator": {"adversarial": 1.0},
    "loss.student": {"l1": 1.0},
  },
  "fast": CMI_GENERATOR
  | FAST_STUDENT
  | {
    "teacher.net": "wrn_40_2",
    "student.net": "wrn_16_1",
    "schedule.epochs": 220,
    "schedule.iterations": 1,
    "schedule.batch_size": 256,
    "pool.size": 220 * 256,
    "pool.batch_size": 256,
    "pool.dtype": "uint8",
    "generator.latent_dim": 256,
    "generator.lr": 2e-3,
    "generator.steps": 10,
    "generator.crop_pad": 4,
    "generator.flip": True,
    "student.steps": 400,
    "episodes.form": "maml",
    "episodes.latent_lr": 0.01,
    "episodes.bn_momentum": 0.9,
    "episodes.warmup": 20,
    "episodes.redraw_at": 140,
    "loss.generator": {"bn": 10.0, "ce": 0.4, "adversarial": 1.1},
    "loss.student": {"kd": 1.0},
  },
  "nayer": CMI_GENERATOR
  | FAST_STUDENT
  | {
    "teacher.net": "wrn_40_2",
    "student.net": "wrn_16_1",
    "schedule.epochs": 20 * 10 // 2 + 100,
    "schedule.iterations": 2,
    "schedule.batch_size": 512,
    "pool.size": (20 * 10 + 100 * 2) * 400,
    "pool.batch_size": 400,
    "pool.dtype": "uint8",
    "generator.latent_dim": 1000,
    "generator.lr": 4e-3,
    "generator.steps": 30,
    "generator.crop_pad": 4,
    "generator.flip": True,
    "student.steps": 400 // 2,
    "episodes.bn_momentum": 0.9,
    "episodes.warmup": 20 * 10,
    "episodes.life": 10 * 2,
    "episodes.warmup_life": 10 * 10,
    "loss.generator": {"bn": 10.0, "ce": 0.5, "adversarial": 1.33},
    "loss.student": {"kd": 1.0},
  },
}


def config_of(method: str, variant: str = "") -> ml_collections.ConfigDict:
  return main.parse(["cpsc-jax", f"--config={method}_cifar10{variant}"])[0]


@pytest.mark.parametrize("method", PUBLISHED)
def test_config_is_as_published(method):
  config = config_of(method)
  flat = dict(flatten(config))
  for key, value in PUBLISHED[method].items():
    if isinstance(value, dict):  # all weights; the terms that are not named have none
      section = config.loss[key.removeprefix("loss.")].to_dict()
      assert {name: weight for name, weight in section.items() if weight} == value, key
    else:
      assert flat[key] == value, key


@pytest.mark.parametrize(("variant", "steps", "lr", "latent_lr"), [(":two", 2, 5e-3, 0.015), (":five", 5, 3e-3, 0.01)])
def test_fast_in_fewer_steps(variant, steps, lr, latent_lr):
  config = config_of("fast", variant)
  assert (config.generator.steps, config.generator.lr, config.episodes.latent_lr) == (steps, lr, latent_lr)


def test_rgal_of_the_paper():
  triplet = config_of("rgal", ":paper").loss.triplet
  assert (triplet.synthesis_of, triplet.synthesis_from, triplet.swapped) == ("teacher", 0, True)
  assert triplet.student_features == "stages"
