"""Who may import whom. The order of the rooms makes 'data-free' a property of the code, not a promise."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "cpsc_jax"

# room -> the rooms that it may import.
ROOMS = {
  "errors": set(),
  "progress": set(),
  "state": set(),
  "losses": set(),
  "mesh": {"errors"},
  "optim": set(),
  "datasets": {"errors", "command"},
  "nets": {"errors", "state"},
  "pool": set(),
  "algorithm": {"state", "nets", "optim", "mesh", "pool"},
  "methods": {"errors", "algorithm", "state", "losses", "nets", "pool"},
  "stop": {"errors"},
  "checkpoint": {"errors", "mesh"},
  "convert": {"errors", "command", "progress", "mesh", "datasets", "nets", "checkpoint", "evaluate", "saved"},
  "onnx_graph": {"errors"},
  "command": {"errors"},
  "saved": {"errors", "checkpoint", "nets"},
  "export": {"errors", "progress", "nets", "checkpoint", "convert", "saved", "command", "onnx_graph"},
  "sample": {"errors", "progress", "datasets", "report", "saved", "command"},
  "evaluate": {"state", "nets", "datasets", "mesh", "pool"},
  "report": set(),
  "settings": {"errors", "datasets", "methods", "nets", "mesh"},
  "events": set(),
  "loop": {"errors", "checkpoint", "events", "mesh", "progress", "stop"},
  "teach": {
    "errors",
    "progress",
    "state",
    "losses",
    "mesh",
    "optim",
    "datasets",
    "nets",
    "algorithm",
    "checkpoint",
    "evaluate",
    "loop",
    "saved",
  },
  "distill": {
    "errors",
    "progress",
    "mesh",
    "optim",
    "datasets",
    "nets",
    "algorithm",
    "methods",
    "checkpoint",
    "evaluate",
    "report",
    "settings",
    "loop",
    "teach",
  },
  "main": {"errors", "command", "distill", "mesh", "report", "stop"},
}
LIBRARIES = {
  "flax.linen": {"nets"},
  "flax.struct": {"state"},
  "optax": {"losses", "optim", "algorithm"},
  "orbax": {"checkpoint"},
  "onnx": {"onnx_graph", "export"},
}


def room_of(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
  """Dotted names of everything a file imports, `from a import b` as a.b."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms(path):
  room = room_of(path)
  for name in imports(path):
    head, *rest = name.split(".")
    if head == "cpsc_jax" and rest:
      assert rest[0] == room or rest[0] in ROOMS[room], f"{room} may not import {name}"
    for library, homes in LIBRARIES.items():
      if name == library or name.startswith(library + "."):
        assert room in homes, f"{room} may not import {name}"


def test_every_room_is_listed():
  assert {room_of(path) for path in FILES} == set(ROOMS)


def test_only_teach_opens_a_training_split():
  users = {room_of(path) for path in FILES if "load_train" in path.read_text() and room_of(path) != "datasets"}
  assert users == {"teach"}


def test_the_split_is_named_in_one_place():
  """`datasets` alone spells a split's name when loading, so load_train is the only door."""
  for path in FILES:
    if room_of(path) != "datasets":
      assert "_load(" not in path.read_text() and "as_data_source" not in path.read_text()
