"""Converts PyTorch checkpoints to teachers (`cpsc-jax convert`) and variables back to PyTorch state dicts."""

from typing import Any

import numpy as np

from cpsc_jax.interop.convert import families, mapping


def from_torch(name: str, state_dict: dict[str, np.ndarray], like: dict[str, Any]) -> dict[str, Any]:
  """Variables {"params", "batch_stats"} of a net from a PyTorch state dict; every key must be used, every shape equal.

  Args:
    name: of a net in `cpsc_jax.nets`, whose first family defines the keys, or of a row of `families.FAMILIES`.
    state_dict: {PyTorch key: array}, without prefixes; num_batches_tracked is ignored.
    like: {"params", "batch_stats"} of arrays or shapes.

  Raises:
    Refusal: an unknown net, or keys that are missing, unexpected or of another shape, which are listed.
  """
  return mapping.from_torch(_naming(name), state_dict, like)


def to_torch(name: str, variables: dict[str, Any]) -> dict[str, np.ndarray]:
  """{PyTorch key: array} of a net's variables {"params", "batch_stats"}; the inverse of `from_torch`.

  The result includes num_batches_tracked, which load_state_dict(strict=True) requires.
  """
  return mapping.to_torch(_naming(name), variables)


def torch_key(name: str, path: tuple[str, ...], ndim: int) -> str:
  """The PyTorch key of the parameter at `path`, an array of `ndim` axes, of the net called `name`."""
  return mapping.torch_key(_naming(name), "/".join(path[:-1]), path[-1], ndim)


def classifier_from_torch(state_dict: dict[str, np.ndarray], like: dict[str, Any]) -> dict[str, Any]:
  """`from_torch` for the data-free distillation zoo: its ResNet, wide ResNet or VGG, with or without a feature head."""
  return mapping.from_torch(families.ZOO, state_dict, like)


def generator_from_torch(state_dict: dict[str, np.ndarray], like: dict[str, Any]) -> dict[str, Any]:
  """`from_torch` for either generator of the published code."""
  return from_torch("cifar" if "l1.0.weight" in state_dict else "dcgan", state_dict, like)


def _naming(name: str) -> mapping.Naming:
  return (families.FAMILIES[name] if name in families.FAMILIES else families.of(name)).naming
