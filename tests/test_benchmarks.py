"""speed.py measures two sides that compute the same, busy.py what a device does, gpu.py what is wrong on one."""

import json
import sys

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
  assert gpu.main([f"--out={tmp_path / 'gpu.json'}", "--toy", "--methods=dafl"]) == 0
  found = json.loads((tmp_path / "gpu.json").read_text())
  assert found["wrong"] == [] and found["speed wrn_10_1"]["precision"] == "bfloat16"
  assert set(found["differences dafl"]["float32"].values()) == {0.0}, "here the device is the CPU itself"
  assert 0 < found["differences dafl"]["bfloat16"]["first"] < 0.05
  assert gpu.main([f"--out={tmp_path / 'none.json'}", "--toy", "--methods=nobody"]) == 1
  assert json.loads((tmp_path / "none.json").read_text())["wrong"] == ["differences nobody"]
  assert (
    gpu.main([f"--out={tmp_path / 'late.json'}", "--toy", "--budget=0s"]) == 0 and not (tmp_path / "late.json").exists()
  )


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
