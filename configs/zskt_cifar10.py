"""cpsc-jax --config zskt_cifar10

ZSKT on CIFAR-10, WRN-40-2 -> WRN-16-1, with the schedule of CMI's benchmark and the paper's attention transfer.
Published there, without it (best epoch, teacher of 94.87 %): 83.74 %; WRN-40-1 86.07 %, WRN-16-2 89.66 %, ResNet-34 ->
ResNet-18 93.32 %. Accuracy of this code: not measured.

`--config zskt_cifar10:digits` is ZSKT on the digits; docs/results.md has its accuracy.
"""

from cpsc_jax.configs import default, family


def get_config(variant=""):
  return family.build("zskt", variant, published, on_digits)


def published(c):
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 80, 256
  c.generator.update({"lr": 1e-3, "steps": 1, "conditional": False, "milestones": ()})
  c.student.update({"steps": 5, "warmup_epochs": 0, "weight_decay": 1e-4})
  default.set_weights(c, generator={"adversarial": 1.0}, student={"kd": 1.0, "attention": 250.0})


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 30, 20
  c.generator.latent_dim, c.generator.lr = 64, 2e-4
  c.student.steps = 5
