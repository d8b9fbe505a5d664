"""A JAX function of arrays as an ONNX graph: its jaxpr, one equation after another.

What depends on constants alone (weights, running statistics, shapes) is computed here by JAX and folded in. ONNX has
channels first and JAX nets have them last, so a tensor of the graph remembers in which order it holds the axes of its
array: a transposition is then mostly a change of that note, and no node.
"""

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
  """A tensor of the graph: axis i of it is axis order[i] of the array that it stands for."""

  name: str
  order: tuple[int, ...]


class Constant(NamedTuple):
  """An array known now, and the weight that it came from, by whose name the graph will call it."""

  array: Any
  name: str = "constant"


def build(function, variables, inputs, output, metadata):
  """The ONNX model of function(variables, *inputs) -> array for any batch size; checked by onnx.checker.

  `inputs` is {name: (shape of one sample, dtype)}, `output` the name of the result, `metadata` {str: str}. Every (N, H,
  W, K) among inputs and output is (N, K, H, W) in the model.

  Raises:
    Refusal: names the JAX primitive that has no counterpart here.
  """
  (batch,) = jax.export.symbolic_shape("batch")
  specs = {name: jax.ShapeDtypeStruct((batch, *shape), dtype) for name, (shape, dtype) in inputs.items()}
  closed, result = jax.make_jaxpr(function, return_shape=True)(variables, *specs.values())
  weights = [
    Constant(np.asarray(leaf), ".".join(str(part.key) for part in path))
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  ]
  graph = Graph(batch, next(iter(specs)))
  tensors = [Tensor(name, channels_first(spec)) for name, spec in specs.items()]
  (value,) = graph.walk(closed.jaxpr, closed.consts, [*weights, *tensors])
  graph.nodes.append(helper.make_node("Identity", [graph.stored(value, channels_first(result))], [output]))

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
    raise Refusal(f"ONNX does not accept the graph ({reason}); --format stablehlo takes every net.") from error
  return model


class Graph:
  """The nodes and initialisers written so far. `batch` is the one symbolic size, read off the input `first`."""

  def __init__(self, batch, first):
    self.batch, self.first = batch, first
    self.nodes, self.initialisers, self.written = [], [], {}

  def walk(self, jaxpr, consts, args):
    """The outputs of a jaxpr, each a Tensor or a Constant, given its inputs as such."""
    known = dict(zip(jaxpr.constvars, (Constant(np.asarray(c)) for c in consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    read = lambda atom: Constant(np.asarray(atom.val, atom.aval.dtype)) if isinstance(atom, Literal) else known[atom]
    for eqn in live_equations(jaxpr):
      known.update(zip(eqn.outvars, self.results(eqn, [read(atom) for atom in eqn.invars]), strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  def results(self, eqn, operands):
    """What an equation gives: by unpacking it, by computing it now, or by its rule."""
    name, many = eqn.primitive.name, eqn.primitive.multiple_results
    if name == "platform_index":
      return [None]  # the choice is made in `unpacked`
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
      raise cannot(eqn)
    result = RULES[name](self, eqn, *operands)
    return result if many else [result]

  def add(self, op, *inputs, **attributes):
    """The name of the one output of a node; a node that is there already serves again."""
    key = op, inputs, str(attributes)
    if key not in self.written:
      self.written[key] = f"{op}_{len(self.nodes)}"
      self.nodes.append(helper.make_node(op, inputs, [self.written[key]], name=self.written[key], **attributes))
    return self.written[key]

  def constant(self, array, name="constant"):
    """The name of an initialiser with this content."""
    array = np.ascontiguousarray(array)
    key = name, array.dtype, array.shape, array.tobytes()
    if key not in self.written:
      namesakes = sum(i.name.split(":")[0] == name for i in self.initialisers)
      self.written[key] = f"{name}:{namesakes}" if namesakes else name
      self.initialisers.append(numpy_helper.from_array(array, self.written[key]))
    return self.written[key]

  def integers(self, values):
    return self.constant(np.asarray(values, np.int64))

  def stored(self, value, order):
    """The name of a tensor that holds `value` with its axes in `order`."""
    if isinstance(value, Constant):
      return self.constant(value.array.transpose(order), value.name)
    if value.order == order:
      return value.name
    return self.add("Transpose", value.name, perm=[value.order.index(axis) for axis in order])

  def plain(self, value):
    """The name of a tensor that holds `value` with its axes as JAX has them."""
    return self.stored(value, as_is(value.array.ndim if isinstance(value, Constant) else len(value.order)))


def as_is(ndim):
  return tuple(range(ndim))


def channels_first(spec):
  return (0, 3, 1, 2) if spec.ndim == 4 else as_is(spec.ndim)


def static(*sizes):
  return all(isinstance(size, int | np.integer) for size in sizes)


def element_type(dtype):
  return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def live_equations(jaxpr):
  """The equations that the outputs need: of a classifier's outputs only the logits are asked for."""
  needed, live = set(map(id, jaxpr.outvars)), []
  for eqn in reversed(jaxpr.eqns):
    if any(id(v) in needed for v in eqn.outvars):
      live.insert(0, eqn)
      needed.update(map(id, eqn.invars))
  return live


def unpacked(eqn):
  """The jaxpr that an equation merely wraps, or None; of several for several platforms the one for all others."""
  if eqn.primitive.name in WRAPPERS:
    return eqn.params["call_jaxpr" if "call_jaxpr" in eqn.params else "jaxpr"]
  if eqn.primitive.name == "cond" and eqn.params.get("branches_platforms"):
    return eqn.params["branches"][eqn.params["branches_platforms"].index(None)]
  return None


def cannot(eqn):
  return Refusal(
    f"the net uses the JAX primitive '{eqn.primitive.name}' in a way that has no ONNX form here; --format stablehlo"
    " takes every net."
  )


# Rules: (graph, equation, operands) -> what the equation gives, a list where the primitive gives several.


def elementwise(*ops):
  """Applies ONNX operators in turn, the first to all operands, in the order of axes of the first that has one."""

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
  return elementwise("Add")(graph, eqn, x, y._replace(array=-y.array))  # which runtimes melt into a convolution


def square(graph, eqn, x):
  return elementwise("Mul")(graph, eqn, x, x)


def integer_pow(graph, eqn, x):
  return elementwise("Pow")(graph, eqn, x, Constant(np.asarray(eqn.params["y"], eqn.invars[0].aval.dtype)))


def select(graph, eqn, which, *cases):
  if eqn.invars[0].aval.dtype != bool:
    raise cannot(eqn)
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
    raise cannot(eqn)
  return Tensor(graph.add("Reshape", graph.plain(x), graph.integers(sizes)), as_is(len(shape)))


def broadcast_in_dim(graph, eqn, x):
  """Axes of size 1 where there are none yet, then as often as asked; the batch size is read off the input."""
  shape, have = (
    eqn.params["shape"],
    dict(zip(eqn.params["broadcast_dimensions"], eqn.invars[0].aval.shape, strict=True)),
  )
  shown = tuple(have.get(axis, 1) for axis in range(len(shape)))
  x = x if len(have) == len(shape) else reshaped(graph, eqn, x, shown)
  if shown == tuple(shape):
    return x
  missing = [1 if old == new else new for old, new in zip(shown, shape, strict=True)]
  if any(not static(size) and size != graph.batch for size in missing):
    raise cannot(eqn)
  size_of = lambda size: graph.integers([size]) if static(size) else graph.add("Shape", graph.first, start=0, end=1)
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
    raise cannot(eqn)
  return sliced(graph, x, *zip(*cuts, strict=True)) if cuts else x


def split(graph, eqn, x):
  axis, sizes = eqn.params["axis"], eqn.params["sizes"]
  ends = np.cumsum(sizes)
  return [sliced(graph, x, [axis], [end - size], [end], [1]) for size, end in zip(sizes, ends, strict=True)]


def reverse(graph, eqn, x):
  axes = eqn.params["dimensions"]
  return sliced(graph, x, axes, [-1] * len(axes), [-(2**31)] * len(axes), [-1] * len(axes))


def gather(graph, eqn, x, index):
  """Rows of tables, and what indexing like NumPy's becomes where the batch size is symbolic."""
  numbers, sizes, have = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
  axes, kept = numbers.start_index_map, numbers.offset_dims
  rest = tuple(axis for axis in range(len(have)) if axis not in axes)
  usual = not numbers.operand_batching_dims and eqn.params["mode"] != jax.lax.GatherScatterMode.CLIP
  if not usual or any(sizes[axis] != have[axis] for axis in rest):
    raise cannot(eqn)
  if isinstance(index, Constant) and index.array.ndim == 1:  # one and the same slice of every sample
    starts = index.array.tolist()
    ends = [start + sizes[axis] for start, axis in zip(starts, axes, strict=True)]
    x = sliced(graph, x, axes, starts, ends, [1] * len(axes))
    return reshape(graph, eqn, x) if numbers.collapsed_slice_dims else x
  if tuple(sorted(axes)) != tuple(numbers.collapsed_slice_dims):
    raise cannot(eqn)
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
    raise cannot(eqn)
  return Tensor(graph.add("Pad", x.name, graph.integers([*before, *after]), graph.plain(value)), x.order)


def reduction(op):
  def rule(graph, eqn, x):
    gone = eqn.params["axes"]
    left = [axis for axis in x.order if axis not in gone]
    name = graph.add(op, x.name, graph.integers([x.order.index(axis) for axis in gone]), keepdims=0)
    return Tensor(name, tuple(sorted(left).index(axis) for axis in left))

  return rule


def pool(graph, eqn, op, x, **attributes):
  """Pooling of (N, ..., K) over what lies between."""
  p, order = eqn.params, (0, len(x.order) - 1, *range(1, len(x.order) - 1))
  windows, strides, padding = ([p[k][a] for a in order] for k in ("window_dimensions", "window_strides", "padding"))
  dilated = any(d != 1 for d in (*p["base_dilation"], *p["window_dilation"]))
  if dilated or windows[:2] != [1, 1] or strides[:2] != [1, 1] or any(map(any, padding[:2])):
    raise cannot(eqn)
  before, after = zip(*padding[2:], strict=True)
  how = {"kernel_shape": windows[2:], "strides": strides[2:], "pads": [*before, *after], **attributes}
  return Tensor(graph.add(op, graph.stored(x, order), **how), order)


def max_pool(graph, eqn, x):
  return pool(graph, eqn, "MaxPool", x)


def sum_pool(graph, eqn, x):
  count = Constant(np.asarray(np.prod(eqn.params["window_dimensions"]), eqn.invars[0].aval.dtype))
  return elementwise("Mul")(graph, eqn, pool(graph, eqn, "AveragePool", x, count_include_pad=1), count)


def convolution(graph, eqn, x, w):
  """A convolution; of a dilated input a transposed one, whose kernel ONNX turns by 180 degrees."""
  p, layout = eqn.params, eqn.params["dimension_numbers"]
  x, plain_input = graph.stored(x, layout.lhs_spec), all(d == 1 for d in p["lhs_dilation"])
  before, after = zip(*p["padding"], strict=True)
  if plain_input and p["batch_group_count"] == 1:
    how = {"strides": p["window_strides"], "pads": [*before, *after], "group": p["feature_group_count"]}
    name = graph.add("Conv", x, graph.stored(w, layout.rhs_spec), dilations=p["rhs_dilation"], **how)
    return Tensor(name, layout.out_spec)
  outof, into, *spatial = layout.rhs_spec
  reach = [d * (eqn.invars[1].aval.shape[axis] - 1) for d, axis in zip(p["rhs_dilation"], spatial, strict=True)]
  pads = [r - given for side in (before, after) for r, given in zip(reach, side, strict=True)]
  groups = max(p["feature_group_count"], p["batch_group_count"])
  if groups > 1 or any(s != 1 for s in p["window_strides"]) or min(pads) < 0 or isinstance(w, Tensor):
    raise cannot(eqn)
  turned = graph.constant(np.flip(w.array, spatial).transpose(into, outof, *spatial), w.name)
  name = graph.add("ConvTranspose", x, turned, strides=p["lhs_dilation"], pads=pads, dilations=p["rhs_dilation"])
  return Tensor(name, layout.out_spec)


def dot_general(graph, eqn, x, y):
  ((over_x, over_y), (along_x, along_y)), ndims = eqn.params["dimension_numbers"], [v.aval.ndim for v in eqn.invars]
  x, y, order = graph.plain(x), graph.plain(y), as_is(eqn.outvars[0].aval.ndim)
  if not along_x and over_x == (ndims[0] - 1,) and over_y == (0,) and ndims[1] == 2:
    return Tensor(graph.add("MatMul", x, y), order)
  letters = iter("abcdefghijklmnopqrstuvwxyz")
  of_x = [next(letters) for _ in range(ndims[0])]
  met = dict(zip((*along_y, *over_y), (of_x[axis] for axis in (*along_x, *over_x)), strict=True))
  of_y = [met[axis] if axis in met else next(letters) for axis in range(ndims[1])]
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
  "ne": elementwise("Equal", "Not"),
  "pad": pad,
  "reduce_max": reduction("ReduceMax"),
  "reduce_min": reduction("ReduceMin"),
  "reduce_sum": reduction("ReduceSum"),
  "reduce_window_max": max_pool,
  "reduce_window_sum": sum_pool,
  "reshape": reshape,
  "rev": reverse,
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
