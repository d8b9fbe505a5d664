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
  accuracy = lambda value: {"epoch": 1, "accuracy": value, "agreement": value}
  return {
    "seed": seed,
    "arm": "distill",
    "method": "cpsc",
    "teacher": {"accuracy": 0.99},
    "student": {"last": accuracy(last), "best": accuracy(best)},
    "generator": None,
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
  methods.write(tmp_path, methods.figures(tmp_path, ["cpsc + triplets", "dafl"], 3))
  text = (tmp_path / "methods.md").read_text()
  row = (
    "| cpsc + triplets | 0, 1, 2 | 0.9800, 0.9700, 0.9600 | 0.9700 | 0.9850, 0.9850, 0.9850 | 0.9850 | 0.0200 | 21 s |"
  )
  assert row in text and "| dafl | not measured |" in text and "1 core(s) of a CPU" in text
  brief = json.loads((tmp_path / "methods.json").read_text())
  assert [entry["student"]["last"]["accuracy"] for entry in brief["cpsc + triplets"]] == [0.98, 0.97, 0.96]
  assert brief["dafl"] == []


def test_cores_are_dealt_out():
  for jobs in (1, 2, 64):
    dealt = methods.shares(jobs)
    assert len(dealt) <= jobs and sum(map(len, dealt)) == len(set().union(*dealt)) > 0


def test_refusals(capsys):
  for flags, word in (
    (["--only=nobody"], "no row 'nobody'; there are cpsc, rgal"),
    (["--config=configs/none.py"], "no config file"),
    (["--seed=3"], "'--seed=3' is neither"),
  ):
    assert methods.main(flags) == 2
    assert word in capsys.readouterr().err


def test_a_run_that_fails_is_named(tmp_path):
  with pytest.raises(Refusal, match=r"dafl-0 failed with 2: cpsc_jax: .*no key 'no_such'"):
    methods.run(f"{DIGITS}:smoke", ["--config.no_such=1"], tmp_path / "dafl-0", {0})


def test_finished_rows_are_not_run_again(tmp_path, digits_dir):
  argv = [f"--config={DIGITS}:smoke", "--seeds=1", "--only=dfad", f"--out={tmp_path / 'm'}"]
  argv += [f"--config.dataset.data_dir={digits_dir}"]
  run = lambda: subprocess.run(
    [sys.executable, "-m", "benchmarks.methods", *argv], cwd=REPOSITORY, check=True, capture_output=True, text=True
  )
  assert "| dfad | 0 |" in run().stdout
  written = {path: path.stat().st_mtime_ns for path in (tmp_path / "m").glob("*/results.json")}
  assert len(written) == 2, "the row, and real_labels for its teacher"
  taught = json.loads((tmp_path / "m" / "dfad-0" / "results.json").read_text())["teacher"]["checkpoint"]
  assert taught.endswith("real_labels-0/teacher")
  run()
  assert all(path.stat().st_mtime_ns == when for path, when in written.items())
