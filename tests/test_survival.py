"""Whole runs, killed and told to stop at random moments: each ends bit-identical to one that was left alone."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, with_devices

from cpsc_jax import checkpoint
from cpsc_jax.errors import RESUME

FLAGS = (
  f"--config={REPOSITORY / 'configs' / 'digits.py'}:smoke",
  "--config.teacher.epochs=10",
  "--config.schedule.epochs=30",
  "--config.checkpoint.every=2",
)


def start(workdir, digits_dir, *more):
  command = [sys.executable, "-m", "cpsc_jax.main", *FLAGS, f"--workdir={workdir}"]
  log = (workdir.parent / f"{workdir.name}.log").open("a")
  return subprocess.Popen(
    [*command, f"--config.dataset.data_dir={digits_dir}", *more], cwd=REPOSITORY, stdout=log, stderr=log
  )


def outcome(workdir):
  """All that a run finds out and all that it keeps, but for the time it took."""
  results = json.loads((workdir / "results.json").read_text())
  digests = {name: checkpoint.read_card(workdir / name)["digest"] for name in ("teacher", "student", "generator")}
  history = json.loads((workdir / "history.json").read_text())
  return digests, history, results["student"], results["generator"], results["teacher"]["accuracy"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_dir):
  """(outcome, seconds from start to end with everything compiled before)."""
  folder = tmp_path_factory.mktemp("undisturbed")
  assert start(folder / "first", digits_dir).wait() == 0
  began = time.monotonic()
  assert start(folder / "second", digits_dir).wait() == 0
  seconds = time.monotonic() - began
  assert outcome(folder / "first") == outcome(folder / "second")
  return outcome(folder / "second"), seconds


@pytest.mark.slow
@pytest.mark.parametrize("kind, times", [(signal.SIGKILL, 30), (signal.SIGTERM, 10)])
def test_stopped_at_random_moments(undisturbed, tmp_path, digits_dir, kind, times):
  want, seconds = undisturbed
  rng, hits, codes, run = random.Random(int(kind)), 0, [], 0
  while hits < times:
    run += 1
    workdir = tmp_path / f"run{run}"
    while not (workdir / "results.json").exists():
      process = start(workdir, digits_dir)
      try:
        process.wait(rng.uniform(0, 1.1 * seconds) if hits < times else None)
      except subprocess.TimeoutExpired:
        os.kill(process.pid, kind)
        process.wait()
        hits += 1
      codes.append(process.returncode)
    assert outcome(workdir) == want
  print(f"{hits} x {kind.name} in {run} runs of {seconds:.0f} s, exit codes {codes}")
  # Before Python has imported the program, SIGTERM still has its own meaning.
  assert set(codes) <= ({0, -kind} if kind == signal.SIGKILL else {0, RESUME, -kind})


@pytest.mark.slow
def test_stopped_on_one_device_and_resumed_on_eight(tmp_path, digits_dir, monkeypatch):
  process = start(tmp_path / "w", digits_dir)
  while not list((tmp_path / "w" / "checkpoints").glob("[0-9]")) and process.poll() is None:
    time.sleep(0.1)
  process.terminate()
  assert process.wait() == RESUME
  monkeypatch.setenv("XLA_FLAGS", with_devices(8)["XLA_FLAGS"])
  assert start(tmp_path / "w", digits_dir).wait() == 0
  results = json.loads((tmp_path / "w" / "results.json").read_text())
  assert results["hardware"]["devices"] == 8
  assert "distill: resuming after epoch" in (tmp_path / "w.log").read_text()
