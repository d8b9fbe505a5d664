"""Runs that are killed, told to stop and damaged; `python -m benchmarks.survival` does it hundreds of times."""

import json
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, command, with_devices

from cpsc_jax import stop
from cpsc_jax.errors import RESUME

sys.path.insert(0, str(REPOSITORY))

from benchmarks import survival

LONG = ("--config.teacher.epochs=6", "--config.schedule.epochs=8", "--config.checkpoint.every=2")


def flags_of_a_run(digits_dir, *more):
  _, config, _, *rest = command("", digits_dir, *more)
  return (config, *rest)


@pytest.fixture
def campaign(tmp_path, finished, digits_dir):
  """Trials on the run that all tests share."""
  return survival.Campaign(tmp_path, flags_of_a_run(digits_dir), finished)


KINDS = ("config.json", "history.json", "results.json", "files.sha256", "net.json", "a net's arrays", "samples.npz")


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_a_finished_run_is_named(campaign, kind):
  trial = survival.flipped(campaign, len(kind), "finished", kind)
  assert trial.ended == "refused by name", trial


def test_a_flipped_bit_in_a_checkpoint_costs_time_alone(campaign):
  assert ("in distillation", "a checkpoint's arrays") in survival.places_of(campaign)
  trial = survival.flipped(campaign, 0, "in distillation", "a checkpoint's arrays")
  assert trial.ended == "bit-identical", trial


def test_a_wrong_ending_is_seen(campaign, monkeypatch):
  """That of a process, and that of a run whose damage nobody noticed."""
  assert not survival.wrong_ending(signal.SIGTERM, 75, 1.0, "epoch 1\ncpsc_jax: stopped by SIGTERM.\n")
  for code, seconds, said in (
    (-15, 1.0, "cpsc_jax: stopped"),
    (75, 11.0, "cpsc_jax: stopped"),
    (75, 1.0, "cpsc_jax: stopped\nTraceback (most recent call last):"),
    (75, 1.0, ""),
  ):
    assert survival.wrong_ending(signal.SIGTERM, code, seconds, said)
  monkeypatch.setattr("cpsc_jax.checksums.check_finished", lambda workdir: None)
  assert survival.flipped(campaign, 0, "finished", "samples.npz").ended == "WRONG"
  table = survival.table([survival.Trial("byte flip", "samples.npz, finished", "WRONG")])
  assert "| byte flip | samples.npz | 1 | 0 | 0 | 1 |  |" in table


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [(signal.SIGKILL,), (signal.SIGTERM, signal.SIGINT)], ids=["kill", "stop"])
def test_hit_in_every_phase(tmp_path, digits_dir, kinds, monkeypatch):
  monkeypatch.delenv(stop.GRACE, raising=False)
  flags = flags_of_a_run(digits_dir, *LONG)
  trials = survival.signals(survival.Campaign(tmp_path, flags, tmp_path / "undisturbed"), 0, kinds)
  assert len(trials) >= len(survival.PHASES) - 2 and {trial.ended for trial in trials} == {"bit-identical"}, trials


def start(workdir, digits_dir, *more):
  argv = [sys.executable, "-m", "cpsc_jax.main", *command(workdir, digits_dir, *more)[1:]]
  log = (workdir.parent / f"{workdir.name}.log").open("a")
  return subprocess.Popen(argv, cwd=REPOSITORY, stdout=log, stderr=log)


@pytest.mark.slow
def test_stopped_on_one_device_and_resumed_on_eight(tmp_path, digits_dir, monkeypatch):
  more = ("--config.schedule.epochs=30", "--config.checkpoint.every=2")
  process = start(tmp_path / "w", digits_dir, *more)
  while not list((tmp_path / "w" / "checkpoints").glob("[0-9]")) and process.poll() is None:
    time.sleep(0.1)
  process.terminate()
  assert process.wait() == RESUME
  monkeypatch.setenv("XLA_FLAGS", with_devices(8)["XLA_FLAGS"])
  assert start(tmp_path / "w", digits_dir, *more).wait() == 0
  results = json.loads((tmp_path / "w" / "results.json").read_text())
  assert results["hardware"]["devices"] == 8
  assert [each["devices"] for each in results["environments"]] == [1, 8]
  said = (tmp_path / "w.log").read_text()
  assert "distill: resuming after epoch" in said and "devices was 1 and is 8; the end will not be bit-identical" in said
