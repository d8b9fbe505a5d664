"""cpsc-jax --config incremental_digits

Data-free class-incremental learning on scikit-learn's 8x8 digits: a WRN-16-1 learns two classes at a time. Of the
classes of earlier phases it sees samples that CPSC's generator draws from the network before. docs/incremental.md has
the accuracies.

The controls: --config.arm=no_rehearsal, lwf, real_rehearsal, joint, untrained_generator.
"""

from cpsc_jax.configs import default, digits, incremental_cifar10

from cpsc_jax import schema


def get_config(variant=""):
  c = digits.get_config()
  schema.add_keys_of_task(c, "incremental")
  with c.unlocked():
    c.name = "incremental_digits"
    incremental_cifar10.learning(c, {"kd": 4.0, "balanced": 1.0, "old_features": 0.3})
    c.incremental.batch_size = c.schedule.batch_size = 64
    c.schedule.epochs, c.schedule.iterations, c.generator.warmup_epochs = 12, 40, 2
    c.generator.steps = 2
    c.student.steps, c.student.lr, c.student.warmup_epochs = 2, 0.02, 0
    c.student.crop_pad = 0  # crops of what a student learns from cost it old classes
    c.evaluate.every = c.evaluate.diagnostics_every = 6
    default.apply_variant(c, variant)
    if variant == "smoke":
      incremental_cifar10.shortened(c)
  return c
