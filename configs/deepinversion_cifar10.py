"""cpsc-jax --config deepinversion_cifar10

DeepInversion with its adaptive term on CIFAR-10, WRN-40-2 -> WRN-16-1, as CMI's benchmark runs it. Published there
(best epoch, teacher of 94.87 %): 83.04 %; WRN-40-1 86.85 %, WRN-16-2 89.72 %, ResNet-34 -> ResNet-18 93.26 %. Accuracy
of this code: not measured. docs/methods.md lists what differs.

`--config deepinversion_cifar10:digits` is DeepInversion on the digits; docs/results.md has its accuracy.
`:cpu` is cut to two CPU cores.
"""

from cpsc_jax.configs import default, family


def get_config(variant=""):
  return family.build("deepinversion", variant, published, on_digits, on_cpu)


def published(c):
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 1, 256
  c.pool.size, c.pool.batch_size, c.pool.dtype = 51200, 256, "uint8"
  c.generator.update({"net": "pixels", "steps": 1000, "lr": 0.1, "b2": 0.99, "milestones": (), "clip_pixels": True})
  c.generator.update({"jitter": "rolls", "crop_pad": 4, "flip": True})
  family.benchmark_student(c, steps=400, crop_pad=4, flip=True)
  c.loss.kd_temperature, c.loss.js_form = 20.0, "clamped"
  default.set_weights(c, generator={"ce": 1.0, "bn": 10.0, "variation": 0.001, "adversarial": 1.0}, student={"kd": 1.0})


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 10, 2
  c.pool.size, c.pool.batch_size = 1280, 64
  c.generator.steps, c.generator.crop_pad = 40, 1
  c.student.steps = 80


def on_cpu(c):
  c.schedule.epochs, c.schedule.iterations = 18, 4
  c.pool.size = 18 * 4 * c.pool.batch_size
  c.generator.steps, c.student.steps = 40, 40
