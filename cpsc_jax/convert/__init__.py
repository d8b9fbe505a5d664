"""PyTorch checkpoints into teachers (`python -m cpsc_jax.convert`), and any net back under PyTorch's own names."""

import re

from cpsc_jax.convert import families, mapping
from cpsc_jax.errors import Refusal

# Net names (a pattern) -> the naming that `to_torch` uses for it.
NAMINGS = {
  r"wrn_\d+_\d+|resnet\d+|vgg\d+": families.ZOO,
  r"(cifar|small)_resnet\d+": families.ZOO,
  r"imagenet_resnet\d+": families.TORCHVISION_RESNET,
  r"imagenet_vgg\d+|mobilenet_v2": families.TORCHVISION_NUMBERED,
  r"cifar": families.CIFAR_GENERATOR,
  r"dcgan": families.DCGAN_GENERATOR,
}


def to_torch(name, variables):
  """{PyTorch key: NumPy array} of the net called `name` in `cpsc_jax.nets`, under the names of its PyTorch family.

  `variables` is {"params", "batch_stats"}; the result includes num_batches_tracked, so that strict loading takes it.

  Raises:
    Refusal: no such net.
  """
  return mapping.to_torch(variables, _naming(name))


def classifier_from_torch(state_dict, like):
  """Variables of a zoo classifier (or one under a feature head) from a PyTorch state dict of NumPy arrays.

  `like` is {"params", "batch_stats"} of arrays or shapes. Raises a Refusal listing missing, unexpected and misshapen
  keys.
  """
  return mapping.from_torch(state_dict, like, families.ZOO)


def generator_from_torch(state_dict, like):
  """Variables of either generator of the published code, as `classifier_from_torch`."""
  return mapping.from_torch(state_dict, like, _naming("cifar" if "l1.0.weight" in state_dict else "dcgan"))


def _naming(name):
  for pattern, naming in NAMINGS.items():
    if re.fullmatch(pattern, name):
      return naming
  raise Refusal(f"no PyTorch names are known for net '{name}'.")
