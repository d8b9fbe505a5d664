"""cpsc-jax --config nayer_cifar10

NAYER on CIFAR-10, WRN-40-2 -> WRN-16-1, with the settings of its published script for 100 epochs, but for the embedding
of the classes: rows of the teacher's classifier in place of a text encoder's. Its figures on CIFAR-10 are not known
here; on CIFAR-100 its README plots about 70.2 % for WRN-40-2 -> WRN-16-2. Accuracy of this code: not measured.
docs/methods.md lists what differs.

`--config nayer_cifar10:digits` is NAYER on the digits, `:cpu` is cut to two CPU cores.
"""

from cpsc_jax.configs import default, family

from cpsc_jax import schema


def get_config(variant=""):
  c = family.build("nayer", variant, published, on_digits, on_cpu)
  if variant.endswith("smoke"):
    c.episodes.warmup = 0
  return c


def published(c):
  schema.add_keys_of(c, "nayer")
  c.episodes.warmup = 200
  c.teacher.net, c.student.net = "wrn_40_2", "wrn_16_1"
  # 20 epochs of 10 batches, then 100 of 2 batches and 400 student steps: here 200 student steps after each batch.
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 200, 2, 512
  c.pool.size, c.pool.batch_size, c.pool.dtype = 160000, 400, "uint8"
  family.plain_generator(c, latent_dim=1000)
  c.generator.update({"embedding": "classifier", "steps": 30, "lr": 4e-3, "crop_pad": 4, "flip": True})
  c.student.update({"steps": 200, "crop_pad": 4, "flip": True})
  c.student.update({"lr": 0.2, "lr_end": 2e-4, "weight_decay": 1e-4, "warmup_epochs": 0})
  c.loss.kd_temperature = 20.0
  default.set_weights(c, generator={"bn": 10.0, "ce": 0.5, "adversarial": 1.33}, student={"kd": 1.0})


def on_digits(c):
  c.schedule.epochs, c.schedule.iterations = 16, 4
  c.pool.size, c.pool.batch_size = 3840, 60
  c.episodes.update({"warmup": 8, "life": 20, "warmup_life": 8})
  c.generator.latent_dim = 64
  c.generator.steps, c.generator.crop_pad = 10, 1
  c.student.steps = 30


def on_cpu(c):
  c.schedule.epochs, c.schedule.iterations = 32, 4
  c.episodes.update({"warmup": 8, "life": 20, "warmup_life": 8})
  c.pool.batch_size = 120
  c.pool.size = 32 * 4 * c.pool.batch_size
  c.generator.latent_dim = 256
  c.generator.steps = 10
  c.student.steps = 40
