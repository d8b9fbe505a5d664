"""Checkpoints are untrusted: damaged and hostile files are refused in one line, execute nothing and write nothing.

At least 100 files are made by hand and 180 by hypothesis; the tests count them.
"""

import argparse
import codecs
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from cpsc_jax import checkpoint, saved
from cpsc_jax.interop import convert
from cpsc_jax.interop.convert import torch_files
from cpsc_jax.interop.convert.__main__ import main, shapes_of

torch = pytest.importorskip("torch", reason="the files are made with torch: pip install -e '.[test]'")

GENERATOR = {"net": "cifar", "num_classes": 10, "image_size": 8, "channels": 3, "latent_dim": 2, "width": 1}
GENERATOR |= {"conditional": True, "output": "tanh", "epsilon": 0.0, "init": "torch"}
CLASSIFIER = {"net": "cifar_resnet8", "num_classes": 10, "image_size": 32, "channels": 3}
FORMATS = ("zip", "legacy", "safetensors")


def weights(card):
  """A valid state dict of NumPy arrays of the net that a card describes."""
  rng = np.random.default_rng(0)
  like = shapes_of(*saved.rebuild(card))
  variables = jax.tree.map(lambda s: rng.uniform(0.5, 1.5, s.shape).astype(np.float32), like)
  return convert.to_torch(card["net"], variables)


SMALL, WHOLE = weights(GENERATOR), weights(CLASSIFIER)


def tensors(state):
  return {key: torch.tensor(array) for key, array in state.items()}


def write(path, content, form="zip"):
  if form == "safetensors":
    save_file(content, path)
  else:
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
  return path


class Reduces:
  """Pickles as a call of `function(*arguments)`."""

  def __init__(self, function, *arguments):
    self.call = function, arguments

  def __reduce__(self):
    return self.call


def refuse(capsys, source, *flags):
  """Asserts that the converter refuses `source` in one line, having written nothing; returns the line."""
  before = sorted(source.parent.rglob("*"))
  code = main([str(source), "--out", str(source.parent / "out"), *flags])
  stdout, stderr = capsys.readouterr()
  assert code == 2, (source, stdout)
  assert stderr.startswith("cpsc_jax: ") and stderr.count("\n") == 1 and stderr.rstrip("\n").isprintable(), stderr
  assert len(stderr) < 6000
  assert sorted(source.parent.rglob("*")) == before
  return stderr


# Made by hand. CALLS: name -> (file to create) -> an object whose unpickling would create it; CONTENTS: what torch.save
# gets; FILES: the bytes, or a function that writes them to a path.

CALLS = {
  "os.system": lambda mark: Reduces(os.system, f"touch {mark}"),
  "subprocess": lambda mark: Reduces(subprocess.call, ["touch", str(mark)]),
  "eval": lambda mark: Reduces(eval, f"open({str(mark)!r}, 'w')"),
  "exec": lambda mark: Reduces(exec, f"open({str(mark)!r}, 'w')"),
  "open": lambda mark: Reduces(open, str(mark), "w"),
  "mkdir": lambda mark: Reduces(os.mkdir, str(mark)),
  "path.touch": lambda mark: Reduces(pathlib.Path.touch, mark),
  "getattr": lambda mark: Reduces(getattr, mark, "touch"),
  "codecs": lambda mark: Reduces(codecs.open, str(mark), "w"),
  "torch.load": lambda mark: Reduces(torch.load, str(mark)),
  "torch.save": lambda mark: Reduces(torch.save, 1, str(mark)),
  "numpy.save": lambda mark: Reduces(np.save, str(mark), np.zeros(1)),
  "import": lambda mark: Reduces(__import__, "antigravity"),
  "nested": lambda mark: [{"deep": (1, [Reduces(os.system, f"touch {mark}")])}],
  "module": lambda mark: torch.nn.Linear(2, 2),
  "function": lambda mark: main,
}
CONTENTS = {
  "nothing": lambda: {},
  "nothing under state_dict": lambda: {"state_dict": {}},
  "a list": lambda: [1, 2],
  "a number": lambda: 3.5,
  "None": lambda: None,
  "a tensor": lambda: torch.ones(3),
  "numbers for weights": lambda: dict.fromkeys(SMALL, 1.0),
  "strings for weights": lambda: dict.fromkeys(SMALL, "x"),
  "arrays for weights": lambda: SMALL,
  "lists for weights": lambda: {key: array.tolist() for key, array in SMALL.items()},
  "an optimiser": lambda: {"state": {0: {"step": 1}}, "param_groups": []},
  "unknown wrapper": lambda: {"weights": tensors(SMALL)},
  "integer keys": lambda: dict(enumerate(tensors(SMALL).values())),
  "bytes keys": lambda: {key.encode(): value for key, value in tensors(SMALL).items()},
  "a dict too many": lambda: tensors(SMALL) | {"more": {"a": torch.ones(1)}},
  "wrapped too often": lambda: {"model": {"net": {"model": {"net": {"state_dict": tensors(SMALL)}}}}},
  "its own wrapper": lambda: itself(),
  "unknown family": lambda: {"blocks.0.attention.weight": torch.ones(3, 3)},
  "too many entries": lambda: {f"block1.layer.{i}.conv1.weight": torch.ones(1) for i in range(10_001)},
  "too many blocks": lambda: (
    {f"block1.layer.{i}.conv1.weight": torch.ones(1) for i in range(9_000)} | {"fc.weight": torch.ones(1)}
  ),
  "terminal escapes": lambda: tensors(SMALL) | {"\x1b[2J\r\nTraceback \u202e": torch.ones(1)},
  "a lone surrogate": lambda: tensors(SMALL) | {"\ud800": torch.ones(1)},
  "a long key": lambda: tensors(SMALL) | {"x" * 1_000_000: torch.ones(1)},
  "a stretched tensor": lambda: changed("l1.0.weight", torch.ones(1).expand(2**20, 2**20)),
  "one storage for all": lambda: shared_storage(),
  "no dimensions": lambda: changed("l1.0.weight", torch.tensor(1.0)),
  "many dimensions": lambda: changed("l1.0.weight", torch.ones([1] * 12)),
  "empty tensor": lambda: changed("l1.0.weight", torch.ones(2**40, 0)),
  "no classes": lambda: changed("conv_blocks0_0.weights.weight", torch.ones(0, 2)),
  "wide image": lambda: changed("conv_blocks3_0.weight", torch.ones(5000, 1, 3, 3)),
  "sparse": lambda: changed("l1.0.weight", torch.ones(8, 2).to_sparse()),
  "meta": lambda: changed("l1.0.weight", torch.ones(8, 2, device="meta")),
  "quantised": lambda: changed("l1.0.weight", torch.quantize_per_tensor(torch.ones(8, 2), 0.1, 0, torch.qint8)),
  "beyond float32": lambda: changed("l1.0.bias", torch.full((8,), 1e300, dtype=torch.float64)),
  "negative variance": lambda: changed("conv_blocks0_0.running_var", torch.tensor([1.0, -1.0])),
  "another net's weights": lambda: tensors(SMALL) | tensors(WHOLE),
}


def changed(key, value):
  return tensors(SMALL) | {key: value}


def itself():
  content = {}
  content["state_dict"] = content
  return content


def shared_storage():
  big = torch.ones(100_000)
  return changed("l1.0.weight", big) | {f"more.{i}": big for i in range(200)}


def raw_zip(entries, compression=zipfile.ZIP_STORED, change=None):
  """A writer of a zip archive of (name, bytes), its bytes changed at will."""

  def make(path):
    with zipfile.ZipFile(path, "w", compression) as archive:
      for name, content in entries:
        archive.writestr(name, content)
    if change:
      path.write_bytes(change(path.read_bytes()))

  return make


def stored_larger(data):
  """Multiplies the sizes that the directory declares for the first entry."""
  at = data.index(b"PK\x01\x02") + 20
  size = struct.unpack_from("<I", data, at)[0] * 1000
  return data[:at] + struct.pack("<II", size, size) + data[at + 8 :]


def overlapping(data):
  """Lets the second entry of the directory point to the first one's place."""
  first = data.index(b"PK\x01\x02")
  second = data.index(b"PK\x01\x02", first + 4)
  return data[: second + 42] + data[first + 42 : first + 46] + data[second + 46 :]


PICKLE = pickle.dumps({"l1.0.weight": 1}, 2)
ENTRIES = [("a/data.pkl", PICKLE), ("a/version", b"3\n")]


def header(text, data=b"", length=None):
  """The bytes of a safetensors file with that header."""
  text = text if isinstance(text, bytes) else json.dumps(text).encode()
  return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FILES = {
  "empty.pth": b"",
  "one.pth": b"\x80",
  "text.pth": b"not a checkpoint at all\n",
  "html.pth": b"<!DOCTYPE html><html>404</html>",
  "noise.pth": bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8)),
  "zeros.pth": bytes(5000),
  "plain pickle.pth": pickle.dumps({"a": 1}),
  "protocol 4.pth": pickle.dumps({"a": 1}, 4),
  "stop.pth": b".",
  "deep.pth": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
  "memo.pth": b"\x80\x02" + b"r\xff\xff\xff\x7f.",
  "long.pth": b"\x80\x02\x8b\xff\xff\xff\x7f.",
  "script.pth": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
  "tar.pth": b"storages" + bytes(249) + b"ustar" + bytes(2000),
  "no entries.pth": raw_zip([]),
  "no pickle.pth": raw_zip([("a/version", b"3\n")]),
  "bomb.pth": raw_zip([*ENTRIES, ("a/data/0", bytes(30_000_000))], zipfile.ZIP_DEFLATED),
  "bzip bomb.pth": raw_zip([*ENTRIES, ("a/data/0", bytes(30_000_000))], zipfile.ZIP_BZIP2),
  "declared.pth": raw_zip(ENTRIES, change=stored_larger),
  "overlap.pth": raw_zip(ENTRIES, change=overlapping),
  "traversal.pth": raw_zip([("../../out/data.pkl", PICKLE), ("../../out/version", b"3\n")]),
  "absolute.pth": raw_zip([("/tmp/out/data.pkl", PICKLE)]),
  "torchscript.pth": raw_zip([*ENTRIES, ("a/constants.pkl", PICKLE), ("a/code/x.py", b"import os")]),
  "pickle.safetensors": PICKLE,
  "empty.safetensors": b"",
  "no header.safetensors": struct.pack("<Q", 0),
  "huge header.safetensors": header("{}", length=2**63 - 1),
  "long header.safetensors": header("{}", length=10**6),
  "no json.safetensors": header(b"{'a': "),
  "deep json.safetensors": header(b"[" * 100_000),
  "list.safetensors": header([1, 2]),
  "no tensors.safetensors": header({}),
  "overlap.safetensors": header({"a": entry(), "b": entry()}, bytes(4)),
  "hole.safetensors": header({"a": entry(offsets=(4, 8))}, bytes(8)),
  "beyond.safetensors": header({"a": entry(shape=(100,), offsets=(0, 400))}, bytes(4)),
  "backwards.safetensors": header({"a": entry(offsets=(4, 0))}, bytes(4)),
  "huge shape.safetensors": header({"a": entry(shape=(2**40, 2**40))}, bytes(4)),
  "negative shape.safetensors": header({"a": entry(shape=(-1,))}, bytes(4)),
  "odd type.safetensors": header({"a": entry("F33")}, bytes(4)),
  "float8.safetensors": header({"a": entry("F8_E4M3", (4,))}, bytes(4)),
  "two keys.safetensors": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":1}', bytes(4)),
}


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_are_refused_and_not_made(name, form, tmp_path, capsys):
  mark = tmp_path / "mark"
  content = {"state_dict": tensors(SMALL), "extra": CALLS[name](mark)}
  line = refuse(capsys, write(tmp_path / "evil.pth", content, form))
  assert "could run code" in line and not mark.exists()


@pytest.mark.parametrize("name", CONTENTS)
def test_contents_are_refused(name, tmp_path, capsys):
  refuse(capsys, write(tmp_path / "odd.pth", CONTENTS[name]()))


@pytest.mark.parametrize("name", FILES)
def test_files_are_refused(name, tmp_path, capsys):
  path = tmp_path / name
  make = FILES[name]
  make(path) if callable(make) else path.write_bytes(make)
  refuse(capsys, path)
  assert not pathlib.Path("/tmp/out").exists()


def test_enough_are_made_by_hand():
  assert 2 * len(CALLS) + len(CONTENTS) + len(FILES) >= 100


# Made by hypothesis.


def examples(count):
  return hypothesis.settings(
    max_examples=count,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
  )


VALID = {}  # format -> bytes of a file that converts


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
  folder = tmp_path_factory.mktemp("valid")
  for form in FORMATS:
    VALID[form] = write(folder / form, SMALL if form == "safetensors" else tensors(SMALL), form).read_bytes()
  return VALID


def suffix(form):
  return ".safetensors" if form == "safetensors" else ".pth"


def test_truncated_files_are_refused(valid, tmp_path, capsys):
  refused = set()

  @examples(90)
  @hypothesis.given(st.data(), st.sampled_from(FORMATS))
  def cut(data, form):
    content = valid[form][: data.draw(st.integers(0, len(valid[form]) - 1))]
    path = tmp_path / f"cut{suffix(form)}"
    path.write_bytes(content)
    refuse(capsys, path)
    refused.add(content)

  cut()
  assert len(refused) >= 60


def test_flipped_bytes_are_refused_or_harmless(valid, tmp_path, capsys):
  """Where the flip lies within weights the file may still be valid; then what is written must be a whole net."""
  refused = set()

  @examples(120)
  @hypothesis.given(st.data(), st.sampled_from(FORMATS), st.integers(1, 255))
  def flip(data, form, change):
    content = bytearray(valid[form])
    end = {"zip": len(content), "legacy": 3500, "safetensors": 2200}[form]  # mostly where the structure is
    content[data.draw(st.integers(0, end - 1))] ^= change
    path, out = tmp_path / f"flipped{suffix(form)}", tmp_path / "out"
    path.write_bytes(content)
    if main([str(path), "--out", str(out)]) == 0:
      card = checkpoint.read_card(out)
      checkpoint.load_net(out, shapes_of(*saved.rebuild(card)))
      out.rename(tmp_path.parent / f"{tmp_path.name}-{len(list(tmp_path.parent.iterdir()))}")
      capsys.readouterr()
    else:
      capsys.readouterr()
      refuse(capsys, path)
      refused.add(bytes(content))

  flip()
  assert len(refused) >= 50


def rename(data, state, key):
  state[data.draw(st.text(min_size=1).filter(lambda new: new not in state))] = state.pop(key)


def remove(data, state, key):
  del state[key]


def double(data, state, key):
  state[f"{key}.{data.draw(st.integers(0, 9))}"] = state[key]


def reshape(data, state, key):
  shape = data.draw(st.lists(st.integers(1, 5), max_size=6).filter(lambda s: tuple(s) != state[key].shape))
  state[key] = np.ones(shape, np.float32)


def retype(data, state, key):
  kinds = [np.int8, np.uint8, np.int16, np.int32, np.int64, np.bool_]
  state[key] = state[key].astype(data.draw(st.sampled_from(kinds)))


def spoil(data, state, key):
  array = state[key].copy()
  array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
  state[key] = array


@pytest.mark.parametrize("damage", [rename, remove, double, reshape, retype, spoil])
def test_weights_that_do_not_fit_are_refused(damage, tmp_path, capsys):
  refused = set()

  @examples(16)
  @hypothesis.given(st.data(), st.sampled_from(FORMATS), st.sampled_from([SMALL, WHOLE]))
  def misfit(data, form, start):
    state = dict(start)
    key = data.draw(st.sampled_from([key for key in start if not key.endswith("num_batches_tracked")]))
    damage(data, state, key)
    try:
      content = save(state) if form == "safetensors" else tensors(state)
    except UnicodeEncodeError:  # safetensors writes no lone surrogates
      hypothesis.reject()
    path = tmp_path / f"misfit{suffix(form)}"
    path.write_bytes(content) if form == "safetensors" else write(path, content, form)
    refuse(capsys, path)
    refused.add(path.read_bytes())

  misfit()
  assert len(refused) >= 12


def test_every_format_converts(valid, tmp_path, capsys):
  """The undamaged files convert, without which the refusals above would prove nothing."""
  cards = []
  for form in FORMATS:
    path = tmp_path / f"{form}{suffix(form)}"
    path.write_bytes(valid[form])
    assert main([str(path), "--out", str(tmp_path / form)]) == 0
    cards.append(checkpoint.read_card(tmp_path / form))
  assert len({card["digest"] for card in cards}) == 1
  assert cards[0] == {**cards[0], **GENERATOR}
  capsys.readouterr()
  path = write(tmp_path / "whole.pth", tensors(WHOLE))
  assert main([str(path), "--out", str(tmp_path / "whole")]) == 0
  assert "cifar_resnet8, 10 classes" in capsys.readouterr().out


def test_from_the_command_line(tmp_path):
  """In a process of its own: exit code, one line, no traceback."""
  mark = tmp_path / "mark"
  source = write(tmp_path / "evil.pth", {"state_dict": CALLS["os.system"](mark)})
  command = [sys.executable, "-m", "cpsc_jax.interop.convert", str(source), "--out", str(tmp_path / "out")]
  done = subprocess.run(command, capture_output=True, text=True, timeout=120)
  assert done.returncode == 2 and "Traceback" not in done.stderr and "posix.system" in done.stderr
  assert sorted(tmp_path.iterdir()) == [source]


def test_bookkeeping_beside_the_weights_is_ignored(tmp_path, capsys):
  extras = {
    "args": argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("/data")),
    "best": np.float64(91.7),
    "history": np.arange(3.0),
    "epoch": 7,
  }
  for form in ("zip", "legacy"):
    path = write(tmp_path / f"{form}.pth", {"state_dict": tensors(SMALL), **extras}, form)
    content, _ = torch_files.read(path)
    assert content.keys() == {key for key in SMALL if not key.endswith("num_batches_tracked")}
    assert main([str(path), "--out", str(tmp_path / form)]) == 0
  capsys.readouterr()
