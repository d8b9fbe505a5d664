"""What the configs of CPSC-DFKD's neighbours share: each is one method, on CIFAR-10 and on the digits."""

from cpsc_jax.configs import cifar10, default, digits


def build(method, variant, published, on_digits, on_cpu):
  """The config of a method: variants "" (CIFAR-10) and "digits", and "smoke" and "digits_smoke", either cut down.

  `published` sets everything that belongs to the method; `on_digits` what is different on the digits, and `on_cpu` in
  the variant "cpu", CIFAR-10 on two CPU cores.
  """
  small = variant in ("digits", "digits_smoke")
  c = (digits if small else cifar10).get_config()
  with c.unlocked():
    c.method, c.name = method, f"{method}_{c.name}"
    kept = c.to_dict()
    c.generator.student_mode = "eval"
    published(c)
    if small:
      # Nets, data and the student's learning rates stay those of the digits.
      for section, keys in {
        "teacher": c.teacher.keys(),
        "student": c.student.keys(),
        "schedule": ("batch_size",),
      }.items():
        c[section].update({key: kept[section][key] for key in keys})
      c.generator.update({key: kept["generator"][key] for key in ("width", "latent_dim")} | {"flip": False})
      c.pool.views = 1
      on_digits(c)
    default.apply_variant(c, "smoke" if variant.endswith("smoke") else "" if small else variant, on_cpu)
  return c


def plain_generator(c, latent_dim=256, init="torch"):
  """The generator of CMI's code base, which RGAL and FastDFKD share: pixels in [0, 1], no classes."""
  c.generator.update({"conditional": False, "output": "sigmoid", "epsilon": 1e-5, "init": init})
  c.generator.update({"latent_dim": latent_dim, "b1": 0.5, "b2": 0.999, "milestones": ()})


def benchmark_student(c, steps, crop_pad, flip):
  """How CMI's benchmark trains every student: SGD, a tenth of the rate after 120, 150 and 180 epochs."""
  c.student.update({"steps": steps, "crop_pad": crop_pad, "flip": flip})
  c.student.update({"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "warmup_epochs": 0})
  c.student.update({"schedule": "steps", "milestones": (121, 151, 181), "decay": 0.1})
