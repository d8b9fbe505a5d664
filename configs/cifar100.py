"""python -m cpsc_jax.main --config configs/cifar100.py

CIFAR-100, ResNet-34 -> ResNet-18, with the published schedule of CPSC-DFKD: 600 epochs of 50 iterations, each 6
generator and 5 student steps of batch 512; about 1.15e18 FLOP. Accuracy: not measured. The authors' figure for this
pair is not known here; neighbouring methods report 77.0 to 77.5 % at their best epoch from teachers of 78.05 %
(README.md).
"""

from cpsc_jax.configs import default


def get_config(variant=""):
  c = default.get_config()
  with c.unlocked():
    c.name = "cifar100"
    c.dataset.name = "cifar100"
    default.apply_variant(c, variant)
  return c
