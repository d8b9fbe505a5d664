"""cpsc-jax --config cmi_cifar10

CMI on CIFAR-10, WRN-40-2 -> WRN-16-1, with the settings of its published scripts. Published (best epoch, teacher of
94.87 %): 90.01 % with images inverted beforehand, 88.82 % without, as here; WRN-40-1 92.78 %, WRN-16-2 92.52 %,
ResNet-34 -> ResNet-18 94.84 %. Accuracy of this code: not measured. The critic compares the teacher's stages, as in the
published code for ResNets; for other nets that code takes the input of every batch norm.

`--config cmi_cifar10:digits` is CMI on the digits; docs/results.md has its accuracy.
"""

import ml_collections
from cpsc_jax.configs import default, family


def get_config(variant=""):
  c = family.build("cmi", variant, published, on_digits)
  if variant.endswith("smoke"):
    c.pool.bank, c.loss.views.negatives = 64, 32
  return c


def published(c):
  c.loss.views = views = ml_collections.ConfigDict()
  views.temperature = 0.2  # of the contrast of views
  views.negatives = 4096  # samples of the bank in it
  views.width = 256  # of the critic's output
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 1, 256
  c.pool.size, c.pool.batch_size = 51200, 256
  c.pool.bank = 40960  # samples whose features are remembered
  c.generator.update({"lr": 1e-3, "steps": 200, "conditional": False, "crop_pad": 4, "flip": True, "milestones": ()})
  c.student.update({"steps": 400, "warmup_epochs": 0, "weight_decay": 1e-4, "crop_pad": 4, "flip": True})
  c.loss.kd_temperature = 20.0
  default.set_weights(c, generator={"bn": 1.0, "ce": 1.0, "adversarial": 0.5, "views": 0.8}, student={"kd": 1.0})


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 40, 2
  c.pool.size, c.pool.batch_size, c.pool.bank = 5120, 64, 5120
  c.loss.views.negatives = 512
  c.generator.steps, c.generator.crop_pad = 40, 1
  c.student.steps = 60
