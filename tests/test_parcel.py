"""benchmarks/parcel.py: runs as a few bounded files; and the GPU campaign, rehearsed on a CPU and moved half-way."""

import json
import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from cpsc_jax.errors import Refusal

sys.path.insert(0, str(REPOSITORY))

from benchmarks import parcel


def write(path, size=10):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(os.urandom(size))


@pytest.fixture
def runs(tmp_path):
  """A finished run, one that distils, and one that trains its teacher."""
  root = tmp_path / "runs"
  for name in ("done", "distils", "teaches"):
    write(root / "plan" / name / "config.json")
    write(root / "plan" / f"{name}.origin.json")
    write(root / "plan" / name / "events" / "e")
  write(root / "plan" / "done" / "results.json")
  write(root / "gpu.json")
  for name in ("done", "distils"):
    write(root / "plan" / name / "teacher" / "a" / "b", 3000)
  write(root / "plan" / "done" / "student" / "b", 2000)
  write(root / "plan" / "done" / "checkpoints" / "9" / "big", 90_000)
  write(root / "plan" / "done" / "pool.npz", 90_000)
  write(root / "plan" / "distils" / "checkpoints" / "3" / "b", 40_000)
  write(root / "plan" / "distils" / "teacher_training" / "checkpoints" / "3" / "b", 90_000)
  write(root / "plan" / "teaches" / "teacher_training" / "checkpoints" / "1" / "b", 20_000)
  return root


def files(root):
  return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_what_the_next_call_needs_goes_along_as_it_is(runs, tmp_path):
  assert parcel.main(["pack", str(runs), str(tmp_path / "out"), "--limit=1MiB", "--part=16KiB"]) == 0
  parts = sorted((tmp_path / "out").glob("parcel.*"))
  assert len(parts) > 3 and all(path.stat().st_size <= 16 * 1024 for path in parts)
  assert parcel.main(["unpack", str(tmp_path / "out"), str(tmp_path / "there")]) == 0
  whole = files(runs)
  skipped = {"plan/done/checkpoints/9/big", "plan/done/pool.npz", "plan/distils/teacher_training/checkpoints/3/b"}
  assert files(tmp_path / "there") == {name: content for name, content in whole.items() if name not in skipped}


@pytest.mark.parametrize("limit", (10_000, 30_000, 60_000, 100_000, 200_000))
def test_the_limit_holds_and_what_does_not_fit_is_named(runs, tmp_path, limit):
  left_out = parcel.pack(runs, tmp_path / "out", limit, 8192)
  parts = sorted((tmp_path / "out").glob("parcel.[0-9]*"))
  assert sum(path.stat().st_size for path in parts) <= max(limit, 10240)
  assert parcel.unpack(tmp_path / "out", tmp_path / "there") == left_out
  for name in left_out:
    assert not (tmp_path / "there" / name).exists() and (runs / name).exists()
  assert (limit < 150_000) == bool(left_out)


def test_a_parcel_that_is_not_whole_is_refused(runs, tmp_path, capsys):
  out, there = tmp_path / "out", tmp_path / "there"
  parcel.pack(runs, out, 2**20, 8192)
  (runs / "plan" / "more").mkdir()
  with pytest.raises(Refusal, match="is not empty"):
    parcel.unpack(out, runs)
  last = sorted(out.glob("parcel.[0-9]*"))[-1]
  content = last.read_bytes()
  last.write_bytes(bytes([content[0] ^ 1]) + content[1:])
  with pytest.raises(Refusal, match="is damaged"):
    parcel.unpack(out, there)
  last.unlink()
  assert parcel.main(["unpack", str(out), str(there)]) == 2 and last.name in capsys.readouterr().err
  assert parcel.main(["pack", str(runs), str(out), "--limit=many"]) == 2 and not there.exists()


@pytest.mark.slow
def test_a_campaign_goes_on_elsewhere(tmp_path):
  """Stopped by its budget, packed, unpacked in another folder, finished there."""
  script = str(REPOSITORY / "benchmarks" / "gpu_campaign.sh")

  def call(out, runs, *options):
    done = subprocess.run(
      [script, str(tmp_path / out), "--runs", str(tmp_path / runs), "--toy", *options],
      capture_output=True,
      text=True,
      env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  assert "all rows are done" not in call("first", "here", "--budget", "75s")
  assert all((tmp_path / "first" / name).exists() for name in ("gpu.json", "methods.json"))
  rest = call("second", "there", "--from", str(tmp_path / "first"), "--budget", "10m")
  assert "unpacked" in rest and "measured" not in rest and "all rows are done" in rest
  found = json.loads((tmp_path / "second" / "gpu_toy.json").read_text())
  assert [len(runs) for runs in found.values()] == [1, 1]
  assert subprocess.run([script, str(tmp_path), "--what"], capture_output=True).returncode == 2
  none = subprocess.run([script, str(tmp_path), "--plan", "none"], capture_output=True, text=True)
  assert none.returncode == 2 and "there is no benchmarks/plans/none.py" in none.stderr
