"""python -m cpsc_jax.main --config configs/digits.py"""

from cpsc_jax.configs import default


def get_config(variant=""):
  c = default.get_config()
  with c.unlocked():
    c.name = "digits"
    c.dataset.name = "digits"
    c.teacher.net = "wrn_16_1"
    c.teacher.epochs = 40
    c.teacher.batch_size = 64
    c.teacher.warmup_epochs = 1
    c.teacher.crop_pad = 1
    c.teacher.flip = False
    c.student.net = "wrn_10_1"
    c.student.steps = 1
    c.student.warmup_epochs = 2
    c.generator.latent_dim = 64
    c.generator.width = 32
    c.generator.steps = 1
    c.generator.lr = 3e-4
    c.schedule.epochs = 60
    c.schedule.iterations = 20
    c.schedule.batch_size = 128
    c.loss.generator.ce = 5.0
    default.apply_variant(c, variant)
  return c
