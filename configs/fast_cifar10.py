"""cpsc-jax --config fast_cifar10

FastDFKD with ten steps per batch on CIFAR-10, WRN-40-2 -> WRN-16-1, with the settings of its published script; `:two`
and `:five` take two and five steps. Published (best epoch): 89.29 % with ten steps, 88.90 % with five, 88.36 % with
two. Accuracy of this code: not measured. docs/methods.md lists what differs.

`--config fast_cifar10:digits` is FastDFKD on the digits, `:cpu` is cut to two CPU cores;
docs/results.md has its accuracy.
"""

from cpsc_jax.configs import default, family

from cpsc_jax import schema

RATES = {2: (5e-3, 0.015), 5: (3e-3, 0.01), 10: (2e-3, 0.01)}  # steps: learning rates of generator and latents
STEPS = {"two": 2, "five": 5}


def get_config(variant=""):
  if variant not in STEPS:
    c = family.build("fast", variant, published, on_digits, on_cpu)
    if variant.endswith("smoke"):
      c.episodes.warmup = 0
    return c
  c = family.build("fast", "", published, on_digits, on_cpu)
  with c.unlocked():
    c.name += f"_{variant}"
    take(c, STEPS[variant])
  return c


def published(c):
  schema.add_keys_of(c, "fast")
  c.episodes.redraw_at = 140
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 220, 1, 256
  c.pool.size, c.pool.batch_size, c.pool.dtype = 56320, 256, "uint8"
  family.plain_generator(c)
  take(c, 10)
  c.generator.update({"crop_pad": 4, "flip": True})
  c.student.update({"steps": 400, "crop_pad": 4, "flip": True})
  c.student.update({"lr": 0.2, "lr_end": 2e-4, "weight_decay": 1e-4, "warmup_epochs": 0})
  c.loss.kd_temperature = 20.0
  default.set_weights(c, generator={"bn": 10.0, "ce": 0.4, "adversarial": 1.1}, student={"kd": 1.0})


def take(c, steps):
  c.generator.steps = steps
  c.generator.lr, c.episodes.latent_lr = RATES[steps]


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 16, 4
  c.pool.size, c.pool.batch_size = 4096, 64
  c.episodes.warmup, c.episodes.redraw_at = 8, 0
  c.generator.steps, c.generator.crop_pad = 10, 1
  c.student.steps = 30


def on_cpu(c):
  c.schedule.epochs, c.schedule.iterations = 36, 4
  c.episodes.update({"warmup": 8, "redraw_at": 0})
  c.pool.size = 36 * 4 * c.pool.batch_size
  take(c, 5)
  c.student.steps = 40
