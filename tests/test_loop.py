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

from cpsc_jax import environment
from cpsc_jax.checkpoint import NOT_CHECKED, Checkpointer
from cpsc_jax.errors import NonFiniteLoss, Preempted, Refusal
from cpsc_jax.loop import Plan, not_finite_in, save, save_together, train, train_together
from cpsc_jax.state import Losses

ACCURACY = jnp.array([0.1, 0.5, 0.9, 0.7, 0.9, 0.3, 0.2])


def plan(workdir, epochs=6, bad=None, every=2, measure_every=1, minutes=60.0, on_epoch=None):
  @jax.jit
  def epoch(state):
    count = state["count"] + 1
    loss = jnp.arange(3.0)[:, None] + count
    if bad:
      loss = jnp.where((count == bad) & (jnp.arange(3)[:, None] >= 1), jnp.nan, loss)
    generator = Losses(total=2 * loss, terms={"ce": loss, "bn": jnp.ones((3, 1))})
    idle = Losses(total=jnp.zeros((3, 0)), terms={"kd": jnp.zeros((3, 0))})
    return {"count": count, "x": state["x"] * 1.5}, {"generator": generator, "student": idle}

  measure = jax.jit(lambda state: {"accuracy": ACCURACY[state["count"] - 1]})
  return Plan(
    "test", epoch, measure, lambda state: state["x"], epochs, measure_every, every, minutes, workdir, on_epoch
  )


START = {"count": jnp.int32(0), "x": jnp.ones(2)}


def test_history_and_best_epoch(tmp_path):
  outcome = train(plan(tmp_path), START)
  assert [entry["epoch"] for entry in outcome.history] == [1, 2, 3, 4, 5, 6]
  assert outcome.history[1] == {
    "epoch": 2,
    "terms": {"generator/bn": 1.0, "generator/ce": pytest.approx(3.0)},
    "totals": {"generator": pytest.approx(6.0)},
    "accuracy": pytest.approx(0.5),
  }, "a player that took no step has no entry"
  assert outcome.best_epoch == 3, "the first of equals"
  np.testing.assert_allclose(outcome.best_variables, 1.5**3)
  np.testing.assert_allclose(outcome.state["x"], 1.5**6)


@pytest.mark.parametrize("minutes", [60.0, 1e-9])
def test_without_a_workdir_nothing_is_written(tmp_path, monkeypatch, minutes):
  monkeypatch.chdir(tmp_path)
  outcome, again = (train(plan(None, minutes=minutes), START) for _ in range(2))
  whole = train(plan(tmp_path / "whole"), START)
  assert outcome.history == again.history == whole.history and outcome.best_epoch == whole.best_epoch
  np.testing.assert_array_equal(outcome.state["x"], whole.state["x"])
  assert [path.name for path in tmp_path.iterdir()] == ["whole"]
  with pytest.raises(NonFiniteLoss, match=r"step 2: term generator/ce; lower the learning rate"):
    train(plan(None, bad=4), START)


def test_without_a_workdir_sigterm_keeps_its_meaning():
  handlers = []
  train(plan(None, on_epoch=lambda entry: handlers.append(signal.getsignal(signal.SIGTERM))), START)
  assert set(handlers) == {signal.getsignal(signal.SIGTERM)}


def test_on_epoch_receives_every_new_entry(tmp_path):
  first, second = [], []
  train(plan(tmp_path, epochs=4, on_epoch=first.append), START)
  outcome = train(plan(tmp_path, on_epoch=second.append), START)
  assert first + second == outcome.history and len(second) == 2


def diagnosing(plan, journal=None, every=2):
  """The plan with diagnoses: a number, one that is not known, an array and a dictionary of arrays."""

  def diagnose(state, epoch):
    layers = {"000 a": state["x"].sum(), "001 b": jnp.float32(epoch)}
    return {"height": state["x"][0], "unknown": jnp.float32(jnp.nan), "rows": state["x"], "layers": layers}

  return dataclasses.replace(plan, diagnose=diagnose, diagnose_every=every, journal=journal)


def test_diagnoses_join_the_history_and_the_journal(tmp_path):
  journal = []
  kept = diagnosing(plan(tmp_path, epochs=5), lambda history, arrays: journal.append((history[-1]["epoch"], arrays)))
  outcome, without = train(kept, START), train(plan(tmp_path / "without", epochs=5), START)
  found = {entry["epoch"]: entry["diagnostics"] for entry in outcome.history if "diagnostics" in entry}
  assert found == {epoch: {"height": pytest.approx(1.5**epoch)} for epoch in (2, 4, 5)}, "and after the last epoch"
  assert [epoch for epoch, _ in journal] == [1, 2, 3, 4, 5]
  for epoch, arrays in journal:
    assert bool(arrays) == (epoch in found)
    if arrays:
      np.testing.assert_allclose(arrays["rows"], 1.5**epoch)
      assert float(arrays["layers"]["001 b"]) == epoch and arrays["epoch_seconds"] > 0
  for entry in outcome.history:
    entry.pop("diagnostics", None)
  assert outcome.history == without.history
  np.testing.assert_array_equal(outcome.state["x"], without.state["x"])
  never = train(diagnosing(plan(None, epochs=2), every=0), START)
  assert not any("diagnostics" in entry for entry in never.history)


def test_diagnoses_of_a_resumed_training(tmp_path):
  whole = train(diagnosing(plan(tmp_path / "whole")), START)
  train(diagnosing(plan(tmp_path / "parts", epochs=4)), START)
  assert train(diagnosing(plan(tmp_path / "parts")), START).history == whole.history


def test_seconds_of_a_resumed_training(tmp_path):
  first = train(plan(tmp_path, epochs=4), START)
  assert first.earlier_seconds == 0 < first.seconds
  second = train(plan(tmp_path), START)
  assert 0 < second.earlier_seconds < second.seconds and second.earlier_seconds <= first.seconds


def test_what_computes_may_change_but_not_in_silence(tmp_path, monkeypatch, capsys):
  train(plan(tmp_path, epochs=2), START)
  before = environment.describe()
  monkeypatch.setattr(environment, "describe", lambda: before | {"jax": "0.0", "devices": 8})
  for epochs in (4, 6):
    outcome = train(plan(tmp_path, epochs=epochs), START)
    assert outcome.environments == [before, before | {"jax": "0.0", "devices": 8}]
  said = capsys.readouterr().out
  assert f"devices was 1 and is 8, jax was {before['jax']} and is 0.0; the end will not be bit-identical" in said
  assert said.count("bit-identical") == 1


def test_a_checkpoint_of_another_origin_is_refused(tmp_path):
  origin = {"config": "a", "teacher": "b"}
  train(dataclasses.replace(plan(tmp_path, epochs=4), origin=origin), START)
  for other, words in (
    ({"config": "c"}, "another config"),
    ({"teacher": "c"}, "another teacher"),
    ({"config": "c", "test_images": "d"}, "another config and other test images"),
  ):
    with pytest.raises(Refusal, match=rf"checkpoints/4 was written with {words}, or by an older version"):
      train(dataclasses.replace(plan(tmp_path), origin=origin | other), START)
  assert train(dataclasses.replace(plan(tmp_path), origin=origin), START).history[-1]["epoch"] == 6


def test_the_host_reads_an_epoch_after_the_next_has_begun(tmp_path):
  events = []
  original = plan(tmp_path, every=100, on_epoch=lambda entry: events.append(f"read {entry['epoch']}"))

  def epoch(state):
    events.append("begin")
    return original.epoch(state)

  train(dataclasses.replace(original, epoch=epoch), START)
  assert events[:5] == ["begin", "begin", "read 1", "begin", "read 2"]


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
  with pytest.raises(NonFiniteLoss, match=r"epoch 1, step 2: term generator/ce; lower the learning rate"):
    train(plan(tmp_path / "new", bad=1), START)
  with pytest.raises(NonFiniteLoss, match=r"epoch 4, step 2: term generator/ce; the checkpoint of epoch 2 is kept in"):
    train(plan(tmp_path, bad=4), START)
  assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["2"]
  tree, record = Checkpointer(tmp_path / "checkpoints").restore({"state": START, "best": best_like()})
  assert len(record["history"]) == 2 and int(tree["state"]["count"]) == 2


def test_the_first_iteration_that_is_not_finite_is_named():
  def losses(bad):
    """Generator: two steps in each of four iterations; student: one."""
    sizes = {"generator": 2, "student": 1}
    arrays = {key: np.ones((4, sizes[key[0]])) for key in bad} | {("student", "kd"): np.ones((4, 1))}
    for key, iteration in bad.items():
      arrays[key][iteration:] = np.nan
    return {
      player: Losses(
        total=arrays.get((player, "total"), np.ones((4, size))),
        terms={name: values for (owner, name), values in arrays.items() if owner == player and name != "total"},
      )
      for player, size in sizes.items()
    }

  def named(bad):
    return not_finite_in(losses(bad))

  generator = {("generator", "ce"): 2, ("generator", "total"): 2}
  assert named({**generator, ("student", "total"): 3}) == "step 3: term generator/ce"
  assert named({**generator, ("student", "total"): 2}) == "step 3: terms generator/ce, student/total"
  assert named({**generator, ("student", "total"): 0}) == "step 1: term student/total"
  assert named({}) == ""


def best_like():
  return {"accuracy": jnp.float32(0), "epoch": jnp.int32(0), "variables": jnp.ones(2)}


def test_event_files_are_readable(tmp_path):
  accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
  pictures = jnp.zeros((3, 4, 8, 8, 1), jnp.uint8)
  kept = diagnosing(plan(tmp_path))
  diagnose = kept.diagnose
  kept = dataclasses.replace(
    kept,
    diagnose=lambda *of: {**diagnose(*of), "grid": pictures},
    settings={"student.lr": 0.1, "student.milestones": (1, 2), "student.flip": True, "method": "cpsc"},
  )
  train(kept, START)
  events = accumulator.EventAccumulator(str(tmp_path / "events"))
  events.Reload()
  assert {"accuracy", "generator/ce", "generator/total", "epoch_seconds"} <= set(events.Tags()["scalars"])
  assert [e.step for e in events.Scalars("diagnostics/height")] == [2, 4, 6]
  grids = events.Images("grid")
  assert [(e.step, e.height, e.width) for e in grids] == [(step, 24, 32) for step in (2, 4, 6)]
  content = events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
  assert b"student.lr" in content and b"(1, 2)" in content
  assert [e.step for e in events.Scalars("accuracy")] == [1, 2, 3, 4, 5, 6]
  assert events.Scalars("generator/total")[1].value == pytest.approx(6.0)


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

  with pytest.raises(Preempted, match="stopped by SIGTERM; epoch 4 is saved") as stopped:
    train(dataclasses.replace(broken, epoch=epoch), START)
  assert stopped.value.exit_code == 75
  whole, resumed = train(plan(tmp_path / "whole", every=100), START), train(broken, START)
  assert resumed.history == whole.history
  np.testing.assert_array_equal(resumed.state["x"], whole.state["x"])


@pytest.mark.slow
def test_twenty_flipped_bytes(tmp_path, caplog):
  """Wherever the byte is, the run ends as if it had not been flipped; in what has a checksum the flip is named."""
  whole = train(plan(tmp_path / "whole"), START)
  train(plan(tmp_path / "parts", epochs=4), START)
  rng = np.random.default_rng(0)
  files = sorted(p.relative_to(tmp_path) for p in (tmp_path / "parts/checkpoints/4").rglob("*") if p.is_file())
  checked = [path for path in files if str(path.relative_to("parts/checkpoints/4")) not in NOT_CHECKED[1:]]
  assert len(files) == len(checked) + 2
  for path in [*files, *rng.choice(checked, 20)]:
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
    assert ("checkpoints/4 is damaged" in caplog.text) == (path in checked), path


def test_a_full_disk_harms_nothing_that_is_saved(small_disk, monkeypatch):
  # pytest has put its own hook in place of that of `checkpoint.silence`; it would format each complaint in its thread,
  # and CPython 3.11's ast.parse, which that takes, fails at times in several threads at once.
  monkeypatch.setattr(sys, "unraisablehook", lambda complaint: None)
  (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 16384))
  with pytest.raises(Refusal, match=r"checkpoints \(No space left on device\): nothing was saved; the same command"):
    train(plan(small_disk), START)
  (small_disk / "filler").unlink()
  train(plan(small_disk, epochs=2), START)
  (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
  with pytest.raises(Refusal, match=r"\(No space left on device\): that of epoch 2 is kept; nothing later"):
    train(plan(small_disk), START)
  (small_disk / "filler").unlink()
  resumed = train(plan(small_disk), START)
  assert len(resumed.history) == 6 and resumed.best_epoch == 3


def test_a_read_only_disk_is_refused(small_disk):
  train(plan(small_disk, epochs=2), START)
  subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
  with pytest.raises((Refusal, OSError), match="Read-only"):
    train(plan(small_disk), START)


# Several runs of one program.


def starts(number=3):
  """Stacked states; run i is i epochs further and so ends elsewhere."""
  return {
    "count": jnp.arange(number, dtype=jnp.int32),
    "x": jnp.ones((number, 2)) * jnp.arange(1.0, number + 1)[:, None],
  }


def together(tmp_path, bad=None, **options):
  """(the plan of all, the plan of each) of three runs; the loss of run i is not finite in epoch bad - i."""
  each = [dataclasses.replace(plan(tmp_path / f"run{i}", bad=bad, **options), title=f"run {i}") for i in range(3)]
  epoch = jax.jit(jax.vmap(plan(None, bad=bad).epoch))
  return dataclasses.replace(plan(tmp_path / "all", **options), epoch=epoch), each


def alone(each, i):
  return train(dataclasses.replace(each, workdir=None), jax.tree.map(lambda x: x[i], starts()))


def test_runs_together_end_as_each_alone(tmp_path):
  whole, each = together(tmp_path, epochs=4)
  for i, outcome in enumerate(train_together(whole, each, starts())):
    want = alone(each[i], i)
    assert outcome.history == want.history and outcome.best_epoch == want.best_epoch
    np.testing.assert_array_equal(outcome.state["x"], want.state["x"])
    np.testing.assert_array_equal(outcome.best_variables, want.best_variables)
    assert len(list((tmp_path / f"run{i}" / "events").iterdir())) == 1
    assert not (tmp_path / f"run{i}" / "checkpoints").exists(), "what is resumed is all of them"


def test_runs_together_are_resumed_together(tmp_path, capsys):
  whole, each = together(tmp_path, epochs=2)
  first = train_together(whole, each, starts())
  whole, each = together(tmp_path, epochs=4)
  for i, outcome in enumerate(train_together(whole, each, starts())):
    want = alone(each[i], i)
    assert outcome.history == want.history and outcome.earlier_seconds >= first[i].seconds * 0.5
    np.testing.assert_array_equal(outcome.state["x"], want.state["x"])
  assert "test: resuming after epoch 2 of 4" in capsys.readouterr().out


def test_a_run_that_is_not_finite_leaves_the_others_alone(tmp_path, capsys):
  whole, each = together(tmp_path, bad=3, epochs=4)
  states = {**starts(), "count": jnp.array([0, 3, 4], jnp.int32)}
  for again in range(2):
    failed, *others = train_together(whole, each, states)
    assert isinstance(failed, NonFiniteLoss) and "run 0: the loss is not finite in epoch 3, step 2" in str(failed)
    assert [len(outcome.history) for outcome in others] == [4, 4]
    assert ("The other runs go on." in capsys.readouterr().out) != again, "the second time it is known already"


def test_when_no_run_is_finite_it_is_over(tmp_path):
  whole, each = together(tmp_path, bad=3, epochs=40)
  outcomes = train_together(whole, each, {**starts(), "count": jnp.zeros(3, jnp.int32)})
  assert all(isinstance(outcome, NonFiniteLoss) for outcome in outcomes)


def test_a_run_goes_on_from_an_outcome_that_was_saved(tmp_path):
  want, short = train(plan(None), START), train(plan(None, epochs=2), START)
  save(plan(tmp_path), short)
  got = train(plan(tmp_path), START)
  assert got.history == want.history and got.best_epoch == want.best_epoch
  whole, each = together(tmp_path, epochs=4)
  first = [alone(dataclasses.replace(run, epochs=2), i) for i, run in enumerate(each)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *(outcome.state for outcome in first))
  save_together(whole, each, stacked, first)
  for i, outcome in enumerate(train_together(whole, each, starts())):
    assert outcome.history == alone(each[i], i).history
