"""cpsc-jax --config dfad_cifar10

DFAD on CIFAR-10, ResNet-34 -> ResNet-18, with the settings of its published code. Its README gives figures as a picture
only; they are not known here. Accuracy of this code: not measured. docs/methods.md lists what differs.

`--config dfad_cifar10:digits` is DFAD on the digits; docs/results.md has its accuracy.
`:cpu` is cut to two CPU cores.
"""

from cpsc_jax.configs import default, family


def get_config(variant=""):
  return family.build("dfad", variant, published, on_digits, on_cpu)


def published(c):
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 500, 50, 256
  c.generator.update({"conditional": False, "epsilon": 1e-5})
  c.generator.update({"lr": 1e-3, "steps": 1, "b1": 0.9, "milestones": (100, 200)})
  c.student.update({"steps": 5, "init": "torch", "schedule": "steps", "milestones": (100, 200), "warmup_epochs": 0})
  c.generator.student_mode = "train"
  default.set_weights(c, generator={"adversarial": 1.0}, student={"l1": 1.0})


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 16, 20
  c.generator.update({"latent_dim": 64, "lr": 2e-4, "milestones": ()})
  c.student.steps = 5
  c.generator.student_mode = "eval"


def on_cpu(c):
  c.schedule.epochs, c.schedule.iterations = 25, 40
  c.generator.update({"schedule": "cosine", "milestones": ()})
  c.generator.student_mode = "eval"
