"""cpsc-jax --config cifar100

CIFAR-100, ResNet-34 -> ResNet-18, with the published schedule of CPSC-DFKD: 600 epochs of 50 iterations, each of 6
generator and 5 student steps with a batch of 512; about 1.15e18 FLOP. The authors' figure for this pair is not known
here; neighbouring methods report 77.0 to 77.5 % at their best epoch, from teachers of 78.05 %. Accuracy of this code:
not measured at this size.

`--config cifar100:cpu` is small ResNet-32 -> small ResNet-8, cut to two CPU cores; docs/results.md has its accuracy.
"""

from cpsc_jax.configs import default


def get_config(variant=""):
  c = default.get_config()
  with c.unlocked():
    c.name = "cifar100"
    c.dataset.name = "cifar100"
    default.apply_variant(c, variant, on_cpu)
  return c


def on_cpu(c):
  default.cpsc_on_cpu(c)
  c.teacher.net, c.student.net = "small_resnet32", "small_resnet8"
