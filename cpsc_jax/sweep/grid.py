"""Which keys of a config a sweep varies, and over which values.

  GRID  = AXIS;AXIS;...            every combination of what the axes say
  AXIS  = KEY=VALUE,VALUE,...      a few values, such as student.lr=0.05,0.1
        | KEY=log(LOW..HIGH)       a range of numbers, drawn evenly by their logarithm
        | KEY=even(LOW..HIGH)      the same, drawn evenly
  KEY   = a dotted key of the config, or KEY+KEY+...: keys that take the same value

Ranges are for searches, which draw from them. Several grids are a union: members of any of them. The config itself,
with none of its keys changed, is always one of the points: its name is BASE.
"""

import dataclasses
import difflib
import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np

from cpsc_jax import schema
from cpsc_jax.errors import Refusal

BASE = "base"
FORM = "a grid looks like 'loss.generator.scl=0,0.7,2;generator.conditional=true,false'"
LONGEST_NAME = 80
MOST_POINTS = 10_000
# Keys that cannot vary, by how their names begin, and why.
FIXED = {
  "name": "members are called by what they vary",
  "seed": "--seeds says how many seeds each point has",
  "task": "the tasks have different keys; make a sweep of each",
  "method": "the methods have different keys; make a sweep of each",
  "dataset.": "all members have one data set; make a sweep of each",
  "evaluate.": "all members are measured alike; set it for all of them with --config.KEY=VALUE",
  "checkpoint.": "it changes nothing that a run finds",
}
_RANGE = re.compile(r"(log|even)\(([^()]*)\)")

Value = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class Range:
  """Numbers from `low` to `high`, both included, to draw from; whole ones for a key that is a whole number."""

  low: float
  high: float
  log: bool
  whole: bool

  def draw(self, rng: np.random.Generator) -> int | float:
    """One of them; other numbers than whole ones are rounded to four digits."""
    ends = [math.log(end) if self.log else end for end in (self.low, self.high)]
    drawn = rng.uniform(*ends)
    value = math.exp(drawn) if self.log else drawn
    return min(max(round(value) if self.whole else float(f"{value:.4g}"), self.low), self.high)


@dataclasses.dataclass(frozen=True)
class Axis:
  """Keys that take the same value, and the values: a few, or a range."""

  keys: tuple[str, ...]
  values: tuple[Value, ...] | Range


@dataclasses.dataclass(frozen=True)
class Point:
  """What a member's config has other than the sweep's: {dotted key: value}, under a name that can be a folder's."""

  name: str
  changes: Mapping[str, Value]


def parse(text: str, config: ml_collections.ConfigDict) -> tuple[Axis, ...]:
  """The axes of one grid.

  Raises:
    Refusal: what is malformed, a key that the config lacks or that cannot vary, a value that it cannot have.
  """
  axes: list[Axis] = []
  for part in text.split(";"):
    keys, equals, values = (piece.strip() for piece in part.partition("="))
    if not (keys and equals and values):
      raise Refusal(f"--grid has the part '{schema.shown(part)[1:-1]}', which is no KEY=VALUES; {FORM}.")
    names = tuple(key.strip() for key in keys.split("+"))
    for name in names:
      _check_key(name, config)
    taken = [name for axis in axes for name in axis.keys] + list(names)
    if twice := next((name for name in taken if taken.count(name) > 1), None):
      raise Refusal(f"--grid names {twice} twice; give all its values in one place, {twice}=VALUE,VALUE.")
    axes.append(Axis(names, _values(names, values, config)))
  return tuple(axes)


def _check_key(name: str, config: ml_collections.ConfigDict) -> None:
  flat = dict(schema.flatten(config))
  if name not in flat:
    near = [key for key in flat if key.endswith(f".{name}")] or difflib.get_close_matches(name, flat, 1, 0.5)
    section = [key for key in flat if key.startswith(f"{name}.")]
    hint = f" (it is a section; did you mean '{section[0]}'?)" if section else ""
    hint = hint or (f" (did you mean '{near[0]}'?)" if near else "")
    raise Refusal(f"the config has no key '{schema.shown(name)[1:-1]}'{hint}; docs/config.md and --help explain all.")
  for start, why in FIXED.items():
    if name == start or (start.endswith(".") and name.startswith(start)):
      raise Refusal(f"--grid cannot vary {name}: {why}.")
  if isinstance(flat[name], tuple | list):
    raise Refusal(f"--grid cannot vary {name}: its values are tuples, and a comma separates values; make sweeps of it.")


def _values(names: tuple[str, ...], text: str, config: ml_collections.ConfigDict) -> tuple[Value, ...] | Range:
  """What an axis says behind its "="; checked against all its keys."""
  key = "+".join(names)
  if "(" in text or ")" in text:
    found = _RANGE.fullmatch(text)
    ends = found[2].split("..") if found else []
    if len(ends) != 2:
      raise Refusal(f"--grid has {key}={schema.shown(text)[1:-1]}; a range looks like {key}=log(0.01..0.3).")
    low, high = (_value(names, end.strip(), config) for end in ends)
    if isinstance(low, bool | str):
      raise Refusal(f"--grid has a range for {key}, which is no number; give its values, {key}=VALUE,VALUE.")
    if not low < high or (found[1] == "log" and low <= 0):
      wanted = "0 < LOW < HIGH" if found[1] == "log" else "LOW < HIGH"
      raise Refusal(f"--grid has {key}={text}; a range of this kind needs {wanted}.")
    return Range(low, high, found[1] == "log", isinstance(low, int))
  values = tuple(_value(names, piece.strip(), config) for piece in text.split(","))
  if twice := next((value for value in values if values.count(value) > 1), None):
    raise Refusal(f"--grid has the value {twice} of {key} twice; name every value once.")
  return values


def _value(names: tuple[str, ...], text: str, config: ml_collections.ConfigDict) -> Value:
  """A value that all of the keys can have."""
  flat, known = dict(schema.flatten(config)), schema.keys_of(config.method, config.task)
  values = []
  for name in names:
    now = flat[name]
    value = _read(now, text)
    key = known.get(name)
    wrong = schema.why_not(key, text if value is None else value) if key else "of another type" if value is None else ""
    if wrong:
      raise Refusal(f"--grid has {name}={schema.shown(text)[1:-1]}; it must be {wrong}.")
    values.append(value)
  if any(type(value) is not type(values[0]) for value in values):
    raise Refusal(f"--grid gives {' and '.join(names)} one value, but they are of different types; vary them apart.")
  return values[0]


def _read(now: Any, text: str) -> Value | None:
  """What a text says of a key whose value is `now`; None if it is nothing of that type."""
  if isinstance(now, bool):
    return {"true": True, "false": False}.get(text.lower())
  try:
    return type(now)(text) if text or isinstance(now, str) else None
  except ValueError:
    return None


def points(grids: Sequence[Sequence[Axis]], config: ml_collections.ConfigDict) -> list[Point]:
  """The base, and every combination of values of each grid, each once.

  Raises:
    Refusal: a range, of which there is no end of values; or more than MOST_POINTS.
  """
  for axis in itertools.chain(*grids):
    if isinstance(axis.values, Range):
      raise Refusal(
        f"--grid has a range for {'+'.join(axis.keys)}, from which a search draws; add --search random or halving, or"
        " give values."
      )
  if sum(math.prod(len(axis.values) for axis in axes) for axes in grids) > MOST_POINTS:
    raise Refusal(f"--grid has more than {MOST_POINTS:,} combinations; take fewer values, or --search random.")
  return _named(config, grids, itertools.chain([{}], *(_product(axes) for axes in grids)))


def _product(axes: Sequence[Axis]) -> Iterator[dict[str, Value]]:
  for values in itertools.product(*(axis.values for axis in axes)):
    yield {key: value for axis, value in zip(axes, values, strict=True) for key in axis.keys}


def drawn(
  grids: Sequence[Sequence[Axis]], config: ml_collections.ConfigDict, number: int, rng: np.random.Generator
) -> list[Point]:
  """The base and `number` - 1 other points drawn at random, each once; fewer where there are not as many."""
  found, misses = [], 0
  known, flat = {_key({})}, dict(schema.flatten(config))
  while len(found) < number - 1 and misses < 100 * number:
    axes = grids[rng.integers(len(grids))]
    changes: dict[str, Value] = {}
    for axis in axes:
      value = axis.values.draw(rng) if isinstance(axis.values, Range) else axis.values[rng.integers(len(axis.values))]
      changes |= dict.fromkeys(axis.keys, value)
    key = _key(_changes(changes, flat))
    if key in known:
      misses += 1
      continue
    known.add(key)
    found.append(changes)
  return _named(config, grids, [{}, *found])


def _changes(values: Mapping[str, Value], flat: Mapping[str, Any]) -> dict[str, Value]:
  """Those of the values that a config, of which `flat` is {dotted key: value}, does not have anyway."""
  return {key: value for key, value in values.items() if value != flat[key]}


def _key(changes: Mapping[str, Value]) -> tuple:
  return tuple(sorted(changes.items()))


def _named(
  config: ml_collections.ConfigDict, grids: Sequence[Sequence[Axis]], found: Iterator[dict] | Sequence[dict]
) -> list[Point]:
  """Points of what was found, each once, called by the last words of the keys that they change."""
  keys = list(dict.fromkeys(key for axis in itertools.chain(*grids) for key in axis.keys))
  lasts = [key.rpartition(".")[2] for key in keys]
  short = {key: last if lasts.count(last) == 1 else key for key, last in zip(keys, lasts, strict=True)}
  each: dict[tuple, Point] = {}
  names: set[str] = set()
  flat = dict(schema.flatten(config))
  for values in found:
    changes = _changes(values, flat)
    if _key(changes) in each:
      continue
    name = "_".join(f"{short[key]}={_shown(value)}" for key, value in changes.items()) or BASE
    name = re.sub(r"[^A-Za-z0-9=._-]+", "-", name)
    if len(name) > LONGEST_NAME or name in names:
      digest = hashlib.sha256(repr(_key(changes)).encode()).hexdigest()[:8]
      name = f"{name[: LONGEST_NAME - 9]}-{digest}"
    names.add(name)
    each[_key(changes)] = Point(name, changes)
  return list(each.values())


def _shown(value: Value) -> str:
  return f"{value:g}" if isinstance(value, float) else str(value)
