"""Translates a JAX function of arrays to an ONNX graph, one equation of its jaxpr after another.

Values that depend only on constants (weights, running statistics, shapes) are computed by JAX and folded in. ONNX puts
channels first and JAX nets put them last, so each tensor of the graph records the order in which it stores the axes of
its array: most transpositions then change this record and need no node.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import onnx
from jax.extend.core import Literal
from onnx import helper, numpy_helper

from cpsc_jax.errors import Refusal

OPSET, IR_VERSION = 18, 8  # onnxruntime 1.14 and later
WRAPPERS = ("jit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


class Tensor(NamedTuple):
  """A tensor of the graph; its axis i is axis order[i] of the array that it represents."""

  name: str
  order: tuple[int, ...]


class Constant(NamedTuple):
  """An array whose value is known now, and the weight that it was computed from, after which the graph names it."""

  array: Any
  name: str = "constant"


def build(
  function: Callable[..., jax.Array],
  variables: Any,
  inputs: dict[str, tuple[tuple[int, ...], Any]],
  output: str,
  metadata: dict[str, str],
  rules: Mapping[str, Callable] | None = None,
  finish: Callable[["Graph"], None] = lambda graph: None,
) -> onnx.ModelProto:
  """The ONNX model of function(variables, *inputs) -> array, for any batch size and checked by onnx.checker.

  Args:
    variables: a pytree of dicts of arrays, folded into the model.
    inputs: {name: (shape of one sample, dtype)}; the batch axis comes first in all of them.
    output: the name of the result.
    metadata: stored in the model as its properties.
    rules: {name: rule} of functions under jax.jit that are translated as a whole.
    finish: is called with the graph when all is translated.

  Every input or output of shape (N, H, W, K) has the shape (N, K, H, W) in the model.

  Raises:
    Refusal: the function uses a JAX primitive that has no rule here, which is named, or the graph is not valid ONNX.
  """
  (batch,) = jax.export.symbolic_shape("batch")
  specs = {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in inputs.items()}
  closed, result = jax.make_jaxpr(function, return_shape=True)(variables, *specs.values())
  weights = [
    Constant(np.asarray(leaf), ".".join(str(part.key) for part in path))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  ]
  graph = Graph(batch, next(iter(specs)), rules or {})
  tensors = [Tensor(name, channels_first(spec)) for name, spec in specs.items()]
  (value,) = graph.walk(closed.jaxpr, closed.consts, [*weights, *tensors])
  graph.nodes.append(helper.make_node("Identity", [graph.stored(value, channels_first(result))], [output]))

  finish(graph)

  def port(name, spec):
    shape = [spec.shape[axis] if static(spec.shape[axis]) else "batch" for axis in channels_first(spec)]
    return helper.make_tensor_value_info(name, element_type(spec.dtype), shape)

  ports = [port(name, spec) for name, spec in specs.items()]
  model = helper.make_model(
    helper.make_graph(graph.nodes, "cpsc_jax", ports, [port(output, result)], graph.initialisers),
    opset_imports=[helper.make_opsetid("", OPSET)],
    ir_version=IR_VERSION,
    producer_name="cpsc_jax",
  )
  helper.set_model_props(model, metadata)
  try:
    onnx.checker.check_model(model, full_check=True)
  except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
    reason = " ".join(str(error).split())
    raise Refusal(f"the ONNX graph is not valid ({reason}); use --format stablehlo, which takes any net.") from error
  return model


class Graph:
  """The nodes and initialisers written so far. `batch` is the symbolic batch size, read from the input `first`."""

  def __init__(self, batch: Any, first: str, rules: Mapping[str, Callable]):
    self.batch, self.first, self.rules = batch, first, rules
    self.nodes, self.initialisers, self.written = [], [], {}

  def walk(self, jaxpr: Any, consts: Iterable, args: Iterable[Tensor | Constant]) -> list[Tensor | Constant]:
    """Translates a jaxpr with the given inputs and returns its outputs."""
    known = dict(zip(jaxpr.constvars, (Constant(np.asarray(c)) for c in consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
      return Constant(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, Literal) else known[atom]

    for eqn in live_equations(jaxpr):
      known.update(zip(eqn.outvars, self.results(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def results(self, eqn: Any, operands: list) -> list[Tensor | Constant | None]:
    """The outputs of an equation: translated from the jaxpr that it wraps, computed now, or translated by its rule."""
    name, many = eqn.primitive.name, eqn.primitive.multiple_results
    if name == "platform_index":
      return [None]  # `unpacked` chooses the platform
    if name == "jit" and eqn.params["name"] in self.rules:
      return [self.rules[eqn.params["name"]](self, eqn, *operands)]
    inner = unpacked(eqn)
    if inner is not None:
      jaxpr, consts = getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())
      return self.walk(jaxpr, consts, operands[len(operands) - len(jaxpr.invars) :])
    fixed = all(isinstance(o, Constant) for o in operands) and all(static(*v.aval.shape) for v in eqn.outvars)
    if fixed and name != "dim_as_value":  # which is the batch size
      result = eqn.primitive.bind(*(jnp.asarray(o.array) for o in operands), **eqn.params)
      origin = next((o.name for o in operands if o.name != "constant"), "constant")
      return [Constant(np.asarray(r), origin) for r in (result if many else [result])]
    if name not in RULES:
      raise unsupported(eqn)
    result = RULES[name](self, eqn, *operands)
    return result if many else [result]

  def add(self, op: str, *inputs: str, **attributes: Any) -> str:
    """Adds a node, unless an equal one exists, and returns the name of its output."""
    key = op, inputs, str(attributes)
    if key not in self.written:
      self.written[key] = f"{op}_{len(self.nodes)}"
      self.nodes.append(helper.make_node(op, inputs, [self.written[key]], name=self.written[key], **attributes))
    return self.written[key]

  def constant(self, array: np.ndarray, name: str = "constant") -> str:
    """Adds an initialiser with this content, unless there is one, and returns its name."""
    array = np.ascontiguousarray(array)
    key = name, array.dtype, array.shape, array.tobytes()
    if key not in self.written:
      namesakes = sum(i.name.split(":")[0] == name for i in self.initialisers)
      self.written[key] = f"{name}:{namesakes}" if namesakes else name
      self.initialisers.append(numpy_helper.from_array(array, self.written[key]))
    return self.written[key]

  def array(self, name: str) -> np.ndarray | None:
    """The content of the initialiser of this name; None if there is none."""
    return next((numpy_helper.to_array(i) for i in self.initialisers if i.name == name), None)

  def drop_unused(self) -> None:
    """Takes out the nodes and initialisers that nothing uses; the last node is the graph's output."""
    used = set()
    for node in reversed(self.nodes):
      if node is self.nodes[-1] or used & set(node.output):
        used.update(node.input)
    self.nodes = [node for node in self.nodes if node is self.nodes[-1] or used & set(node.output)]
    self.initialisers = [i for i in self.initialisers if i.name in used]

  def integers(self, values: Iterable[int]) -> str:
    """The name of an initialiser that holds these integers."""
    return self.constant(np.asarray(values, np.int64))

  def stored(self, value: Tensor | Constant, order: tuple[int, ...]) -> str:
    """The name of a tensor that stores the axes of `value` in this order."""
    if isinstance(value, Constant):
      return self.constant(value.array.transpose(order), value.name)
    if value.order == order:
      return value.name
    return self.add("Transpose", value.name, perm=[value.order.index(axis) for axis in order])

  def plain(self, value: Tensor | Constant) -> str:
    """The name of a tensor that stores the axes of `value` in JAX's order."""
    return self.stored(value, as_is(value.array.ndim if isinstance(value, Constant) else len(value.order)))


def as_is(ndim: int) -> tuple[int, ...]:
  """The order of axes that changes nothing."""
  return tuple(range(ndim))


def channels_first(spec: Any) -> tuple[int, ...]:
  """The order in which the model stores an input or output: (N, H, W, K) as (N, K, H, W), others unchanged."""
  return (0, 3, 1, 2) if spec.ndim == 4 else as_is(spec.ndim)


def static(*sizes: Any) -> bool:
  """Whether all sizes are numbers, none a symbol."""
  return all(isinstance(size, int | np.integer) for size in sizes)


def element_type(dtype: Any) -> int:
  """ONNX's number for a NumPy dtype."""
  return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def live_equations(jaxpr: Any) -> list:
  """The equations that the outputs depend on; a classifier also computes features, which the logits do not need."""
  needed, live = set(map(id, jaxpr.outvars)), []
  for eqn in reversed(jaxpr.eqns):
    if any(id(v) in needed for v in eqn.outvars):
      live.insert(0, eqn)
      needed.update(map(id, eqn.invars))
  return live


def unpacked(eqn: Any) -> Any | None:
  """The jaxpr that an equation wraps, or None; of one jaxpr per platform, the default."""
  if eqn.primitive.name in WRAPPERS:
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
  if eqn.primitive.name == "cond" and eqn.params.get("branches_platforms"):
    return eqn.params["branches"][eqn.params["branches_platforms"].index(None)]
  return None


def unsupported(eqn: Any) -> Refusal:
  """The error for an equation that no rule translates."""
  return Refusal(
    f"the ONNX export does not support the JAX primitive '{eqn.primitive.name}' as this net uses it; use --format"
    " stablehlo, which takes any net."
  )


# Rules: (graph, equation, *operands) -> the output of the equation, or a list of them if the primitive has several.


def elementwise(*ops: str) -> Callable:
  """A rule that applies ONNX operators in turn, the first to all operands, stored in the first tensor's order."""

  def rule(graph, eqn, *operands):
    ndim = eqn.outvars[0].aval.ndim
    order = next((o.order for o in operands if isinstance(o, Tensor) and len(o.order) == ndim), as_is(ndim))
    shapes = [np.shape(o.array) if isinstance(o, Constant) else o.order for o in operands]
    name = graph.add(ops[0], *(graph.stored(o, order if s else ()) for o, s in zip(operands, shapes, strict=True)))
    for op in ops[1:]:
      name = graph.add(op, name)
    return Tensor(name, order)

  return rule


def maximum(graph, eqn, x, y):
  zero = isinstance(y, Constant) and not y.array.shape and y.array == 0
  return elementwise("Relu")(graph, eqn, x) if zero else elementwise("Max")(graph, eqn, x, y)


def subtract(graph, eqn, x, y):
  if not isinstance(y, Constant):
    return elementwise("Sub")(graph, eqn, x, y)
  return elementwise("Add")(graph, eqn, x, y._replace(array=-y.array))  # runtimes fuse this into a convolution


def square(graph, eqn, x):
  return elementwise("Mul")(graph, eqn, x, x)


def integer_pow(graph, eqn, x):
  return elementwise("Pow")(graph, eqn, x, Constant(np.asarray(eqn.params["y"], eqn.invars[0].aval.dtype)))


def round_to_even(graph, eqn, x):
  if eqn.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
    raise unsupported(eqn)
  return elementwise("Round")(graph, eqn, x)


def select(graph, eqn, which, *cases):
  if eqn.invars[0].aval.dtype != bool:
    raise unsupported(eqn)
  return elementwise("Where")(graph, eqn, which, *reversed(cases))


def clamp(graph, eqn, low, x, high):
  return elementwise("Min")(graph, eqn, elementwise("Max")(graph, eqn, x, low), high)


def cast(graph, eqn, x):
  return Tensor(graph.add("Cast", x.name, to=element_type(eqn.params["new_dtype"])), x.order)


def same(graph, eqn, x):
  return x


def transpose(graph, eqn, x):
  return Tensor(x.name, tuple(eqn.params["permutation"].index(axis) for axis in x.order))


def reshape(graph, eqn, x):
  return reshaped(graph, eqn, x, eqn.outvars[0].aval.shape)


def reshaped(graph, eqn, x, shape):
  sizes = [size if static(size) else -1 for size in shape]
  if sizes.count(-1) > 1:
    raise unsupported(eqn)
  return Tensor(graph.add("Reshape", graph.plain(x), graph.integers(sizes)), as_is(len(shape)))


def broadcast_in_dim(graph, eqn, x):
  """Inserts the missing axes with size 1, then expands; the batch size is read from the input."""
  shape = eqn.params["shape"]
  have = dict(zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True))
  inserted = tuple(have.get(axis, 1) for axis in range(len(shape)))
  x = x if len(have) == len(shape) else reshaped(graph, eqn, x, inserted)
  if inserted == tuple(shape):
    return x
  missing = [1 if old == new else new for old, new in zip(inserted, shape, strict=True)]
  if any(not static(size) and size != graph.batch for size in missing):
    raise unsupported(eqn)

  def size_of(size):
    return graph.integers([size]) if static(size) else graph.add("Shape", graph.first, start=0, end=1)

  sizes = graph.add("Concat", *map(size_of, missing), axis=0)
  return Tensor(graph.add("Expand", graph.plain(x), sizes), as_is(len(shape)))


def sliced(graph, x, axes, starts, ends, steps):
  """x[starts[i] : ends[i] : steps[i]] along each of the axes."""
  vectors = starts, ends, [x.order.index(axis) for axis in axes], steps
  return Tensor(graph.add("Slice", x.name, *map(graph.integers, vectors)), x.order)


def static_slice(graph, eqn, x):
  have, ends = eqn.invars[0].aval.shape, eqn.params["limit_indices"]
  steps = eqn.params["strides"] or (1,) * len(have)
  every = zip(range(len(have)), eqn.params["start_indices"], ends, steps, strict=True)
  cuts = [(axis, *cut) for axis, *cut in every if cut != [0, have[axis], 1]]
  if not static(*(end for _, _, end, _ in cuts)):
    raise unsupported(eqn)
  return sliced(graph, x, *zip(*cuts, strict=True)) if cuts else x


def split(graph, eqn, x):
  axis, sizes = eqn.params["axis"], eqn.params["sizes"]
  ends = np.cumsum(sizes)
  return [sliced(graph, x, [axis], [end - size], [end], [1]) for size, end in zip(sizes, ends, strict=True)]


def reverse(graph, eqn, x):
  axes = eqn.params["dimensions"]
  return sliced(graph, x, axes, [-1] * len(axes), [-(2**31)] * len(axes), [-1] * len(axes))


def gather(graph, eqn, x, index):
  """Rows of a table, and the gathers that NumPy-style indexing becomes when the batch size is symbolic."""
  numbers, sizes, have = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
  axes, kept = numbers.start_index_map, numbers.offset_dims
  rest = tuple(axis for axis in range(len(have)) if axis not in axes)
  simple = not numbers.operand_batching_dims and eqn.params["mode"] != jax.lax.GatherScatterMode.CLIP
  if not simple or any(sizes[axis] != have[axis] for axis in rest):
    raise unsupported(eqn)
  if isinstance(index, Constant) and index.array.ndim == 1:  # the same slice of every sample
    starts = index.array.tolist()
    ends = [start + sizes[axis] for start, axis in zip(starts, axes, strict=True)]
    x = sliced(graph, x, axes, starts, ends, [1] * len(axes))
    return reshape(graph, eqn, x) if numbers.collapsed_slice_dims else x
  if tuple(sorted(axes)) != tuple(numbers.collapsed_slice_dims):
    raise unsupported(eqn)
  index = graph.add("Cast", graph.plain(index), to=element_type(np.int64))
  leading = tuple(axis for axis in range(eqn.outvars[0].aval.ndim) if axis not in kept)
  return Tensor(graph.add("GatherND", graph.stored(x, (*axes, *rest)), index), (*leading, *kept))


def concatenate(graph, eqn, *parts):
  order = next(part.order for part in parts if isinstance(part, Tensor))
  names = [graph.stored(part, order) for part in parts]
  return Tensor(graph.add("Concat", *names, axis=order.index(eqn.params["dimension"])), order)


def pad(graph, eqn, x, value):
  before, after, between = zip(*(eqn.params["padding_config"][axis] for axis in x.order), strict=True)
  if any(between):
    raise unsupported(eqn)
  return Tensor(graph.add("Pad", x.name, graph.integers([*before, *after]), graph.plain(value)), x.order)


def reduction(op: str) -> Callable:
  """A rule that reduces some axes by an ONNX operator."""

  def rule(graph, eqn, x):
    gone = eqn.params["axes"]
    left = [axis for axis in x.order if axis not in gone]
    name = graph.add(op, x.name, graph.integers([x.order.index(axis) for axis in gone]), keepdims=0)
    return Tensor(name, tuple(sorted(left).index(axis) for axis in left))

  return rule


def pool(graph, eqn, op, x, **attributes):
  """Pooling of (N, ..., K) over the axes between the first and the last."""
  p, order = eqn.params, (0, len(x.order) - 1, *range(1, len(x.order) - 1))
  windows, strides, padding = ([p[k][a] for a in order] for k in ("window_dimensions", "window_strides", "padding"))
  dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
  if dilated or windows[:2] != [1, 1] or strides[:2] != [1, 1] or any(map(any, padding[:2])):
    raise unsupported(eqn)
  before, after = zip(*padding[2:], strict=True)
  how = {"kernel_shape": windows[2:], "strides": strides[2:], "pads": [*before, *after], **attributes}
  return Tensor(graph.add(op, graph.stored(x, order), **how), order)


def max_pool(graph, eqn, x):
  return pool(graph, eqn, "MaxPool", x)


def sum_pool(graph, eqn, x):
  count = Constant(np.asarray(np.prod(eqn.params["window_dimensions"]), eqn.invars[0].aval.dtype))
  return elementwise("Mul")(graph, eqn, pool(graph, eqn, "AveragePool", x, count_include_pad=1), count)


def convolution(graph, eqn, x, w):
  """A convolution; with a dilated input it is a ConvTranspose, for which ONNX rotates the kernel by 180 degrees."""
  p, layout = eqn.params, eqn.params["dimension_numbers"]
  x, plain_input = graph.stored(x, layout.lhs_spec), all(d == 1 for d in p["lhs_dilation"])
  before, after = zip(*p["padding"], strict=True)
  if plain_input and p["batch_group_count"] == 1:
    how = {"strides": p["window_strides"], "pads": [*before, *after], "group": p["feature_group_count"]}
    name = graph.add("Conv", x, graph.stored(w, layout.rhs_spec), dilations=p["rhs_dilation"], **how)
    return Tensor(name, layout.out_spec)
  out_axis, in_axis, *spatial = layout.rhs_spec
  reach = [d * (eqn.invars[1].aval.shape[axis] - 1) for d, axis in zip(p["rhs_dilation"], spatial, strict=True)]
  pads = [r - given for side in (before, after) for r, given in zip(reach, side, strict=True)]
  groups = max(p["feature_group_count"], p["batch_group_count"])
  if groups > 1 or any(s != 1 for s in p["window_strides"]) or min(pads) < 0 or isinstance(w, Tensor):
    raise unsupported(eqn)
  rotated = graph.constant(np.flip(w.array, spatial).transpose(in_axis, out_axis, *spatial), w.name)
  name = graph.add("ConvTranspose", x, rotated, strides=p["lhs_dilation"], pads=pads, dilations=p["rhs_dilation"])
  return Tensor(name, layout.out_spec)


def dot_general(graph, eqn, x, y):
  ((over_x, over_y), (along_x, along_y)), ndims = eqn.params["dimension_numbers"], [v.aval.ndim for v in eqn.invars]
  x, y, order = graph.plain(x), graph.plain(y), as_is(eqn.outvars[0].aval.ndim)
  if not along_x and over_x == (ndims[0] - 1,) and over_y == (0,) and ndims[1] == 2:
    return Tensor(graph.add("MatMul", x, y), order)
  letters = iter("abcdefghijklmnopqrstuvwxyz")
  of_x = [next(letters) for _ in range(ndims[0])]
  common = dict(zip((*along_y, *over_y), (of_x[axis] for axis in (*along_x, *over_x)), strict=True))
  of_y = [common[axis] if axis in common else next(letters) for axis in range(ndims[1])]
  shared = [of_x[axis] for axis in along_x]
  free = [letter for letter in of_x + of_y if (letter in of_x) != (letter in of_y)]
  return Tensor(graph.add("Einsum", x, y, equation=f"{''.join(of_x)},{''.join(of_y)}->{''.join(shared + free)}"), order)


SAME_NAME = "abs add and ceil cos div erf exp floor log min mul neg not or pow sign sin sqrt tanh"
RULES = {
  **{name: elementwise(name.capitalize()) for name in SAME_NAME.split()},
  "broadcast_in_dim": broadcast_in_dim,
  "clamp": clamp,
  "concatenate": concatenate,
  "conv_general_dilated": convolution,
  "convert_element_type": cast,
  "copy": same,
  "dot_general": dot_general,
  "eq": elementwise("Equal"),
  "gather": gather,
  "ge": elementwise("GreaterOrEqual"),
  "gt": elementwise("Greater"),
  "integer_pow": integer_pow,
  "le": elementwise("LessOrEqual"),
  "logistic": elementwise("Sigmoid"),
  "lt": elementwise("Less"),
  "max": maximum,
  "name": same,
  "ne": elementwise("Equal", "Not"),
  "pad": pad,
  "reduce_max": reduction("ReduceMax"),
  "reduce_min": reduction("ReduceMin"),
  "reduce_sum": reduction("ReduceSum"),
  "reduce_window_max": max_pool,
  "reduce_window_sum": sum_pool,
  "reshape": reshape,
  "rev": reverse,
  "round": round_to_even,
  "rsqrt": elementwise("Sqrt", "Reciprocal"),
  "select_n": select,
  "slice": static_slice,
  "split": split,
  "square": square,
  "squeeze": reshape,
  "stop_gradient": same,
  "sub": subtract,
  "transpose": transpose,
}
