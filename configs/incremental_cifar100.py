"""cpsc-jax --config incremental_cifar100

Data-free class-incremental learning on CIFAR-100 by R-DFCIL's published settings: a ResNet-32 learns ten classes at a
time in 10 phases, in an order shuffled by a seed; --config.incremental.phases=5 or 20 are its other protocols.
Published at the end of 10 phases: R-DFCIL 42.14 %, ABD 43.11 % (as quoted by EFC++, arXiv 2503.10439), all classes
together 69.9 %. Accuracy of this code: not measured.

The old classes are drawn by a generator that is fitted to the previous network before each phase and then rests.
`--config incremental_cifar100:abd` has ABD's terms in the same phases, `:cpsc` CPSC's conditional generator, which goes
on learning beside the student.
"""

from cpsc_jax.configs import cifar100, default, incremental_cifar10

from cpsc_jax import schema


def get_config(variant=""):
  c = cifar100.get_config()
  schema.add_keys_of_task(c, "incremental")
  with c.unlocked():
    c.name = "incremental_cifar100" + (f"_{variant}" if variant in ("abd", "cpsc") else "")
    published(c)
    if variant == "abd":
      abd(c)
    elif variant == "cpsc":
      conditional(c)
    default.apply_variant(c, "" if variant in ("abd", "cpsc") else variant)
    if variant == "smoke":
      incremental_cifar10.shortened(c)
  return c


def published(c):
  """R-DFCIL (Gao et al., ECCV 2022), CIFAR-100."""
  c.teacher.net = "cifar_resnet32"
  c.incremental.update({"phases": 10, "order": "0", "batch_size": 128, "balance": "rdfcil"})
  c.incremental.update({"rests": True, "refine": 40, "refine_lr": 5e-3})
  # 5,000 images of each phase are 39 batches of 128; 13 epochs of 390 generator updates are 5,070 (published: 5,000).
  c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size = 213, 39, 128
  c.generator.update({"steps": 10, "lr": 1e-3, "latent_dim": 1000, "conditional": False, "b1": 0.9, "b2": 0.999})
  c.generator.update({"milestones": (), "student_mode": "eval", "warmup_epochs": 13})
  sgd = {"optimiser": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "decay": 0.1, "schedule": "steps"}
  c.student.update({**sgd, "milestones": (81, 121), "warmup_epochs": 0, "steps": 1, "crop_pad": 4, "flip": True})
  c.teacher.update({**sgd, "milestones": (81, 121), "epochs": 200, "batch_size": 128, "crop_pad": 4, "flip": True})
  c.student.norm_parts = 2
  default.set_weights(
    c,
    generator={"confident": 1.0, "even": 1.0, "moments": 50.0, "smooth": 1e-3},
    student={"local": 0.5, "old_logits": 0.15, "relation": 0.5, "refine": 0.5},
  )


def conditional(c):
  """CPSC's generator in the same phases."""
  incremental_cifar10.learning(c, incremental_cifar10.ON_PHOTOGRAPHS)
  c.incremental.update({"balance": "none", "rests": False, "refine": 0})
  c.schedule.epochs = 173
  c.generator.update({"conditional": True, "latent_dim": 256, "steps": 2, "b1": 0.5, "schedule": "cosine"})


def abd(c):
  """ABD (Smith et al., ICCV 2021), CIFAR-100: 250 epochs, no refinement, one forward of both kinds of images."""
  c.incremental.update({"balance": "abd", "refine": 0})
  c.schedule.epochs = 263
  c.student.update({"milestones": (101, 151, 201), "weight_decay": 2e-4, "norm_parts": 1})
  c.teacher.update({"milestones": (101, 151, 201), "weight_decay": 2e-4, "epochs": 250})
  default.set_weights(
    c,
    generator={"confident": 1.0, "even": 1.0, "moments": 50.0, "smooth": 1e-3},
    student={"local": 1.0, "classifier": 1.0, "old_features": 0.1},
  )
