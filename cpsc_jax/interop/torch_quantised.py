"""Quantised nets for PyTorch: levels as floats, with the scale and the zero point of each.

The state dict is that of the float network with every weight on its level, and in addition

    LAYER.weight_scale, LAYER.weight_zero_point   (K,), float32 and int32, for each output channel of a quantised layer
    activations.scale, activations.zero_point     (n,), for the n ReLUs in the order in which a call reaches them

so that a weight is (level - zero_point) * scale with levels 0 to 2^bits - 1.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from cpsc_jax import nets, saved
from cpsc_jax.interop import convert
from cpsc_jax.nets import quantised


def state_dict(net: saved.SavedNet) -> dict[str, np.ndarray]:
  """{PyTorch key: array}, as the module of this file's text has them."""
  name, params = net.card["net"], flatten_dict(net.variables["params"])
  layers, highs = _order(net)
  more: dict[str, np.ndarray] = {}
  for path, bits in layers:
    kernel = params[*path, "kernel"]
    scale, zero = quantised.weight_grid(kernel, bits, net.net.symmetric)
    params[*path, "kernel"] = quantised.quantised_weights(kernel, bits, net.net.symmetric)
    base = convert.torch_key(name, (*path, "kernel"), kernel.ndim)
    more |= {f"{base}_scale": np.asarray(scale), f"{base}_zero_point": np.asarray(zero).astype(np.int32)}
  if highs:
    scale, zero = quantised.grid(jnp.zeros(len(highs)), jnp.stack(highs), net.net.activations)
    more |= {"activations.scale": np.asarray(scale), "activations.zero_point": np.asarray(zero).astype(np.int32)}
  stats = {
    path: leaf for path, leaf in flatten_dict(net.variables["batch_stats"]).items() if path[-1] in ("mean", "var")
  }
  variables = {"params": unflatten_dict(params), "batch_stats": unflatten_dict(stats)}
  return convert.to_torch(name, variables) | more


def facts(net: saved.SavedNet) -> dict[str, Any]:
  """The constants of the module: ACTIVATIONS, (number of ReLUs, bits) or None, and WEIGHT_BITS by layer."""
  layers, highs = _order(net)
  params, name = flatten_dict(net.variables["params"]), net.card["net"]
  keys = {convert.torch_key(name, (*path, "kernel"), params[*path, "kernel"].ndim): bits for path, bits in layers}
  bits = {key.removesuffix(".weight"): bits for key, bits in keys.items()}
  return {"ACTIVATIONS": (len(highs), net.net.activations) if highs else None, "WEIGHT_BITS": bits}


def with_rounding(text: str) -> str:
  """The text of a float module whose ReLUs are followed by rounding."""
  text = re.sub(r"\bF\.(relu6?)\(", r"rounded(F.\1, ", text)
  return re.sub(r"\bnn\.ReLU(6?)\(\)", r"Rounded(F.relu\1)", text)


def _order(net: saved.SavedNet) -> tuple[list[tuple[tuple[str, ...], int]], list[jax.Array]]:
  """([(path, bits) of a quantised layer, ...], [end of the range of a ReLU, ...]), in the order of a call."""
  size = net.card["image_size"]
  layers, relus = quantised.call_order(net.net, net.variables, (size, size, net.card["channels"]))
  stats = flatten_dict(net.variables["batch_stats"])
  highs = [stats[*path, "high"] for path in relus] if net.net.activations < nets.FLOAT else []
  return [(path, bits) for path, bits in layers if bits < nets.FLOAT], highs
