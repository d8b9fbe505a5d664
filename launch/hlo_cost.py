"""Cost per chip of one run of a compiled TPU program: FLOPs, HBM traffic and collectives, every loop iteration counted.

XLA's own cost analysis counts the body of a loop once. This module walks the text of the optimised program instead,
from the entry through loops, whose trip counts are read from their conditions. Traffic is what fusions and other
instructions read from and write to HBM, in whole tiles of their layouts; arrays that the compiler keeps in the chip's
vector memory (memory space 1) cost nothing. FLOPs are those of convolutions and matrix products, without the taps that
fall on padding.
"""

import collections
import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
WITHIN = {"fusion", "call", "async-start", "conditional"}  # of the computations they call, FLOPs count, not traffic
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)(?::([^{}]*))?\})?")
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Shape:
  """One array: its element type, dimensions, layout (minor dimension first), tile and memory space."""

  kind: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  space: int = 0

  @property
  def bytes(self) -> int:
    return math.prod(self.dims) * bits(self.kind) // 8

  @property
  def traffic(self) -> int:
    """Bytes of HBM that reading or writing all of it touches; 0 for an array in another memory."""
    if self.space or self.kind == "token":
      return 0
    major_first = [self.dims[i] for i in reversed(self.minor_to_major)]
    missing = len(self.tile) - len(major_first)
    padded = [1] * missing + major_first
    for place, size in enumerate(reversed(self.tile), start=1):
      padded[-place] = -(-padded[-place] // size) * size
    return math.prod(padded) * bits(self.kind) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation; `shapes` are those of its result, `text` starts with its operands."""

  name: str
  shapes: tuple[Shape, ...]
  op: str
  operands: tuple[str, ...]
  text: str

  def attribute(self, key: str) -> str | None:
    """The value of key=value in the line."""
    found = re.search(rf"\b{key}=%?([^\s,]+)", self.text)
    return found and found.group(1)


@dataclasses.dataclass
class Cost:
  """Per chip: FLOPs, bytes of HBM traffic, and {kind of collective: [count, bytes]}."""

  flops: float = 0.0
  traffic: float = 0.0
  collectives: dict = dataclasses.field(default_factory=lambda: collections.defaultdict(lambda: [0, 0]))

  def add(self, other: "Cost", times: int = 1, traffic: bool = True) -> None:
    """Adds `times` the cost of another program, with or without its traffic."""
    self.flops += times * other.flops
    self.traffic += times * other.traffic * traffic
    for kind, (count, size) in other.collectives.items():
      self.collectives[kind][0] += times * count
      self.collectives[kind][1] += times * size


def bits(kind: str) -> int:
  """Bits of one element of a type."""
  return BITS[kind] if kind in BITS else int(re.sub(r"\D*(\d+).*", r"\1", kind))


def program_cost(text: str, loops_once: bool = False) -> Cost:
  """The `Cost` of one run of an optimised HLO module given as text; `loops_once` counts as XLA's cost analysis does.

  Raises:
    ValueError: the trip count of a loop cannot be determined.
  """
  computations, entry = parse(text)

  @functools.cache
  def cost(name):
    total, body = Cost(), computations[name]
    for instruction in body.values():
      if instruction.op == "while":
        times = 1 if loops_once else trip_count(instruction, computations)
        total.add(cost(instruction.attribute("body")), times)
        continue
      called = re.findall(r"(?:calls|to_apply)=%([^\s,]+)", instruction.text)
      if instruction.op in WITHIN:
        for inner in called:
          total.add(cost(inner), traffic=instruction.op == "call")
      if instruction.op in ("convolution", "dot"):
        total.flops += product_flops(instruction, body)
      kind = instruction.op.removesuffix("-start")
      if kind in COLLECTIVES:
        sent = sum(shape.bytes for name in instruction.operands for shape in body[name].shapes)
        received = sent if kind == "all-reduce" else sum(shape.bytes for shape in instruction.shapes)
        total.collectives[kind][0] += 1
        total.collectives[kind][1] += max(sent, received if kind == instruction.op else received - sent)
      if instruction.op != "call":
        total.traffic += instruction_traffic(instruction, body, computations)
    return total

  return cost(entry)


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  """({computation: {name: Instruction}}, name of the entry)."""
  computations, entry, current = {}, None, None
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
    if head:
      current = computations[head.group(2)] = {}
      entry = head.group(2) if head.group(1) else entry
    elif current is not None and (found := INSTRUCTION.match(line)):
      name, result, op, rest = found.groups()
      arguments = rest[: _closing(rest)]
      current[name] = Instruction(name, shapes(result), op, tuple(re.findall(r"%([^\s,()]+)", arguments)), rest)
  return computations, entry


def _closing(text):
  """The index of the parenthesis that closes the one opened before `text`."""
  depth = 1
  for place, character in enumerate(text):
    depth += (character == "(") - (character == ")")
    if not depth:
      return place
  return len(text)


@functools.lru_cache(maxsize=100_000)
def shapes(text: str) -> tuple[Shape, ...]:
  """All arrays of a result type, tuples flattened."""
  found = []
  for kind, dims, order, rest in SHAPE.findall(re.sub(r"/\*.*?\*/", "", text)):
    tile = re.search(r"T\(([\d,]*)\)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    tile, space = tile.group(1) if tile else "", int(space.group(1)) if space else 0
    found.append(Shape(kind, _numbers(dims), _numbers(order), _numbers(tile), space))
  return tuple(found)


def _numbers(text):
  return tuple(int(number) for number in text.split(",") if number)


def trip_count(loop: Instruction, computations: dict[str, dict[str, Instruction]]) -> int:
  """How often a counted loop runs: its condition compares a counter that starts at 0 with a constant.

  Raises:
    ValueError: the condition has no or several constants.
  """
  condition = computations[loop.attribute("condition")]
  limits = [i for i in condition.values() if i.op == "constant" and i.shapes[0].kind in ("s32", "u32")]
  if len(limits) != 1:
    raise ValueError(f"the trip count of loop %{loop.name} cannot be determined from its condition")
  return int(limits[0].text.split(")")[0])


def product_flops(instruction: Instruction, body: dict[str, Instruction]) -> float:
  """2 x multiplications of a convolution (on TPUs, matrix products too), without those on padding."""
  left, right = (body[name].shapes[0].dims for name in instruction.operands[:2])
  (out,) = instruction.shapes
  if instruction.op == "dot":
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.text).group(1)
    return 2 * math.prod(out.dims) * math.prod(left[int(d)] for d in contracted.split(",") if d)
  lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text).groups()
  window = re.search(r"window=\{([^}]*)\}", instruction.text)
  window = dict(part.split("=") for part in window.group(1).split()) if window else {}
  spatial = [label for label in lhs if label.isdigit()]

  def per_dimension(key, default):
    return window[key].split("x") if key in window else [default] * len(spatial)

  flops = 2 * out.dims[result.index("b")] * out.dims[result.index("f")] * right[rhs.index("i")]
  defaults = {"stride": "1", "pad": "0_0", "lhs_dilate": "1", "rhs_dilate": "1"}
  settings = [per_dimension(key, default) for key, default in defaults.items()]
  for label, stride, pad, lhs_dilate, rhs_dilate in zip(sorted(spatial), *settings, strict=True):
    flops *= valid_taps(
      left[lhs.index(label)],
      right[rhs.index(label)],
      out.dims[result.index(label)],
      int(stride),
      int(pad.split("_")[0]),
      int(lhs_dilate),
      int(rhs_dilate),
    )
  groups = instruction.attribute("batch_group_count")
  return flops / int(groups) if groups else flops


@functools.cache
def valid_taps(size: int, kernel: int, out: int, stride: int, low: int, lhs_dilate: int, rhs_dilate: int) -> int:
  """How many kernel taps, over all output positions of one dimension, fall on an element of the input."""
  end = (size - 1) * lhs_dilate
  positions = (o * stride - low + k * rhs_dilate for o in range(out) for k in range(kernel))
  return sum(0 <= place <= end and place % lhs_dilate == 0 for place in positions)


def instruction_traffic(
  instruction: Instruction, body: dict[str, Instruction], computations: dict[str, dict[str, Instruction]]
) -> int:
  """Bytes of HBM that an instruction reads and writes."""
  op = instruction.op
  if op in FREE or op == "while" or op.endswith("-done") or op == "conditional":
    return 0
  if op in ("copy-start", "slice-start"):  # the result is (destination, source, context), the other way for a slice
    moved = min(instruction.shapes[:2], key=lambda shape: shape.bytes)
    return sum(dataclasses.replace(moved, space=shape.space).traffic for shape in instruction.shapes[:2])
  if op == "dynamic-slice":
    return 2 * sum(shape.traffic for shape in instruction.shapes)
  inputs = [body[name].shapes for name in instruction.operands]
  if op == "dynamic-update-slice":
    return 2 * sum(shape.traffic for shape in inputs[1])
  if op == "fusion":
    return fusion_traffic(instruction, inputs, computations[instruction.attribute("calls")])
  if op.removesuffix("-start") in COLLECTIVES and op.endswith("-start"):
    return 2 * sum(shape.traffic for operand in inputs for shape in operand)
  return sum(shape.traffic for operand in (*inputs, instruction.shapes) for shape in operand)


def fusion_traffic(instruction: Instruction, inputs: list[tuple[Shape, ...]], inner: dict[str, Instruction]) -> int:
  """Bytes of HBM of a fusion: operands and result once; of arrays that it only slices or updates, the slice."""
  total = 0
  parameters = [i for i in inner.values() if i.op == "parameter"]
  updated = set()
  for parameter in parameters:
    number = int(parameter.text.split(")")[0])
    users = [i for i in inner.values() if parameter.name in i.operands]
    if users and all(u.op == "dynamic-slice" and u.operands[0] == parameter.name for u in users):
      whole = inputs[number][0]
      total += sum(dataclasses.replace(u.shapes[0], space=whole.space).traffic for u in users)
    elif users and all(u.op == "dynamic-update-slice" and u.operands[0] == parameter.name for u in users):
      updates = [inner[u.operands[1]].shapes[0] for u in users]
      total += sum(dataclasses.replace(u, space=inputs[number][0].space).traffic for u in updates)
      updated |= {(u.shapes[0].kind, u.shapes[0].dims) for u in users}
    else:
      total += sum(shape.traffic for shape in inputs[number])
  return total + sum(shape.traffic for shape in instruction.shapes if (shape.kind, shape.dims) not in updated)
