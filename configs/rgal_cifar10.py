"""cpsc-jax --config rgal_cifar10

RGAL on CIFAR-10, WRN-40-2 -> WRN-16-2, with the settings of its published code: 200 epochs, each with one batch of 256
images from 400 generator steps, then 400 student steps of 128. The tables of its paper are not known here; neighbouring
methods reach up to 92.5 % (best epoch) from a teacher of 94.87 %. Accuracy of this code: not measured.

`--config rgal_cifar10:digits` is RGAL on the digits; docs/results.md has its accuracy.
"""

from cpsc_jax.configs import default, family


def get_config(variant=""):
  return family.build("rgal", variant, published, on_digits)


def published(c):
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_2"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 1, 128
  c.pool.size, c.pool.batch_size = 51200, 256
  c.generator.update({"lr": 1e-3, "steps": 400, "conditional": False, "crop_pad": 4, "flip": True, "milestones": ()})
  c.student.update({"steps": 400, "warmup_epochs": 0, "weight_decay": 1e-4, "crop_pad": 4, "flip": True})
  c.loss.kd_temperature = 20.0
  default.set_weights(
    c,
    generator={"bn": 1.0, "ce": 1.0, "adversarial": 1.0, "triplet": 0.1},
    student={"kd": 1.0, "channel": 0.1, "triplet": 0.1},
  )


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 40, 2
  c.pool.size, c.pool.batch_size = 5120, 64
  c.generator.steps, c.generator.crop_pad = 40, 1
  c.student.steps = 60
