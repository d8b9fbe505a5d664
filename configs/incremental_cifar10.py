"""cpsc-jax --config incremental_cifar10

Data-free class-incremental learning on CIFAR-10: a small ResNet-32 learns two classes at a time. Of the classes of
earlier phases it sees samples that CPSC's generator draws from the network before. Accuracy of this code: not measured.

The controls: --config.arm=no_rehearsal, lwf, real_rehearsal, joint, untrained_generator.
"""

from cpsc_jax.configs import cifar10, default

from cpsc_jax import schema


def get_config(variant=""):
  c = cifar10.get_config()
  schema.add_keys_of_task(c, "incremental")
  with c.unlocked():
    c.name = "incremental_cifar10"
    learning(c)
    c.teacher.net = "small_resnet32"
    default.apply_variant(c, variant)
    if variant == "smoke":
      shortened(c)
  return c


def learning(c):
  """What class-incremental learning needs in place of distillation's."""
  default.set_weights(
    c,
    generator={"ce": 4.0, "bn": 1.0, "adversarial": 1.0},
    student={"kd": 1.0, "local": 0.0, "balanced": 1.0},
  )
  c.generator.student_mode = "eval"


def shortened(c):
  """The phases of a smoke run."""
  c.incremental.update({"warmup": 0, "rests": False, "refine": 0, "phases": 2})
