"""Hostile and damaged files over every command: none executes anything, leaves half an output or ends in a traceback.

The quick form takes a part of the cases. All of them, with a table: pytest -s -m slow -n 0 tests/test_outside.py
"""

import collections
import os
import random

import numpy as np
import outside
import pytest
from conftest import SMOKE

from cpsc_jax import config, teach
from cpsc_jax.errors import Refusal

torch = pytest.importorskip("torch", reason="the files are made with torch: pip install -e '.[test]'")
from test_hostile import CALLS, SMALL, suffix, tensors, write  # noqa: E402
from test_prepare import as_original, cifar_files  # noqa: E402

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux does")
outside.watch()


@pytest.fixture(scope="module")
def cases(tmp_path_factory, finished, digits_dir):
  """number -> all cases, with so many damaged copies of each kind."""
  folder = tmp_path_factory.mktemp("valid")
  valid = {}
  for form in ("zip", "legacy", "safetensors"):
    content = SMALL if form == "safetensors" else tensors(SMALL)
    name = f"{'x' if form == 'safetensors' else form}{suffix(form)}"
    valid[name] = write(folder / name, content, form).read_bytes()
  files = cifar_files("cifar10")
  with pytest.MonkeyPatch.context() as patch:
    as_original(patch, "cifar10", {"train": 100, "test": 20}, files)

    def every(number):
      return [
        *outside.convert_cases(valid, number),
        *outside.picture_cases(number),
        *outside.folder_cases(),
        *outside.archive_cases(files, number),
        *(
          c
          for command in ("resume", "export", "sample")
          for c in outside.net_cases(command, finished, digits_dir, SMOKE, number)
        ),
        *(c for command in ("export", "sample") for c in outside.run_cases(command, finished, number)),
      ]

    yield every


def carried_out(chosen, tmp_path):
  """{case: what was seen}; prints a table."""
  seen = [(case, outside.attempt(case, tmp_path / str(number))) for number, case in enumerate(chosen)]
  rows = collections.defaultdict(collections.Counter)
  for case, result in seen:
    row = rows[case.command]
    good = result.outcome in ("refused", "accepted")
    row["cases"] += 1
    row[result.outcome if good else "wrong"] += 1
    row["memory"], row["seconds"] = max(row["memory"], result.memory), max(row["seconds"], result.seconds)
    if not good:
      print(f"{case.command}: {case.kind}: {result.outcome}: {result.said[-600:]}")
  print("| command | inputs | refused | harmless, output whole | wrong | most memory, MB | longest, s |")
  for command, row in rows.items():
    counts = " | ".join(str(row[key]) for key in ("cases", "refused", "accepted", "wrong"))
    print(f"| {command} | {counts} | {row['memory'] / 1e6:,.0f} | {row['seconds']:.1f} |")
  return seen


def check(seen):
  wrong = [f"{case.command}: {case.kind}: {result.outcome}: {result.said[-300:]}" for case, result in seen]
  assert not [
    text for text, (_, result) in zip(wrong, seen, strict=True) if result.outcome not in ("refused", "accepted")
  ]


class Loaded(Refusal):
  """Ends a run, without a complaint, where its teacher has been loaded."""

  exit_code = 0


@pytest.fixture
def no_run(monkeypatch):
  """A teacher that can be loaded is not trained with."""
  obtain = teach.obtain_teacher

  def loaded(*arguments):
    obtain(*arguments)
    raise Loaded("loaded")

  monkeypatch.setattr(teach, "obtain_teacher", loaded)


LONG = ("large and blank", "false sizes", "many members", "bombs in chunks", "bombs of zip")  # kinds that take seconds


def test_a_part_of_all(cases, tmp_path, no_run):
  """One of a third of the kinds."""
  kinds = collections.defaultdict(list)
  for case in cases(1):
    if not any(long in case.kind for long in LONG):
      kinds[case.command, case.kind].append(case)
  rng = random.Random(0)
  seen = carried_out([rng.choice(kinds[kind]) for kind in rng.sample(sorted(kinds), len(kinds) // 3)], tmp_path)
  assert {case.command for case, _ in seen} == set(outside.COMMANDS) and len(seen) >= 50
  check(seen)


def test_embeddings_from_outside(tmp_path):
  """A file of NumPy's in place of the embedding of classes: nothing in it is unpickled."""
  rows = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
  np.save(tmp_path / "good.npy", rows)
  np.testing.assert_array_equal(config.read_embedding(tmp_path / "good.npy", 10), rows)
  good = (tmp_path / "good.npy").read_bytes()
  mark = tmp_path / "mark"
  objects = np.empty((10, 4), object)
  objects[:] = CALLS["os.system"](mark)
  np.save(tmp_path / "objects.npy", objects, allow_pickle=True)
  np.savez(tmp_path / "pack.npz", rows=rows)
  huge = good.replace(b"(10, 4)", b"(10, 4" + b"0" * 20 + b")").replace(b"}" + b" " * 20, b"}")
  contents = [
    (tmp_path / "objects.npy").read_bytes(),
    (tmp_path / "pack.npz").read_bytes(),
    huge,
    b"",
    b"PK",
    b"\x80\x04.",
  ]
  contents += [good.replace(b"'shape'", b"[" * 7), good.replace(b"<f4", b"|O8"), good.replace(b"<f4", b"<i4")]
  contents += [changed for kind, changed in outside.damaged(good, 4, 0) if kind in ("cut short", "zeros written over")]
  path, refused = tmp_path / "x.npy", 0
  for content in contents:
    path.write_bytes(content)
    try:
      assert np.isfinite(config.read_embedding(path, 10)).all()
    except Refusal as refusal:
      assert "config.generator.embedding" in str(refusal) and "\n" not in str(refusal)
      refused += 1
  assert refused >= 13 and not mark.exists()
  for make in outside.STRANGE.values():
    path.unlink(missing_ok=True)
    make(path)
    with pytest.raises(Refusal, match="which cannot be read"):
      config.read_embedding(path, 10)
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.slow
def test_all(cases, tmp_path, no_run):
  seen = carried_out(cases(2), tmp_path)
  assert len(seen) >= 500 and all(any(c.command == name for c, _ in seen) for name in outside.COMMANDS)
  check(seen)
