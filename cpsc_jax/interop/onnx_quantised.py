"""Fake quantisation as QuantizeLinear and DequantizeLinear, for runtimes that compute with 8-bit integers.

Activations are unsigned and weights signed, 8 bits each. A network of other bits, or whose weights have levels that do
not lie evenly around 0, which int8 kernels cannot take, is translated as it computes, in float: onnxruntime would
quantise such weights once more where they stand between quantised activations.
"""

import collections
from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import helper

from cpsc_jax import nets
from cpsc_jax.interop.onnx_graph import Constant, Graph, Tensor, as_is

LARGEST_BIAS = 2**30


def translation(card: dict[str, Any]) -> dict[str, Any]:
  """What `onnx_graph.build` needs for the net of a card."""
  if not nets.is_int8(card.get("quantised")):
    return {}
  return {"rules": {"fake_quantised": as_integers}, "finish": fold}


def as_integers(graph: Graph, eqn: Any, x: Tensor | Constant, scale: Constant, zero: Constant, highest: Constant):
  """The rule for `cpsc_jax.nets.quantised.fake_quantised`; weights are known, activations are not."""
  scale, zero = scale.array, zero.array
  if isinstance(x, Constant):
    level = np.asarray(jnp.clip(jnp.round(x.array / scale) + zero, 0, highest.array))
    order = (3, 2, 0, 1) if level.ndim == 4 else as_is(level.ndim)
    whole = graph.constant((level - zero).astype(np.int8).transpose(order), f"{x.name}.int8")
    axis = order.index(level.ndim - 1)
    return Tensor(graph.add("DequantizeLinear", whole, graph.constant(scale, f"{x.name}.scale"), axis=axis), order)
  how = graph.constant(np.float32(scale), "scale"), graph.constant(zero.astype(np.uint8), "zero")
  return Tensor(graph.add("DequantizeLinear", graph.add("QuantizeLinear", x.name, *how), *how), x.order)


def fold(graph: Graph) -> None:
  """What batch norms multiply and add behind a convolution with 8-bit weights becomes part of its scales and bias.

  The integers stay as they are, but for their sign, so that nothing is rounded but the bias, to 32 bits. Only where a
  channel's bias would not fit does its scale grow; next to such a bias its weights are nothing.
  """
  users = collections.Counter(name for node in graph.nodes for name in node.input)
  behind = {node.input[0]: node for node in graph.nodes if users[node.input[0]] == 1}
  made_by = {node.output[0]: node for node in graph.nodes}
  for conv in [node for node in graph.nodes if node.op_type == "Conv"]:
    weights, given = made_by.get(conv.input[1]), made_by.get(conv.input[0])
    if weights is None or weights.op_type != "DequantizeLinear":
      continue
    whole, scale = (graph.array(name) for name in weights.input)
    factor, shift, channels = np.ones_like(scale), np.zeros_like(scale), len(scale)
    while (node := behind.get(conv.output[0])) and node.op_type in ("Add", "Mul"):
      by = graph.array(node.input[1])
      if by is None or not (by.size == 1 or by.shape == (1, channels, 1, 1)):
        break
      by = np.broadcast_to(by.reshape(-1), channels)
      factor, shift = (factor, shift + by) if node.op_type == "Add" else (factor * by, shift * by)
      graph.nodes.remove(node)
      conv.output[0] = node.output[0]
    whole, scale = whole * np.sign(factor).astype(np.int8).reshape(-1, 1, 1, 1), scale * np.abs(factor)
    quantised = given is not None and given.op_type == "DequantizeLinear"  # the first layer's input is not
    if quantised:
      step = graph.array(given.input[1])
      smallest = np.maximum(np.abs(shift) / (step * LARGEST_BIAS), np.finfo(np.float32).tiny)
      larger = np.maximum(scale, smallest)
      whole = np.round(whole * (scale / larger).reshape(-1, 1, 1, 1)).astype(np.int8)
      scale = larger
    name = weights.input[0].removesuffix(".int8")
    inputs = graph.constant(whole, weights.input[0]), graph.constant(scale.astype(np.float32), f"{name}.scale")
    parts = [helper.make_node("DequantizeLinear", inputs, [f"{conv.output[0]}.weight"], axis=0)]
    if not quantised:
      bias = graph.constant(shift.astype(np.float32), f"{name}.bias")
    else:
      each, bias = (step * scale).astype(np.float32), f"{conv.output[0]}.bias"
      held = np.round(shift / each.astype(np.float64)).astype(np.int32)
      inputs = graph.constant(held, f"{name}.bias"), graph.constant(each, f"{name}.bias.scale")
      parts.append(helper.make_node("DequantizeLinear", inputs, [bias], axis=0))
    place = graph.nodes.index(conv)
    graph.nodes[place:place] = parts
    del conv.input[1:]
    conv.input.extend([parts[0].output[0], bias])
  graph.drop_unused()
