"""Who may import whom. The order of the rooms makes 'data-free' a property of the code, not a promise."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "cpsc_jax"

# room -> the rooms that it may import; callers stand below what they call.
ROOMS = {
  "errors": set(),
  "files": set(),
  "streams": set(),
  "state": set(),
  "progress": set(),
  "compile_cache": set(),
  "losses": {"state"},
  "diagnostics": {"state"},
  "paired": set(),
  "page": {"paired"},
  "command": {"errors"},
  "stop": {"errors"},
  "events": set(),
  "checksums": {"errors"},
  "mesh": {"errors", "files"},
  "datasets": {"errors", "files", "command", "progress"},
  "checkpoint": {"checksums", "errors", "files", "mesh"},
  "nets": {"compile_cache", "errors", "progress", "state", "streams"},
  "environment": {"nets"},
  "prior": {"errors", "files", "nets", "state"},
  "optim": {"nets", "state"},
  "pool": {"mesh", "state"},
  "gradients": {"nets", "state"},
  "setup": {"gradients", "mesh", "pool", "prior", "state", "streams"},
  "initial": {"gradients", "mesh", "nets", "setup", "state", "streams"},
  "algorithm": {"gradients", "initial", "mesh", "nets", "setup", "state", "streams"},
  "sources": {"datasets", "mesh", "nets", "pool", "setup", "state", "streams"},
  "methods": {"errors", "initial", "losses", "mesh", "nets", "pool", "setup", "sources", "state", "streams"},
  "evaluate": {"datasets", "mesh", "setup", "state", "streams"},
  "examine": {"algorithm", "diagnostics", "evaluate", "gradients", "mesh", "setup", "state"},
  "saved": {"errors", "files", "checkpoint", "nets"},
  "report": {"checksums", "command", "errors", "files", "page"},
  "sample": {"errors", "progress", "datasets", "report", "saved", "command"},
  "interop": {
    "errors",
    "files",
    "command",
    "progress",
    "mesh",
    "datasets",
    "nets",
    "checkpoint",
    "evaluate",
    "saved",
    "state",
  },
  "loop": {"errors", "checkpoint", "environment", "events", "mesh", "progress", "state", "stop"},
  "schema": {"errors", "methods"},
  "describe": {"datasets", "methods", "nets", "schema"},
  "tasks": {
    "datasets",
    "errors",
    "losses",
    "mesh",
    "methods",
    "nets",
    "optim",
    "prior",
    "schema",
    "setup",
    "sources",
    "state",
    "streams",
  },
  "config": {"datasets", "errors", "files", "mesh", "methods", "nets", "prior", "schema", "setup", "tasks"},
  "experiment": {
    "config",
    "datasets",
    "errors",
    "gradients",
    "initial",
    "mesh",
    "methods",
    "nets",
    "optim",
    "prior",
    "progress",
    "setup",
    "sources",
    "state",
    "streams",
    "tasks",
  },
  "teach": {
    "algorithm",
    "checkpoint",
    "config",
    "datasets",
    "errors",
    "evaluate",
    "experiment",
    "loop",
    "mesh",
    "methods",
    "nets",
    "optim",
    "progress",
    "saved",
    "setup",
    "sources",
    "state",
    "streams",
    "tasks",
  },
  "measures": {
    "config",
    "datasets",
    "diagnostics",
    "evaluate",
    "examine",
    "experiment",
    "mesh",
    "nets",
    "progress",
    "setup",
    "sources",
    "state",
    "streams",
    "teach",
  },
  "record": {
    "saved",
    "checkpoint",
    "checksums",
    "config",
    "datasets",
    "diagnostics",
    "environment",
    "errors",
    "loop",
    "mesh",
    "nets",
    "pool",
    "progress",
    "report",
    "schema",
    "setup",
    "state",
    "tasks",
    "teach",
  },
  "run": {
    "algorithm",
    "config",
    "datasets",
    "experiment",
    "loop",
    "measures",
    "mesh",
    "nets",
    "progress",
    "record",
    "schema",
    "setup",
    "state",
    "streams",
    "tasks",
    "teach",
  },
  "phases": {
    "config",
    "datasets",
    "errors",
    "evaluate",
    "experiment",
    "mesh",
    "nets",
    "progress",
    "record",
    "run",
    "saved",
    "tasks",
    "teach",
  },
  "dry_run": {
    "algorithm",
    "checkpoint",
    "config",
    "datasets",
    "experiment",
    "mesh",
    "nets",
    "record",
    "schema",
    "setup",
    "state",
    "streams",
    "tasks",
    "teach",
  },
  "main": {
    "command",
    "compile_cache",
    "configs",
    "describe",
    "dry_run",
    "errors",
    "mesh",
    "phases",
    "report",
    "run",
    "schema",
    "stop",
    "tasks",
  },
  "sweep": {
    "algorithm",
    "checkpoint",
    "command",
    "compile_cache",
    "config",
    "datasets",
    "errors",
    "experiment",
    "initial",
    "loop",
    "main",
    "mesh",
    "nets",
    "paired",
    "progress",
    "record",
    "report",
    "run",
    "schema",
    "setup",
    "state",
    "stop",
    "streams",
    "tasks",
    "teach",
  },
  "api": {
    "checkpoint",
    "config",
    "datasets",
    "errors",
    "interop",
    "main",
    "mesh",
    "nets",
    "run",
    "sample",
    "saved",
    "schema",
    "state",
    "teach",
  },
  "__main__": {"datasets", "interop", "main", "report", "sample", "stop", "sweep"},
}
LIBRARIES = {
  "flax.linen": {"nets", "methods"},  # a method may bring a net that is trained along
  "flax.struct": {"state", "gradients", "pool"},
  "flax.training": {"state", "gradients"},
  "optax": {"initial", "losses", "methods", "optim", "setup", "state", "tasks"},  # some for the type of an optimiser
  "orbax": {"checkpoint"},
  "onnx": {"interop"},
  "matplotlib": {"report"},
  "jinja2": {"page"},
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


def test_no_room_imports_one_that_comes_later():
  """So there are no circles."""
  order = list(ROOMS)
  for room, others in ROOMS.items():
    later = [other for other in others - {"configs"} if order.index(other) >= order.index(room)]
    assert not later, f"{room} imports {', '.join(later)}"


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
