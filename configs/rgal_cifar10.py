"""cpsc-jax --config rgal_cifar10

RGAL on CIFAR-10, WRN-40-2 -> WRN-16-1, as its published command runs it: 200 epochs, each with one batch of 256
images from 400 generator steps, then 400 student steps on two views of 128 images. Synthesis compares the student's
last stage, the student its pooled feature, and positives and negatives are not exchanged. `--config
rgal_cifar10:paper` has the paper's form: the teacher's stages, all of the student's, exchanged in synthesis. The
tables of the paper are not known here. Accuracy of this code: not measured. docs/methods.md lists what differs.

`--config rgal_cifar10:digits` is RGAL, in the paper's form, on the digits; docs/results.md has its accuracy.
`:cpu` is cut to two CPU cores.
"""

from cpsc_jax.configs import default, family


def get_config(variant=""):
  if variant == "paper":
    c = family.build("rgal", "", paper, on_digits, on_cpu)
    with c.unlocked():
      c.name += "_paper"
    return c
  return family.build("rgal", variant, paper if variant.startswith("digits") else published, on_digits, on_cpu)


def published(c):
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 1, 256
  c.pool.size, c.pool.batch_size, c.pool.dtype, c.pool.views = 51200, 256, "uint8", 2
  family.plain_generator(c, init="normal")
  c.generator.update({"lr": 1e-3, "steps": 400, "crop_pad": 4, "flip": True, "labels": "balanced"})
  c.student.update({"steps": 400, "warmup_epochs": 0, "weight_decay": 1e-4, "crop_pad": 4, "flip": True})
  c.loss.kd_temperature = 20.0
  c.loss.triplet.update({"synthesis_of": "student", "synthesis_from": 2, "swapped": False})
  c.loss.triplet.student_features = "pooled"
  default.set_weights(
    c,
    generator={"bn": 1.0, "ce": 1.0, "adversarial": 1.0, "triplet": 0.1, "activation": 0.001, "balance": 0.1},
    student={"kd": 1.0, "channel": 0.1, "triplet": 0.1},
  )


def paper(c):
  published(c)
  c.loss.triplet.update({"synthesis_of": "teacher", "synthesis_from": 0, "swapped": True})
  c.loss.triplet.student_features = "stages"


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 10, 2
  c.pool.size, c.pool.batch_size = 1280, 64
  c.generator.steps, c.generator.crop_pad, c.generator.lr = 40, 1, 5e-3
  c.student.steps = 80


def on_cpu(c):
  c.schedule.epochs, c.schedule.iterations = 20, 4
  c.pool.update({"size": 20 * 4 * c.pool.batch_size, "views": 1})
  c.generator.steps, c.student.steps = 20, 40
