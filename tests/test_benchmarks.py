"""speed.py measures two sides that compute the same, busy.py what a device does, gpu.py what is wrong on one."""

import json
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))


@pytest.mark.slow
def test_speed_measures_two_sides_that_compute_the_same():
  speed = pytest.importorskip("benchmarks.speed")
  row = speed.measure("wrn_10_1", "wrn_10_1", batch=8, rounds=1)
  assert row["pair"] == "wrn_10_1 -> wrn_10_1" and row["ratio"] > 0
  keys = ("ms", "torch_ms", "ratio", "flop", "of_peak", "peak_mib")
  assert all(row[player][key] > 0 for player in ("generator", "student") for key in keys)
  # two networks, 8 images: 2 x multiplications of 3x3 convolutions of WRN-10-1, forward, and backward in the student
  assert 0.3e9 < row["student"]["flop"] < 5e9
  with pytest.raises(ValueError, match="no PyTorch version of 'vgg11' here"):
    speed.twin("vgg11")


@pytest.mark.slow
def test_the_first_call_on_a_gpu_goes_through_on_a_cpu(tmp_path):
  gpu = pytest.importorskip("benchmarks.gpu")
  assert gpu.main([f"--out={tmp_path / 'gpu.json'}", "--toy", "--methods=dafl,quantise"]) == 0
  found = json.loads((tmp_path / "gpu.json").read_text())
  assert found["wrong"] == [] and found["speed wrn_10_1"]["precision"] == "bfloat16"
  assert set(found["differences dafl"]["float32"].values()) == {0.0}, "here the device is the CPU itself"
  assert set(found["differences quantise"]["float32"].values()) == {0.0}
  assert 0 < found["differences dafl"]["bfloat16"]["first"] < 0.05
  assert gpu.main([f"--out={tmp_path / 'none.json'}", "--toy", "--methods=nobody"]) == 1
  assert json.loads((tmp_path / "none.json").read_text())["wrong"] == ["differences nobody"]
  assert (
    gpu.main([f"--out={tmp_path / 'late.json'}", "--toy", "--budget=0s"]) == 0 and not (tmp_path / "late.json").exists()
  )


@pytest.mark.slow
def test_the_sides_of_a_sweep_are_timed_and_compared(digits_dir, tmp_path, capsys):
  sweep = pytest.importorskip("benchmarks.sweep")
  flags = ["--config=digits:smoke", "--grid=student.lr=0.2", "--seeds=1", "--rounds=1"]
  assert sweep.main([*flags, f"--config.dataset.data_dir={digits_dir}", f"--out={tmp_path / 'out.json'}"]) == 0
  row = json.loads((tmp_path / "out.json").read_text())
  assert row["members"] == 2 and row["together"] == [2]
  assert all(
    row["ratios"][side] == pytest.approx(row["seconds"]["together"][0] / row["seconds"][side][0])
    for side in ("alone", "commands")
  )
  assert row["differences"]["losses of the first epoch"] < 1e-3
  assert sweep.main([*flags, "--config.student.rl=1"]) == 2 and sweep.main([*flags, "--speed"]) == 2
  said = capsys.readouterr().err
  assert "a sweep failed with 2: cpsc_jax: the config has no key 'student.rl'" in said and "--speed is not an" in said


@pytest.mark.slow
def test_the_program_of_members_is_timed_alone(digits_dir, tmp_path):
  sweep = pytest.importorskip("benchmarks.sweep")
  flags = ["--config=digits:smoke", "--program=2", "--rounds=2", f"--config.dataset.data_dir={digits_dir}"]
  assert sweep.main([*flags, f"--out={tmp_path / 'out.json'}"]) == 0
  row = json.loads((tmp_path / "out.json").read_text())
  assert row["members"] == 2 and {side: len(ms) for side, ms in row["ms"].items()} == {"together": 2, "alone": 2}
  assert row["ratio"] == pytest.approx(np.median(row["ms"]["together"]) / np.median(row["ms"]["alone"]))


@pytest.mark.parametrize(
  "flags, says",
  [
    (["--program=0"], "--program is 0; it must be at least 1"),
    (["--rounds=0"], "--rounds is 0; it must be at least 1"),
    (["--program=2", "--grid=student.lr=0.2"], "leave --grid and --seeds out"),
    (["--program=2", "--seeds=0"], "leave --grid and --seeds out"),
  ],
)
def test_a_sweep_refuses_what_it_would_not_measure(flags, says, capsys):
  sweep = pytest.importorskip("benchmarks.sweep")
  assert sweep.main(flags) == 2 and says in capsys.readouterr().err


def test_the_differences_of_sweeps_are_those_of_their_members(tmp_path):
  sweep = pytest.importorskip("benchmarks.sweep")
  from cpsc_jax.errors import Refusal

  for side, accuracy, total in (("a", 0.9, 2.0), ("b", 0.8, 2.1)):
    folder = tmp_path / side / "members" / "base-0"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"student": {"last": {"accuracy": accuracy}}}))
    (folder / "history.json").write_text(json.dumps({"student": [{"totals": {"student": total}}]}))
  found = sweep.differences(tmp_path / "a", tmp_path / "b")
  assert found == pytest.approx({"accuracy": 0.1, "losses of the first epoch": 0.05})
  with pytest.raises(Refusal, match="different members"):
    sweep.differences(tmp_path / "a", tmp_path / "none")


def test_busy_time_is_the_union_of_what_overlaps():
  busy = pytest.importorskip("benchmarks.busy")
  assert busy.union([(4, 5), (0, 2), (1, 3), (1.5, 2.5), (5, 6)]) == 5
  assert busy.union([]) == 0


@pytest.mark.slow
def test_the_share_in_which_the_device_computes(digits_dir, tmp_path, capsys):
  busy = pytest.importorskip("benchmarks.busy")
  flags = ("--config=digits", f"--config.dataset.data_dir={digits_dir}", f"--workdir={tmp_path}")
  short = ("--config.teacher.epochs=1", "--config.schedule.epochs=5", "--config.schedule.iterations=4")
  assert 0.2 < busy.measure([*flags, *short], 2) <= 1.01
  with pytest.raises(SystemExit, match="no 9 epochs to distil"):
    busy.measure([*flags, *short, "--config.seed=1", f"--workdir={tmp_path / 'other'}"], 6)


def test_a_diagnosis_is_compared_with_the_epochs_that_it_covers():
  diagnostics = pytest.importorskip("benchmarks.diagnostics")
  # ten epochs of 2 s and two evaluations of 5 s
  assert diagnostics.share_of(1.5, 2.0, 5.0, cadence=10, every=5) == pytest.approx(1.5 / 30)


@pytest.mark.slow
def test_what_diagnoses_cost(tmp_path, capsys):
  diagnostics = pytest.importorskip("benchmarks.diagnostics")
  flags = ["--config=digits:smoke", "--rounds=2", "--epochs=1", f"--out={tmp_path / 'out.json'}"]
  assert diagnostics.main(flags) == 0
  (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert row["diagnostics_every"] == 10 and all(len(values) == 2 for values in row["seconds"].values())
  for parts in zip(*(row["seconds"][name] for name in ("diagnosis", "epoch", "evaluation", "share")), strict=True):
    assert parts[3] == pytest.approx(parts[0] / (10 * parts[1] + 10 * parts[2])) and min(parts) > 0
  capsys.readouterr()
  for wrong, said in (
    ("--config.evaluate.diagnostics_every=0", "there are no diagnoses to time"),
    ("--config.dataset.name=mine", "config.dataset.name is 'mine'"),
    ("--speed=1", "--speed=1 is not an option"),
    ("--rounds=0", "--rounds is 0"),
  ):
    assert diagnostics.main([*flags, wrong]) == 2
    assert said in capsys.readouterr().err
