"""benchmarks/methods.py: its rows, its table, that finished rows are not run again, and what it refuses."""

import json
import subprocess
import sys

import pytest
from conftest import REPOSITORY

from cpsc_jax.errors import Refusal
from cpsc_jax.methods import METHODS

sys.path.insert(0, str(REPOSITORY))

from benchmarks import methods

DIGITS = REPOSITORY / "configs" / "digits.py"


def result(seed, last, best):
  def accuracy(value):
    return {"epoch": 1, "accuracy": value, "agreement": value}

  return {
    "seed": seed,
    "arm": "distill",
    "method": "cpsc",
    "teacher": {"accuracy": 0.99},
    "student": {"last": accuracy(last), "best": accuracy(best)},
    "generator": None,
    "evaluation": {"split": "test", "images": 454},
    "samples": {"generator": 1000, "student": 2000},
    "seconds": 30.0,
    "seconds_by_part": {"teacher": 1.0, "student": 20.0 + seed},
    "hardware": {"cores": 1, "cpu": "a CPU"},
  }


@pytest.mark.parametrize(("config", "variant"), [(DIGITS, "digits"), (f"{DIGITS}:smoke", "digits_smoke")])
def test_every_method_and_arm_has_a_row_whose_config_exists(config, variant):
  rows = methods.rows(config)
  assert list(rows)[: len(METHODS)] == list(METHODS)
  assert set(rows) - set(METHODS) == {"cpsc + triplets", "untrained_generator", "real_kd", "real_labels"}
  for method in METHODS:
    file, _, found = str(rows[method][0]).partition(":")
    assert REPOSITORY.joinpath(file).is_file() and (method == "cpsc" or found == variant)
  with pytest.raises(Refusal, match="digits.py and cifar10.py"):
    methods.rows(REPOSITORY / "configs" / "cifar100.py")


def test_table_and_json(tmp_path):
  for seed, last in enumerate((0.98, 0.97, 0.96)):
    workdir = methods.folder(tmp_path, "cpsc + triplets", seed)
    workdir.mkdir()
    (workdir / "results.json").write_text(json.dumps(result(seed, last, 0.985)))
  methods.write(tmp_path, methods.finished_results(tmp_path, ["cpsc + triplets", "dafl"], 3))
  text = (tmp_path / "methods.md").read_text()
  row = (
    "| cpsc + triplets | 0, 1, 2 | 0.9800, 0.9700, 0.9600 | 0.9700 | 0.9850, 0.9850, 0.9850 | 0.9850 | 0.0200 | 21 s |"
  )
  assert row in text and "| dafl | not measured |" in text and "1 core(s) of a CPU" in text
  assert "Accuracies on 454 test images." in text
  brief = json.loads((tmp_path / "methods.json").read_text())
  assert [entry["student"]["last"]["accuracy"] for entry in brief["cpsc + triplets"]] == [0.98, 0.97, 0.96]
  assert brief["dafl"] == [] and brief["cpsc + triplets"][0]["evaluation"]["split"] == "test"


def test_table_of_nothing(tmp_path):
  methods.write(tmp_path, methods.finished_results(tmp_path, ["dafl"], 3))
  assert "| dafl | not measured |" in (tmp_path / "methods.md").read_text()


def test_cores_are_divided_among_the_jobs():
  for jobs in (1, 2, 64):
    shares = methods.shares(jobs)
    assert len(shares) <= jobs and sum(map(len, shares)) == len(set().union(*shares)) > 0


def test_refusals(capsys):
  for flags, word in (
    (["--only=nobody"], "no row 'nobody'; choose from cpsc, rgal"),
    (["--config=configs/none.py"], "no config file"),
    (["--config=none"], "no config 'none'"),
    (["--seed=3"], "unknown flag '--seed=3'"),
  ):
    assert methods.main(flags) == 2
    assert word in capsys.readouterr().err


def test_a_run_that_fails_is_named(tmp_path):
  with pytest.raises(Refusal, match=r"dafl-0 failed with 2: cpsc_jax: .*no key 'no_such'"):
    methods.run(f"{DIGITS}:smoke", ["--config.no_such=1"], tmp_path / "dafl-0", {0})


@pytest.mark.slow
def test_finished_rows_are_not_run_again(tmp_path, digits_dir):
  argv = [f"--config={DIGITS}:smoke", "--seeds=1", "--only=dfad", f"--out={tmp_path / 'm'}"]
  argv += [f"--config.dataset.data_dir={digits_dir}"]

  def run():
    command = [sys.executable, "-m", "benchmarks.methods", *argv]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)

  assert "| dfad | 0 |" in run().stdout
  written = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").glob("*/results.json")}
  assert len(written) == 2, "the row, and real_labels for its teacher"
  taught = json.loads((tmp_path / "m" / "dfad-0" / "results.json").read_text())["teacher"]["checkpoint"]
  assert taught.endswith("real_labels-0/teacher")
  run()
  assert all(path.stat().st_mtime_ns == when for path, when in written.items())


def test_a_table_over_seeds(tmp_path):
  from benchmarks import seeds

  for arm, values in {"distill": (0.98, 0.97), "real_kd": (0.99,)}.items():
    for seed, last in enumerate(values, start=10):
      entry = {**result(seed, last, 0.985), "evaluation": {"split": "test", "images": 454}}
      entry["teacher"] = {"net": "wrn_16_1", "accuracy": 0.99}
      entry["student"]["net"] = "wrn_10_1"
      entry["generator"] = {"label_fidelity": 0.9 + seed / 1000} if arm == "distill" else None
      seeds.folder(tmp_path, arm, seed).mkdir()
      (seeds.folder(tmp_path, arm, seed) / "results.json").write_text(json.dumps(entry))
  page = tmp_path / "page.md"
  page.write_text("before\n<!-- seeds -->\nold\n<!-- /seeds -->\nafter\n")
  found = seeds.results(tmp_path, ["distill", "real_kd"], [10, 11])
  seeds.write(tmp_path, found, page)
  text = page.read_text()
  assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
  row = "| `distill`, wrn_10_1 | 0.9800 (0.9850 at 1) | 0.9700 (0.9850 at 1) | 0.9750 | 0.0071 | 0.910 to 0.911 | 30 |"
  assert row in text and "| teacher, wrn_16_1 | 0.9900 | 0.9900 | 0.9900 | 0.0000 |" in text
  assert "| `real_kd`, wrn_10_1 | 0.9900 (0.9850 at 1) | not measured | 0.9900 |  |" in text
  seeds.write(tmp_path, found, page)
  assert page.read_text() == text, "writing again changes nothing"
  page.write_text("no marks")
  with pytest.raises(Refusal, match="lacks the marks"):
    seeds.write(tmp_path, found, page)
  assert seeds.seeds_of("10-12") == [10, 11, 12] and seeds.seeds_of("3,5") == [3, 5]
  assert seeds.main(["--arms=nobody"]) == 2 and seeds.main(["--seeds=a-b"]) == 2


@pytest.mark.slow
def test_speed_measures_two_sides_that_compute_the_same():
  speed = pytest.importorskip("benchmarks.speed")
  row = speed.measure("wrn_10_1", "wrn_10_1", batch=8, rounds=1)
  assert row["pair"] == "wrn_10_1 -> wrn_10_1" and row["ratio"] > 0
  assert all(row[player][key] > 0 for player in ("generator", "student") for key in ("ms", "torch_ms", "ratio"))
  with pytest.raises(ValueError, match="no PyTorch version of 'vgg11' here"):
    speed.twin("vgg11")
