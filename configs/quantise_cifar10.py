"""cpsc-jax --config quantise_cifar10 --config.teacher.checkpoint=teachers/resnet20

Data-free quantisation of a CIFAR-10 network to W4A4 by CPSC's conditional generator. Accuracy of this code:
docs/results.md. Published at W4A4, from another ResNet-20 with 93.89 to 94.03 %: GDFQ 90.11 to 90.25 %, Qimera
91.26 %, AdaDFQ 92.31 %.

Other bits: --config.quantise.weights=5 --config.quantise.activations=5. The controls: --config.arm=gaussian_noise,
untrained_generator, real_kd.
"""

from cpsc_jax.configs import cifar10, default

from cpsc_jax import schema


def get_config(variant=""):
  c = cifar10.get_config()
  schema.add_keys_of_task(c, "quantise")
  with c.unlocked():
    c.name = "quantise_cifar10"
    c.teacher.net = "cifar_resnet20"
    c.quantise.update({"weights": 4, "activations": 4, "calibration": 1})
    quantising(c)
    c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 25, 100, 128
    c.generator.update({"width": 32, "latent_dim": 100, "steps": 1, "lr": 1e-3, "schedule": "cosine"})
    c.generator.warmup_epochs, c.student.steps = 4, 1
    c.evaluate.every = 5
    apply_variant(c, variant)
  return c


def apply_variant(c, variant):
  """As default's; after the calibration of a smoke run a single epoch is left, which no warm-up may take."""
  default.apply_variant(c, variant)
  if variant == "smoke":
    c.student.warmup_epochs = 0


def quantising(c):
  """What quantisation needs in place of distillation's: a student that hardly moves, and samples of known classes."""
  default.set_weights(c, generator={"ce": 4.0, "bn": 1.0, "adversarial": 0.5}, student={"kd": 1.0, "ce": 0.05})
  # The published code averages the divergence over classes too ("mean"), so that `ce` outweighs it ten times more.
  c.loss.update({"kd_temperature": 4.0, "kl_classes": "sum"})
  c.generator.student_mode = "eval"
  c.student.update({"optimiser": "nesterov", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4, "clip": 0.0})
  c.student.update({"schedule": "cosine", "lr_end": 0.0, "warmup_epochs": 0, "inherit": True, "crop_pad": 0})
