"""What the configs of CPSC-DFKD's neighbours share: each is one method, on CIFAR-10 and on the digits."""

from cpsc_jax.configs import cifar10, default, digits


def build(method, variant, published, on_digits):
  """The config of a method: variants "" (CIFAR-10) and "digits", and "smoke" and "digits_smoke", either cut down.

  `published` sets everything that belongs to the method; `on_digits` what is different on the digits.
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
      on_digits(c)
    default.apply_variant(c, "smoke" if variant.endswith("smoke") else "" if small else variant)
  return c
