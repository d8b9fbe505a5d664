"""cpsc-jax --config zskt_cifar10

ZSKT on CIFAR-10, WRN-40-2 -> WRN-16-1, with the settings of its published code. CMI's benchmark, which runs it without
attention transfer and by other settings, gives (best epoch, teacher of 94.87 %) 83.74 %; WRN-40-1 86.07 %, WRN-16-2
89.66 %, ResNet-34 -> ResNet-18 93.32 %. Accuracy of this code: not measured. docs/methods.md lists what differs.

`--config zskt_cifar10:digits` is ZSKT on the digits; docs/results.md has its accuracy.
`:cpu` is cut to two CPU cores.
"""

from cpsc_jax.configs import default, family


def get_config(variant=""):
  return family.build("zskt", variant, published, on_digits, on_cpu)


def published(c):
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 400, 128
  c.generator.update({"conditional": False, "epsilon": 1e-5, "latent_dim": 100})
  c.generator.update({"lr": 1e-3, "steps": 1, "b1": 0.9, "schedule": "cosine", "clip": 5.0})
  c.student.update({"steps": 10, "optimiser": "adam", "lr": 2e-3, "weight_decay": 0.0, "clip": 5.0})
  c.student.warmup_epochs = 0
  c.generator.student_mode = "train"
  c.loss.kl_classes = "mean"
  default.set_weights(c, generator={"adversarial": 1.0}, student={"kd": 1.0, "attention": 250.0})


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 16, 20
  c.generator.latent_dim, c.generator.lr = 64, 5e-5
  c.student.steps, c.student.lr = 5, 0.02


def on_cpu(c):
  c.schedule.epochs, c.schedule.iterations = 25, 20
  c.generator.student_mode = "eval"
