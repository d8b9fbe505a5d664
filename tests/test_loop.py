"""The loop on a training that takes no time: histories, best epochs, resuming, losses that are not finite."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cpsc_jax.checkpoint import UNSEALED, Checkpointer
from cpsc_jax.errors import NonFiniteLoss, Preempted, Refusal
from cpsc_jax.loop import Plan, train

ACCURACY = jnp.array([0.1, 0.5, 0.9, 0.7, 0.9, 0.3, 0.2])


def plan(workdir, epochs=6, bad=None, every=2, measure_every=1, minutes=60.0):
  @jax.jit
  def epoch(state):
    count = state["count"] + 1
    loss = jnp.arange(3.0) + count
    if bad:
      loss = jnp.where((count == bad) & (jnp.arange(3) >= 1), jnp.nan, loss)
    return {"count": count, "x": state["x"] * 1.5}, {"generator": {"ce": loss, "bn": jnp.ones(3), "total": loss}}

  measure = jax.jit(lambda state: {"accuracy": ACCURACY[state["count"] - 1]})
  return Plan("test", epoch, measure, lambda state: state["x"], epochs, measure_every, every, minutes, workdir)


START = {"count": jnp.int32(0), "x": jnp.ones(2)}


def test_history_and_best_epoch(tmp_path):
  outcome = train(plan(tmp_path), START)
  assert [entry["epoch"] for entry in outcome.history] == [1, 2, 3, 4, 5, 6]
  assert outcome.history[1]["terms"]["generator/ce"] == pytest.approx(3.0)
  assert outcome.best_epoch == 3, "the first of equals"
  np.testing.assert_allclose(outcome.best_variables, 1.5**3)
  np.testing.assert_allclose(outcome.state["x"], 1.5**6)


def test_measuring_now_and_then_always_covers_the_last_epoch(tmp_path):
  outcome = train(plan(tmp_path, epochs=5, measure_every=3), START)
  assert [e["epoch"] for e in outcome.history if "accuracy" in e] == [3, 5]


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
  whole = train(plan(tmp_path / "whole"), START)
  train(plan(tmp_path / "parts", epochs=4), START)
  resumed = train(plan(tmp_path / "parts"), START)
  assert resumed.history == whole.history and resumed.best_epoch == whole.best_epoch
  np.testing.assert_array_equal(resumed.state["x"], whole.state["x"])
  again = train(plan(tmp_path / "parts"), START)
  assert again.history == whole.history, "a finished training is only read"


def test_non_finite_loss_names_the_term_and_keeps_the_last_good_checkpoint(tmp_path):
  with pytest.raises(NonFiniteLoss, match=r"epoch 4, step 2: term generator/ce;"):
    train(plan(tmp_path, bad=4), START)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]
  tree, record = Checkpointer(tmp_path / "checkpoints").restore({"state": START, "best": best_like()})
  assert len(record["history"]) == 2 and int(tree["state"]["count"]) == 2


def best_like():
  return {"accuracy": jnp.float32(0), "epoch": jnp.int32(0), "variables": jnp.ones(2)}


def test_event_files_are_readable(tmp_path):
  accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  train(plan(tmp_path), START)
  events = accumulator.EventAccumulator(str(tmp_path / "events"))
  events.Reload()
  assert {"accuracy", "generator/ce", "generator/total"} <= set(events.Tags()["scalars"])
  assert [e.step for e in events.Scalars("accuracy")] == [1, 2, 3, 4, 5, 6]


def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog):
  train(plan(tmp_path, epochs=4), START)
  folder = tmp_path / "checkpoints" / "4" / "tree"
  for path in folder.rglob("d/*"):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))
  resumed = train(plan(tmp_path), START)
  whole = train(plan(tmp_path / "whole"), START)
  assert resumed.history == whole.history
  np.testing.assert_array_equal(resumed.state["x"], whole.state["x"])
  assert "checkpoints/4 is damaged" in caplog.text


def test_checkpoints_by_the_minute(tmp_path):
  train(plan(tmp_path, epochs=5, every=100, minutes=1e-9), START)
  assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]


def test_sigterm_saves_and_the_run_resumes(tmp_path):
  broken = plan(tmp_path / "broken", every=100)

  def epoch(state):
    if int(state["count"]) == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    return broken.epoch(state)

  with pytest.raises(Preempted, match="told to stop; epoch 4 is saved") as stopped:
    train(dataclasses.replace(broken, epoch=epoch), START)
  assert stopped.value.exit_code == 75
  whole, resumed = train(plan(tmp_path / "whole", every=100), START), train(broken, START)
  assert resumed.history == whole.history
  np.testing.assert_array_equal(resumed.state["x"], whole.state["x"])


def test_twenty_flipped_bytes(tmp_path, caplog):
  """Wherever the byte is, the run ends as if it had not been flipped; in what was sealed the flip is named."""
  whole = train(plan(tmp_path / "whole"), START)
  train(plan(tmp_path / "parts", epochs=4), START)
  rng = np.random.default_rng(0)
  files = sorted(p.relative_to(tmp_path) for p in (tmp_path / "parts/checkpoints/4").rglob("*") if p.is_file())
  sealed = [path for path in files if str(path.relative_to("parts/checkpoints/4")) not in UNSEALED[1:]]
  assert len(files) == len(sealed) + 2
  for path in [*files, *rng.choice(sealed, 20)]:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(tmp_path / "parts", copy / "parts")
    data = bytearray((copy / path).read_bytes())
    if not data:
      continue
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    (copy / path).write_bytes(bytes(data))
    caplog.clear()
    resumed = train(plan(copy / "parts"), START)
    assert resumed.history == whole.history, path
    np.testing.assert_array_equal(resumed.state["x"], whole.state["x"])
    assert ("checkpoints/4 is damaged" in caplog.text) == (path in sealed), path


@pytest.fixture
def small_disk(tmp_path):
  folder = tmp_path / "disk"
  folder.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False)
  if mounted.returncode:
    pytest.skip("a disk of 4 MB cannot be mounted here")
  yield folder
  subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_harms_nothing_that_is_saved(small_disk, monkeypatch):
  # Orbax gives up at the first file that fails; the threads that write the others then find its event loop closed.
  # pytest would format each such complaint in its thread, and CPython 3.11's ast.parse, which that takes, fails at
  # times in several threads at once ("AST constructor recursion depth mismatch").
  monkeypatch.setattr(sys, "unraisablehook", lambda complaint: None)
  train(plan(small_disk, epochs=2), START)
  (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
  with pytest.raises(Refusal, match="no checkpoint can be written to .*; what was saved before is kept"):
    train(plan(small_disk), START)
  (small_disk / "filler").unlink()
  resumed = train(plan(small_disk), START)
  assert len(resumed.history) == 6 and resumed.best_epoch == 3


def test_a_read_only_disk_is_refused(small_disk):
  train(plan(small_disk, epochs=2), START)
  subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
  with pytest.raises((Refusal, OSError), match="Read-only"):
    train(plan(small_disk), START)
