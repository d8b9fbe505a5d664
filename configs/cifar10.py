"""cpsc-jax --config cifar10

CIFAR-10, ResNet-34 -> ResNet-18. The authors' settings for this data set were not published: this is their CIFAR-100
schedule with the logarithmic distillation terms of their CIFAR-10 branch. Neighbouring methods report 92.2 to 95.3 % at
their best epoch, from a teacher of 95.70 %. Accuracy of this code: not measured with these settings; with those of
benchmarks/plans/gpu_cifar.py 93.84 % at the last epoch, from a teacher of 94.73 % (seed 0, docs/results.md).

`--config cifar10:cpu` is WRN-16-1 -> WRN-10-1, cut to two CPU cores; docs/results.md has its accuracy.
"""

from cpsc_jax.configs import default


def get_config(variant=""):
  c = default.get_config()
  with c.unlocked():
    c.name = "cifar10"
    c.dataset.name = "cifar10"
    c.loss.ikd_form = "log"
    default.apply_variant(c, variant, default.cpsc_on_cpu)
  return c
