"""cpsc-jax --config dafl_cifar10

DAFL on CIFAR-10, WRN-40-2 -> WRN-16-1, as CMI's benchmark runs it: its command says temperature 20, its code computes
with 1. Published there (best epoch, teacher of 94.87 %): 65.71 %; WRN-40-1 81.33 %, WRN-16-2 81.55 %, ResNet-34 ->
ResNet-18 92.22 %. Accuracy of this code: not measured. docs/methods.md lists what differs.

`--config dafl_cifar10:digits` is DAFL on the digits; docs/results.md has its accuracy.
`:cpu` is cut to two CPU cores.
"""

from cpsc_jax.configs import default, family


def get_config(variant=""):
  return family.build("dafl", variant, published, on_digits, on_cpu)


def published(c):
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 80, 256
  family.plain_generator(c, latent_dim=512)
  c.generator.update({"lr": 1e-3, "steps": 1})
  family.benchmark_student(c, steps=5, crop_pad=0, flip=False)
  default.set_weights(c, generator={"one_hot": 1.0, "activation": 0.001, "balance": 20.0}, student={"kd": 1.0})


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 20, 40
  c.generator.latent_dim, c.generator.lr = 64, 1e-4
  c.student.steps = 2
  c.loss.kd_temperature = 4.0


def on_cpu(c):
  c.schedule.epochs, c.schedule.iterations = 25, 40
