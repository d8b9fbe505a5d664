"""benchmarks/speed.py measures two sides that compute the same."""

import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY))


@pytest.mark.slow
def test_speed_measures_two_sides_that_compute_the_same():
  speed = pytest.importorskip("benchmarks.speed")
  row = speed.measure("wrn_10_1", "wrn_10_1", batch=8, rounds=1)
  assert row["pair"] == "wrn_10_1 -> wrn_10_1" and row["ratio"] > 0
  assert all(row[player][key] > 0 for player in ("generator", "student") for key in ("ms", "torch_ms", "ratio"))
  with pytest.raises(ValueError, match="no PyTorch version of 'vgg11' here"):
    speed.twin("vgg11")
