"""cpsc-jax --config default

The config that all others start from. `cpsc_jax/schema.py` says what every key means and may be, and so do
docs/config.md and `cpsc-jax --config NAME --help`.

Keys are locked: an unknown one is refused. `--config NAME:smoke` is the same run cut down to seconds. What was measured
with these configs is in docs/results.md; at their heads stands what others have published.
"""

from cpsc_jax import schema
from cpsc_jax.errors import Refusal


def get_config(variant=""):
  c = schema.defaults()
  apply_variant(c, variant)
  return c.lock()


def apply_variant(c, variant, on_cpu=None):
  """Carries out the word behind the colon of --config FILE:VARIANT; `on_cpu` sets a method's own part of "cpu"."""
  if variant == "smoke":
    smoke(c)
  elif variant == "cpu" and on_cpu:
    cpu(c)
    on_cpu(c)
  elif variant:
    known = "are 'smoke' and 'cpu'" if on_cpu else "is 'smoke'"
    raise Refusal(f"no variant '{variant}' of config {c.name}; there {known}.")


def cpu(c):
  """What methods have in common on two CPU cores: WRN-16-1 -> WRN-10-1, which starts with layers of its teacher.

  The teacher is one of others, converted (docs/teachers.md): name its folder in teacher.checkpoint. How long the run
  is, which is meant to be about 20 minutes, belongs to the method.
  """
  c.name += "_cpu"
  c.teacher.net, c.student.net = "wrn_16_1", "wrn_10_1"
  c.student.update({"inherit": True, "crop_pad": 4, "flip": True, "init": "kaiming"})
  c.student.update({"optimiser": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "clip": 0.0})
  c.student.update({"schedule": "cosine", "lr_end": 2e-4, "milestones": (), "warmup_epochs": 0})
  c.schedule.batch_size = c.pool.batch_size = 128
  c.generator.width = 32
  c.evaluate.every = 5


def cpsc_on_cpu(c):
  """CPSC-DFKD's own part of the variant "cpu"."""
  c.schedule.epochs, c.schedule.iterations = 24, 24
  c.student.steps, c.student.lr = 8, 0.05
  c.pool.replay_share, c.pool.dtype = 0.75, "uint8"
  c.generator.update({"steps": 1, "lr": 3e-3, "schedule": "cosine", "crop_pad": 4, "flip": True})
  set_weights(c, generator={"adversarial": 1.0, "bn": 10.0, "ce": 0.5, "scl": 0.1}, student={"kd": 1.0})
  c.loss.kd_temperature = 20.0


def set_weights(c, generator, student):
  """Sets the weights of the named terms, and all others to 0."""
  for section, weights in ((c.loss.generator, generator), (c.loss.student, student)):
    section.update({**dict.fromkeys(section, 0.0), **weights})


def smoke(c):
  """Cuts a config down to a run of seconds through the whole path, on the same data set."""
  c.name += "_smoke"
  c.teacher.net = "wrn_10_1"
  c.teacher.epochs = 1
  c.teacher.batch_size = 128
  c.student.net = "wrn_10_1"
  c.student.warmup_epochs = 1
  c.student.steps = 1
  c.generator.width = 8
  c.generator.latent_dim = 16
  c.generator.steps = 1
  c.generator.warmup_epochs = 0
  c.schedule.epochs = 2
  c.schedule.iterations = 2
  c.schedule.batch_size = 32
  c.pool.size, c.pool.batch_size = 64, 32
  c.evaluate.every = 1
  c.evaluate.samples_per_class = 10
  c.checkpoint.every = 1
