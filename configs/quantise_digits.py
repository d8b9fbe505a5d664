"""cpsc-jax --config quantise_digits

Data-free quantisation on scikit-learn's 8x8 digits: trains a WRN-16-1 and quantises it to W4A4. docs/quantise.md has
the accuracies.

Other bits: --config.quantise.weights=8 --config.quantise.activations=8. The controls: --config.arm=gaussian_noise,
untrained_generator, real_kd.
"""

from cpsc_jax.configs import digits, quantise_cifar10

from cpsc_jax import schema


def get_config(variant=""):
  c = digits.get_config()
  schema.add_keys_of_task(c, "quantise")
  with c.unlocked():
    c.name = "quantise_digits"
    quantise_cifar10.quantising(c)
    c.quantise.update({"weights": 4, "activations": 4, "calibration": 1})
    c.generator.warmup_epochs, c.student.steps, c.student.lr = 9, 1, 1e-2
    c.evaluate.every = 5
    quantise_cifar10.apply_variant(c, variant)
  return c
