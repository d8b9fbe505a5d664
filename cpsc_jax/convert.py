"""PyTorch state dicts of the data-free distillation zoo into this package's variables.

The mapping is driven by the network's own tree: each leaf names the one PyTorch key that fills it, every key must be
used and every shape must fit.
"""

import re

import jax
import numpy as np

from cpsc_jax.errors import Refusal

# Module path of a leaf, joined by "/", -> module name in the PyTorch state dict. First match counts.
CLASSIFIER_MODULES = (
  (r"head_(\d)", r"head.\1"),
  (r"(block\d)_(\d+)/shortcut", r"\1.layer.\2.convShortcut"),  # wide ResNet
  (r"(block\d)_(\d+)/(\w+)", r"\1.layer.\2.\3"),
  (r"(layer\d)_(\d+)/shortcut_conv", r"\1.\2.shortcut.0"),  # ResNet
  (r"(layer\d)_(\d+)/shortcut_bn", r"\1.\2.shortcut.1"),
  (r"(layer\d)_(\d+)/(\w+)", r"\1.\2.\3"),
  (r"(block\d)_conv(\d+)", lambda m: f"{m[1]}.{3 * int(m[2])}"),  # VGG
  (r"(block\d)_bn(\d+)", lambda m: f"{m[1]}.{3 * int(m[2]) + 1}"),
  (r"(\w+)", r"\1"),
)
CIFAR_GENERATOR_MODULES = (
  (r"project", "l1.0"),
  (r"cbn0", "conv_blocks0_0"),
  (r"cbn3", "conv_blocks3_2"),
  (r"conv(\d)", r"conv_blocks\1_0"),
  (r"cbn(\d)", r"conv_blocks\1_1"),
)
DCGAN_GENERATOR_MODULES = (
  (r"project", "project.1"),
  (r"cbn0", "conv_blocks0_0"),
  (r"conv(\d)", r"conv_blocks\1_0"),
  (r"cbn(\d)", r"conv_blocks\1_1"),
)
LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def classifier_from_torch(state_dict, like):
  """Variables of a zoo classifier (or one under a feature head) from a PyTorch state dict of NumPy arrays.

  `like` is {"params", "batch_stats"} of arrays or shapes. Raises a Refusal listing missing, unexpected and misshapen
  keys.
  """
  return _fill(state_dict, like, CLASSIFIER_MODULES, {})


def generator_from_torch(state_dict, like):
  """Variables of either generator of the published code, as `classifier_from_torch`."""
  channels = like["params"]["cbn0"]["scale"].shape[1]
  project = {"project": lambda leaf, array: _plain(leaf, _channels_last(array, channels))}
  if "l1.0.weight" in state_dict:
    return _fill(state_dict, like, CIFAR_GENERATOR_MODULES, project)
  transposed = {f"conv{i}": _transposed_convolution for i in range(1, 5)}
  return _fill(state_dict, like, DCGAN_GENERATOR_MODULES, {**project, **transposed})


def _fill(state_dict, like, modules, special):
  unused = {key for key in state_dict if not key.endswith("num_batches_tracked")}
  missing, misshapen = [], []

  def fill(path, want):
    _, *module, leaf = (str(part.key) for part in path)
    key = _torch_key("/".join(module), leaf, modules, state_dict)
    if key not in state_dict:
      missing.append(key)
      return want
    unused.discard(key)
    array = np.asarray(state_dict[key])
    value = special.get(module[-1], _plain)(leaf, array)
    if value.shape != want.shape:
      misshapen.append(f"{key} {array.shape}")
    return value

  variables = jax.tree_util.tree_map_with_path(fill, like)
  if missing or unused or misshapen:
    parts = (("missing", missing), ("unexpected", sorted(unused)), ("of another shape", misshapen))
    raise Refusal("the PyTorch weights do not fit: " + "; ".join(f"{k}: {', '.join(v)}" for k, v in parts if v) + ".")
  return variables


def _torch_key(module, leaf, modules, state_dict):
  if module.startswith("net/"):  # what a feature head wraps
    return "model." + _torch_key(module.removeprefix("net/"), leaf, modules, state_dict)
  for pattern, replacement in modules:
    match = re.fullmatch(pattern, module)
    if match:
      name = replacement(match) if callable(replacement) else match.expand(replacement)
      tables = {"scale": "weights.weight", "bias": "biases.weight"}
      if leaf in tables and f"{name}.weights.weight" in state_dict:
        return f"{name}.{tables[leaf]}"
      return f"{name}.{LEAVES[leaf]}"
  raise KeyError(module)


def _plain(leaf, array):
  if leaf != "kernel":
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T  # OIHW -> HWIO, (out, in) -> (in, out)


def _transposed_convolution(_, array):
  return array[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)  # (in, out, h, w); PyTorch turns the kernel by 180 degrees


def _channels_last(array, channels):
  """Reorders the outputs of a linear layer whose result PyTorch reads as (K, side, side) and we as (side, side, K)."""
  side = int((array.shape[0] // channels) ** 0.5)
  return np.moveaxis(array.reshape(channels, side, side, -1), 0, 2).reshape(array.shape)
