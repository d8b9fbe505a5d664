"""cpsc-jax --config digits

scikit-learn's 8x8 digits, WRN-16-1 (175 k parameters) -> WRN-10-1 (78 k). docs/results.md has the accuracies, how these
settings were chosen, and what else was tried.
"""

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
    c.teacher.label_smoothing = 0.05
    c.teacher.crop_pad = 1
    c.teacher.flip = False
    c.student.net = "wrn_10_1"
    c.student.steps = 2
    c.student.crop_pad = 1
    c.student.warmup_epochs = 1
    c.student.inherit = True
    c.generator.latent_dim = 8
    c.generator.width = 16
    c.generator.steps = 1
    c.generator.lr = 1e-3
    c.generator.milestones = ()
    c.schedule.epochs = 20
    c.schedule.iterations = 40
    c.schedule.batch_size = 64
    c.loss.generator.ce = 4.0
    c.generator.student_mode = "train"
    c.evaluate.every = 5
    c.evaluate.gradients = False  # compiling them would be a tenth of the run
    default.apply_variant(c, variant)
  return c
