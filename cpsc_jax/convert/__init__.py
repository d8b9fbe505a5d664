"""PyTorch checkpoints into teachers (`python -m cpsc_jax.convert`), and any net back under PyTorch's own names."""

from cpsc_jax.convert import families, mapping


def from_torch(name, state_dict, like):
  """Variables of a net from a PyTorch state dict of NumPy arrays, every key used once and every shape equal.

  Args:
    name: of the net in `cpsc_jax.nets`, whose default family gives the keys, or a row of `families.FAMILIES`.
    state_dict: {PyTorch key: NumPy array}, without prefixes; num_batches_tracked is passed over.
    like: {"params", "batch_stats"} of arrays or shapes.

  Raises:
    Refusal: listing missing, unexpected and misshapen keys; or no such net.
  """
  return mapping.from_torch(_naming(name), state_dict, like)


def to_torch(name, variables):
  """{PyTorch key: NumPy array} of a net's variables {"params", "batch_stats"}; the inverse of `from_torch`.

  The result has num_batches_tracked too, so that strict loading takes it.
  """
  return mapping.to_torch(_naming(name), variables)


def classifier_from_torch(state_dict, like):
  """`from_torch` for the data-free distillation zoo: its ResNet, wide ResNet or VGG, also under a feature head."""
  return mapping.from_torch(families.ZOO, state_dict, like)


def generator_from_torch(state_dict, like):
  """`from_torch` for either generator of the published code."""
  return from_torch("cifar" if "l1.0.weight" in state_dict else "dcgan", state_dict, like)


def _naming(name):
  return (families.FAMILIES[name] if name in families.FAMILIES else families.of(name)).naming
