"""cpsc-jax --config incremental_cifar10

Data-free class-incremental learning on CIFAR-10: a ResNet-32 learns two classes at a time. Of the classes of earlier
phases it sees samples that CPSC's generator draws from the network before. Accuracy of this code at this size:
not measured.

`--config incremental_cifar10:cpu` is a WRN-16-1, cut to two CPU cores, with settings of its own; docs/results.md has
its accuracies. The controls: --config.arm=no_rehearsal, lwf, real_rehearsal, joint, untrained_generator.
"""

from cpsc_jax.configs import cifar10, default

from cpsc_jax import schema

# weights of the student's terms
ON_PHOTOGRAPHS = {"kd": 4.0, "local": 1.0, "classifier": 1.0, "lwf": 1.0, "old_features": 0.3}


def get_config(variant=""):
  c = cifar10.get_config()
  schema.add_keys_of_task(c, "incremental")
  with c.unlocked():
    c.name = "incremental_cifar10"
    learning(c, ON_PHOTOGRAPHS)
    c.teacher.net, c.teacher.batch_size = "cifar_resnet32", 128
    c.incremental.batch_size = c.schedule.batch_size = 128
    c.generator.warmup_epochs = 5
    c.schedule.epochs, c.schedule.iterations = 65, 78  # an epoch goes once through the 10,000 images of two classes
    c.generator.update({"steps": 2, "schedule": "cosine"})
    c.student.update({"steps": 1, "lr": 0.05, "weight_decay": 5e-4, "warmup_epochs": 0, "crop_pad": 4, "flip": True})
    c.evaluate.every = 5
    default.apply_variant(c, variant, on_cpu)
    if variant == "smoke":
      shortened(c)
  return c


def learning(c, student):
  """What class-incremental learning needs in place of distillation's; `student`: weights of its terms."""
  default.set_weights(c, generator={"ce": 4.0, "bn": 1.0, "adversarial": 1.0}, student=student)
  c.generator.student_mode = "eval"
  c.student.norm_parts = 2  # real images and samples are normalised apart


def on_cpu(c):
  c.teacher.update({"epochs": 12, "batch_size": 64})
  c.incremental.batch_size = 64
  c.schedule.update({"epochs": 24, "iterations": 40, "batch_size": 64})
  c.generator.steps, c.generator.warmup_epochs = 1, 4
  c.student.update({"lr": 0.01, "crop_pad": 0, "norm_parts": 1})  # docs/incremental.md has what else was tried


def shortened(c):
  """The phases of a smoke run."""
  c.incremental.update({"rests": False, "refine": 0, "phases": 2})
  c.loss.student.refine = 0.0
