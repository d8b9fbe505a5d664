"""Maps PyTorch state dicts to this package's variables and back, strictly: every key used once, every shape equal.

The mapping walks the net's tree of variables; each leaf corresponds to exactly one PyTorch key.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from cpsc_jax.errors import Refusal

NAMED_AT_MOST = 20  # keys of one kind in a refusal


class Naming(NamedTuple):
  """The names and layouts that a PyTorch family uses for the variables of our nets.

  Attributes:
    modules: rows (pattern, replacement) from the module path of a leaf, joined by "/", to a PyTorch module; the first
      match counts, and a replacement is a template or a function of the match.
    layouts: module path -> `Layout`, for arrays that differ from PyTorch's usual layout.
  """

  modules: tuple[tuple[str, str | Callable[[re.Match], str]], ...]
  layouts: dict[str, "Layout"] = {}


class Layout(NamedTuple):
  """Two functions (leaf name, array, channels of a generator's first map) -> array; `to_torch` inverts `to_jax`."""

  to_jax: Callable[[str, np.ndarray, int], np.ndarray]
  to_torch: Callable[[str, np.ndarray, int], np.ndarray]


LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
TABLES = {"scale": "weights.weight", "bias": "biases.weight"}  # of a categorical batch norm


def from_torch(naming: Naming, state_dict: dict[str, np.ndarray], like: dict[str, Any]) -> dict[str, Any]:
  """Variables of a net from a PyTorch state dict; `like` is {"params", "batch_stats"} of arrays or shapes.

  Raises:
    Refusal: keys are missing, unexpected or of another shape; they are listed.
  """
  unused = {key for key in state_dict if not key.endswith("num_batches_tracked")}
  width, missing, misshapen = _first_width(like), [], []

  def fill(path, want):
    module, leaf = _split(path)
    key = torch_key(naming, module, leaf, len(want.shape))
    if key not in state_dict:
      missing.append(key)
      return want
    unused.discard(key)
    layout = naming.layouts.get(module, PLAIN)
    array = np.asarray(state_dict[key])
    expected = layout.to_torch(leaf, np.broadcast_to(0.0, want.shape), width).shape
    if array.shape != expected:
      misshapen.append(f"{key} {array.shape}, expected {expected}")
      return want
    return layout.to_jax(leaf, array, width)

  variables = jax.tree_util.tree_map_with_path(fill, like)
  if missing or unused or misshapen:
    parts = (("missing", missing), ("unexpected", sorted(unused)), ("wrong shape", misshapen))
    listed = "; ".join(f"{kind}: {_named(keys)}" for kind, keys in parts if keys)
    raise Refusal(f"the PyTorch weights do not fit: {listed}.")
  return variables


def to_torch(naming: Naming, variables: dict[str, Any]) -> dict[str, np.ndarray]:
  """{PyTorch key: array} of a net's variables; load_state_dict accepts it with strict=True."""
  width, state_dict = _first_width(variables), {}
  for path, value in jax.tree_util.tree_leaves_with_path(variables):
    module, leaf = _split(path)
    key = torch_key(naming, module, leaf, np.ndim(value))
    array = naming.layouts.get(module, PLAIN).to_torch(leaf, np.asarray(value), width)
    state_dict[key] = np.ascontiguousarray(array).reshape(array.shape)
    if leaf == "mean":
      state_dict[key.replace("running_mean", "num_batches_tracked")] = np.zeros((), np.int64)
  return state_dict


def _split(path):
  _, *module, leaf = (str(part.key) for part in path)
  return "/".join(module), leaf


def torch_key(naming, module, leaf, ndim):
  if module.startswith("net/"):  # the net inside a feature head
    return "model." + torch_key(naming, module.removeprefix("net/"), leaf, ndim)
  for pattern, replacement in (*naming.modules, (r"head_(\d)", r"head.\1"), (r"\w+", lambda m: m[0])):
    match = re.fullmatch(pattern, module)
    if match:
      name = replacement(match) if callable(replacement) else match.expand(replacement)
      return f"{name}.{TABLES[leaf] if ndim == 2 and leaf in TABLES else LEAVES[leaf]}"
  raise KeyError(module)


def _named(keys):
  more = len(keys) - NAMED_AT_MOST
  return ", ".join(key[:200] for key in keys[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _first_width(variables):
  """Channels of a generator's first map; 0 for a classifier."""
  first = variables["params"].get("cbn0")
  return first["scale"].shape[1] if first else 0


def _plain_to_jax(leaf, array, _):
  if leaf != "kernel":
    return array
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T  # OIHW -> HWIO, (out, in) -> (in, out)


def _plain_to_torch(leaf, array, _):
  if leaf != "kernel":
    return array
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _rows_to_jax(leaf, array, width):
  """Reorders the outputs of a linear layer that PyTorch reshapes to (K, side, side) and we to (side, side, K)."""
  side = int((array.shape[0] // width) ** 0.5)
  rows = array.reshape(width, side, side, -1).transpose(1, 2, 0, 3)
  return _plain_to_jax(leaf, rows.reshape(array.shape), width)


def _rows_to_torch(leaf, array, width):
  array = _plain_to_torch(leaf, array, width)
  side = int((array.shape[0] // width) ** 0.5)
  return array.reshape(side, side, width, -1).transpose(2, 0, 1, 3).reshape(array.shape)


PLAIN = Layout(_plain_to_jax, _plain_to_torch)
ROWS = Layout(_rows_to_jax, _rows_to_torch)
# PyTorch stores (in, out, h, w) and rotates the kernel by 180 degrees.
TRANSPOSED = Layout(
  lambda leaf, array, _: array[:, :, ::-1, ::-1].transpose(2, 3, 0, 1),
  lambda leaf, array, _: array.transpose(2, 3, 0, 1)[:, :, ::-1, ::-1],
)
