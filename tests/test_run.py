"""Whole runs through the command line: what they leave, that they resume bit for bit, and what they refuse."""

import ctypes
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPOSITORY, SMOKE, command, shared, with_devices

from cpsc_jax import checkpoint
from cpsc_jax.main import main


def results_of(workdir):
  return json.loads((workdir / "results.json").read_text())


def first_epoch(workdir):
  """The student's first entry in history.json."""
  return json.loads((workdir / "history.json").read_text())["student"][0]


def test_results(finished):
  results = results_of(finished)
  assert results["arm"] == "distill" and results["method"] == "cpsc" and results["headline"] == "last"
  for figure in (
    results["teacher"]["accuracy"],
    results["student"]["last"]["accuracy"],
    results["student"]["best"]["accuracy"],
  ):
    assert 0 <= figure <= 1 and round(figure * 454) == pytest.approx(figure * 454, abs=1e-3), (
      "a fraction of the whole split"
    )
  assert results["student"]["best"]["accuracy"] >= results["student"]["last"]["accuracy"]
  assert 1 <= results["student"]["best"]["epoch"] <= 2 and results["student"]["last"]["epoch"] == 2
  assert results["agreement"] == results["student"]["last"]["agreement"]
  fidelity = results["generator"]["label_fidelity_per_class"]
  assert len(fidelity) == 10 and results["generator"]["label_fidelity"] == pytest.approx(np.mean(fidelity))
  assert results["student"]["parameters"] == 77562
  assert results["samples"] == {"generator": 2 * 2 * 32, "student": 2 * 2 * 32}
  assert results["evaluation"] == {"split": "test", "images": 454}
  assert {"jax", "flax", "optax", "python"} <= results["versions"].keys()
  assert results["hardware"]["platform"] == "cpu" and results["seconds"] > 0
  assert results["config"] == json.loads((finished / "config.json").read_text())
  (here,) = results["environments"]
  assert here["devices"] == 1 and results["versions"].items() <= here.items() and len(here["source"]) == 12
  assert results["seconds"] >= sum(results["seconds_by_part"].values()) > 0


def test_history(finished):
  """Terms are means over an epoch, without weights; a total is their weighted sum."""
  history = json.loads((finished / "history.json").read_text())
  weights = results_of(finished)["config"]["loss"]
  assert [entry["epoch"] for entry in history["student"]] == [1, 2]
  for entry in history["student"]:
    scores = {"accuracy", "agreement", "label_fidelity"}
    assert entry.keys() - {"diagnostics"} == {"epoch", "terms", "totals", *scores}
    named = [name.split("/") for name in entry["terms"]]
    for player in ("generator", "student"):
      ours = {term: weights[player][term] for who, term in named if who == player}
      assert ours == {term: weight for term, weight in weights[player].items() if weight and term != "head"}
      total = sum(weight * entry["terms"][f"{player}/{term}"] for term, weight in ours.items())
      assert entry["totals"][player] == pytest.approx(total, rel=1e-5)
  (entry,) = history["teacher"]
  assert entry["totals"] == {"student": pytest.approx(entry["terms"]["student/ce"])}


def test_files(finished):
  import matplotlib.image

  names = {path.name for path in finished.iterdir()}
  assert {
    "results.json",
    "config.json",
    "origin.json",
    "samples.png",
    "curves.png",
    "report.html",
    "diagnostics",
    "history.json",
    "events",
    "teacher",
    "student",
  } <= names
  assert list((finished / "events").glob("events.*"))
  assert not [name for name in names if "partial" in name]
  for picture in ("samples.png", "curves.png"):
    pixels = matplotlib.image.imread(finished / picture)
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05, f"{picture} shows nothing"


def test_saved_nets_reproduce_the_figures(finished, digits_dir):
  import jax
  import jax.numpy as jnp

  from cpsc_jax import datasets, evaluate, nets
  from cpsc_jax.mesh import make_mesh

  test = datasets.find("digits", digits_dir).load_evaluation("test")
  results = results_of(finished)
  for folder, want in (
    ("teacher", results["teacher"]["accuracy"]),
    ("student", results["student"]["last"]["accuracy"]),
    ("student_best", results["student"]["best"]["accuracy"]),
  ):
    card = checkpoint.read_card(finished / folder)
    net = nets.classifier(card["net"], card["num_classes"])
    like = nets.init(net, jax.random.key(0), jnp.zeros((2, 8, 8, 1)))
    variables, card = checkpoint.load_net(finished / folder, like)
    classify = evaluate.compile_classifier(net, card["mean"], card["std"], 64, make_mesh())
    assert float(evaluate.share_equal(classify(variables, test.images).labels, test.labels)) == pytest.approx(want)
  assert checkpoint.read_card(finished / "teacher")["digest"] == results["teacher"]["digest"]


def test_a_finished_run_is_left_alone(finished, digits_dir, capsys):
  before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
  start = time.monotonic()
  assert main(command(finished, digits_dir)) == 0
  assert time.monotonic() - start < 10
  assert "is finished already" in capsys.readouterr().out
  assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_workdir_of_another_config_is_refused(finished, digits_dir, capsys):
  assert main(command(finished, digits_dir, "--config.student.lr=0.05", "--config.seed=3")) == 2
  error = capsys.readouterr().err
  assert "seed, student.lr" in error and "--workdir" in error and error.count("\n") == 1


@pytest.mark.parametrize("arm", ["untrained_generator", "real_kd", "real_labels"])
def test_control_arms(finished, digits_dir, tmp_path, arm):
  flags = (f"--config.arm={arm}", f"--config.teacher.checkpoint={finished / 'teacher'}")
  assert main(command(tmp_path / arm, digits_dir, *flags)) == 0
  results = results_of(tmp_path / arm)
  assert results["arm"] == arm
  assert results["teacher"]["digest"] == results_of(finished)["teacher"]["digest"]
  assert results["samples"]["generator"] == 0 and results["samples"]["student"] == 128
  entry = first_epoch(tmp_path / arm)
  terms = entry["terms"].keys()
  if arm == "untrained_generator":
    assert results["generator"]["label_fidelity"] <= 0.5 and (tmp_path / arm / "samples.png").exists()
  else:
    assert results["generator"] is None and not (tmp_path / arm / "samples.png").exists()
  assert ("student/kd" in terms) == (arm != "real_labels")
  assert not any(name.startswith("generator") for name in terms), "no generator step was taken"
  assert entry["totals"].keys() == {"student"}


def test_control_arms_augment_as_the_student_does(digits_dir):
  """Not as the teacher was augmented in its training."""
  import jax
  from cpsc_jax.configs import digits

  from cpsc_jax import config, datasets, experiment, teach
  from cpsc_jax.mesh import make_mesh

  data, mesh = datasets.find("digits", digits_dir), make_mesh()
  c = digits.get_config("smoke")
  c.arm, c.teacher.crop_pad = "real_labels", 3
  for crop_pad in (0, 2):
    c.student.crop_pad = crop_pad
    resolved, card = config.resolve(c, data.spec, mesh), teach.describe_teacher(c, data)
    net = experiment.build_teacher(resolved, card)
    teacher = teach.Teacher(net, {}, card)
    setup, *_ = teach.real_arm(resolved, experiment.build(resolved, data.spec, net, card, mesh), teacher, data)
    if not crop_pad:
      assert setup.student.augment is None
      continue
    images = 1.0 + jax.random.uniform(jax.random.key(0), (200, 8, 8, 1))
    rows = np.asarray(setup.student.augment(jax.random.key(1), images) > 1).any(axis=(2, 3)).sum(axis=1)
    assert rows.min() == 8 - crop_pad and rows.max() == 8, "black rows come in from one side"


@pytest.mark.slow
def test_reference_mode_runs(finished, digits_dir, tmp_path):
  flags = ("--config.reference=True", f"--config.teacher.checkpoint={finished / 'teacher'}")
  assert main(command(tmp_path / "r", digits_dir, *flags)) == 0
  results = results_of(tmp_path / "r")
  assert results["reference"] and results["headline"] == "best" and results["config"]["precision"] == "float16"


def test_evaluating_on_the_validation_part(tmp_path, digits_dir, capsys, monkeypatch):
  """A fifth of the 1,343 training images: held out of all training, reported by that name."""
  from cpsc_jax import datasets

  held_out = datasets.find("digits", digits_dir).load_evaluation("validation")
  trained_on, load_train = [], datasets.Data.load_train

  def watched(data, split):
    trained_on.append(load_train(data, split))
    return trained_on[-1]

  monkeypatch.setattr(datasets.Data, "load_train", watched)
  argv = command(tmp_path / "w", digits_dir, "--config.evaluate.split=validation", "--config.arm=real_labels")
  assert main(argv) == 0
  shown = capsys.readouterr().out
  assert "on the 1,075 training images" in shown or "on the 1075 training images" in shown
  assert "on the validation split" in shown and "268 validation images" in shown
  results = results_of(tmp_path / "w")
  assert results["evaluation"] == {"split": "validation", "images": 268}
  for accuracy in (results["teacher"]["accuracy"], results["student"]["last"]["accuracy"]):
    assert round(accuracy * 268) == pytest.approx(accuracy * 268, abs=1e-3)
  assert checkpoint.read_card(tmp_path / "w" / "teacher")["evaluated_on"] == "validation"
  assert [len(split) for split in trained_on] == [1075, 1075], "of the teacher and of the control arm"
  ours, theirs = ({image.tobytes() for image in np.asarray(s.images)} for s in (held_out, trained_on[0]))
  assert len(ours) == 268 and not ours & theirs
  assert main([*argv, "--config.evaluate.split=test"]) == 2
  assert "evaluate.split" in capsys.readouterr().err


WRN_10_2 = 303418


@pytest.mark.slow
def test_other_nets_with_a_head(finished, digits_dir, tmp_path):
  flags = ("--config.student.net=wrn_10_2", f"--config.teacher.checkpoint={finished / 'teacher'}")
  assert main(command(tmp_path / "h", digits_dir, *flags)) == 0
  assert "student/head" in first_epoch(tmp_path / "h")["terms"]
  assert set(checkpoint.read_card(tmp_path / "h" / "student")) >= {"net", "num_classes"}
  assert results_of(tmp_path / "h")["student"]["parameters"] == WRN_10_2, "what is deployed has no head"


# Killed and resumed.

LONG = ("--config.schedule.epochs=8", "--config.teacher.epochs=6", "--config.checkpoint.every=2")


def spawn(workdir, digits_dir, *flags):
  argv = [sys.executable, "-m", "cpsc_jax.main", *command(workdir, digits_dir, *flags)[1:]]
  return subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_at(process, pattern):
  """Sends SIGKILL when a line of output matches; returns whether one did."""
  for line in process.stdout:
    if re.search(pattern, line):
      os.kill(process.pid, signal.SIGKILL)
      process.wait()
      return True
  process.wait()
  return False


def outcome(workdir):
  history = json.loads((workdir / "history.json").read_text())
  results = results_of(workdir)
  cards = {
    folder: checkpoint.read_card(workdir / folder)["digest"]
    for folder in ("teacher", "student", "student_best", "generator")
  }
  return cards, history, results["student"], results["generator"], results["teacher"], diagnoses(workdir)


def diagnoses(workdir):
  """The bytes of every array that diagnoses left, but for the clock's."""
  found = {}
  for path in sorted((workdir / "diagnostics").glob("*.npz")):
    with np.load(path) as arrays:
      found[path.name] = {name: arrays[name].tobytes() for name in arrays.files if name != "epoch_seconds"}
  assert found
  return found


IN_THE_TEACHER, BEFORE_THE_FIRST, AFTER_AN_EPOCH = r"teacher: epoch 1/", r"distill: 8 epochs", r"distill: epoch 1/"


@pytest.mark.parametrize(
  "patterns",
  [
    (IN_THE_TEACHER,),
    pytest.param((IN_THE_TEACHER, BEFORE_THE_FIRST, AFTER_AN_EPOCH), marks=pytest.mark.slow),
  ],
  ids=len,
)
def test_killed_and_resumed_ends_bit_identical(tmp_path, digits_dir, monkeypatch, patterns):
  monkeypatch.setattr("cpsc_jax.progress.SECONDS_BETWEEN_LINES", 0.0)
  assert main(command(tmp_path / "whole", digits_dir, *LONG)) == 0
  broken = tmp_path / "broken"
  for pattern in patterns:
    assert kill_at(spawn(broken, digits_dir, *LONG), pattern), f"never saw {pattern}"
    assert not (broken / "results.json").exists()
  process = spawn(broken, digits_dir, *LONG)  # kill once more, in the distillation, at no particular moment
  deadline = time.monotonic() + 120
  while not list((broken / "checkpoints").glob("[0-9]*")) and process.poll() is None and time.monotonic() < deadline:
    time.sleep(0.02)
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
  assert main(command(broken, digits_dir, *LONG)) == 0
  assert outcome(broken) == outcome(tmp_path / "whole")


# Refusals: one sentence on stderr, exit code 2, no traceback, nothing done.


def refused(capsys, argv, *words, code=2):
  start = time.monotonic()
  assert main(["main", *argv]) == code
  error = capsys.readouterr().err
  assert error.startswith("cpsc_jax: ") and error.count("\n") == 1 and "Traceback" not in error, error
  for word in words:
    assert word in error, error
  assert time.monotonic() - start < 20
  return error


def test_bad_flags_are_refused(capsys, tmp_path):
  w = f"--workdir={tmp_path / 'w'}"
  refused(capsys, [w], "--config")
  refused(capsys, ["--config=nowhere.py", w], "nowhere.py")
  refused(capsys, [SMOKE, w, "--config.student.learning_rate=1"], "learning_rate")
  refused(capsys, [SMOKE, w, "--config.student.lr=fast"], "fast")
  refused(capsys, [SMOKE.replace(":smoke", ":quick"), w], "no variant 'quick'")
  refused(capsys, [SMOKE, w, "--confg=1"], "confg")
  refused(capsys, [SMOKE, w, "train"], "unexpected argument 'train'")
  refused(capsys, [SMOKE, w, "--config.student.net=resnet19"], "no net 'resnet19'", "did you mean 'resnet18'")
  refused(capsys, [SMOKE, w, "--config.dataset.name=mnist"], "no data set 'mnist'")
  refused(capsys, [SMOKE, w, "--config.arm=none"], "real_labels")
  refused(capsys, [SMOKE, w, "--config.precision=float8"], "config.precision is 'float8'")
  refused(capsys, [SMOKE, "--workdir=gs://bucket/run"], "mount the bucket")
  assert not (tmp_path / "w").exists(), "nothing is made before the config is right"


def test_missing_data_names_the_command(capsys, tmp_path):
  config = f"--config={REPOSITORY / 'configs' / 'cifar10.py'}:smoke"
  argv = [config, f"--workdir={tmp_path / 'w'}", f"--config.dataset.data_dir={tmp_path}"]
  refused(capsys, argv, f"cpsc-jax prepare cifar10 --data_dir {tmp_path}")
  assert not (tmp_path / "w").exists()


def test_misfit_teachers_are_refused(capsys, tmp_path, digits_dir, finished):
  def where(path):
    return f"--config.teacher.checkpoint={path}"

  argv = command(tmp_path / "w", digits_dir)[1:]
  refused(capsys, [*argv, where(tmp_path / "nothing")], "no saved net")
  for key, value in (("num_classes", 100), ("image_size", 32), ("channels", 3)):
    folder = tmp_path / key
    folder.mkdir()
    card = {**checkpoint.read_card(finished / "teacher"), key: value}
    card |= {"mean": [0.5] * card["channels"], "std": [0.5] * card["channels"]}
    (folder / checkpoint.CARD).write_text(json.dumps(checkpoint.sealed(card)))
    refused(capsys, [*argv, where(folder)], key, str(value), "config.dataset.name")


def test_a_teacher_that_saw_the_validation_part_is_refused(capsys, tmp_path, digits_dir, finished):
  flags = (f"--config.teacher.checkpoint={finished / 'teacher'}", "--config.evaluate.split=validation")
  argv = command(tmp_path / "w", digits_dir, *flags)[1:]
  refused(capsys, argv, "trained on the whole training split", "config.evaluate.split=validation")
  assert not (tmp_path / "w").exists()


def test_a_damaged_teacher_is_refused(capsys, tmp_path, digits_dir, finished):
  shutil.copytree(finished / "teacher", tmp_path / "teacher")
  card = checkpoint.read_card(tmp_path / "teacher")
  argv = [*command(tmp_path / "w", digits_dir)[1:], f"--config.teacher.checkpoint={tmp_path / 'teacher'}"]
  for damage in ({"digest": "0" * 64}, {"mean": [0.0]}, {"std": [1.0]}):
    (tmp_path / "teacher" / checkpoint.CARD).write_text(json.dumps(card | damage))
    refused(capsys, argv, "net.json was changed since it was written")
  (tmp_path / "teacher" / checkpoint.CARD).write_text(json.dumps(checkpoint.sealed({**card, "digest": "0" * 64})))
  refused(capsys, argv, "damaged")


def test_a_workdir_that_cannot_be_used_is_refused(capsys, tmp_path, digits_dir):
  (tmp_path / "file").write_text("")
  refused(capsys, command(tmp_path / "file" / "w", digits_dir)[1:], "cannot ")
  (tmp_path / "other").mkdir()
  (tmp_path / "other" / "config.json").write_text("not json")
  refused(capsys, command(tmp_path / "other", digits_dir)[1:], "config.json cannot be read")
  (tmp_path / "other" / "config.json").write_text("[]")
  refused(capsys, command(tmp_path / "other", digits_dir)[1:], "config.json is damaged: it holds no JSON object")


@pytest.mark.parametrize("name", ["results.json", "origin.json", "checkpoints", "teacher_training"])
def test_a_run_that_belongs_to_no_config_is_refused(capsys, tmp_path, digits_dir, finished, name):
  """A run with another seed must not take over what is there."""
  workdir = tmp_path / "w"
  shutil.copytree(finished, workdir)
  for path in workdir.iterdir():
    if path.name != name:
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  refused(capsys, command(workdir, digits_dir, "--config.seed=9")[1:], f"has {name} of a run but no config.json")
  assert [path.name for path in workdir.iterdir()] == [name]


def test_a_workdir_is_one_process_s_at_a_time(capsys, tmp_path, digits_dir, finished):
  """Who holds it is told; when that process is killed, it is free."""
  workdir = tmp_path / "w"
  shutil.copytree(finished, workdir)
  (workdir / "results.json").unlink()
  hold = (
    f"import pathlib, time; from cpsc_jax import record; held = record.locked(pathlib.Path({str(workdir / '.lock')!r}))"
  )
  hold += "; held.__enter__(); print('held', flush=True); time.sleep(600)"
  with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as other:
    assert other.stdout.readline() == b"held\n"
    said = f"is in use by process {other.pid} of {platform.node()} since 20"
    refused(capsys, command(workdir, digits_dir)[1:], said, "choose another --workdir")
    other.kill()
  assert main(command(workdir, digits_dir)) == 0 and results_of(workdir)["student"] == results_of(finished)["student"]


@pytest.mark.slow
def test_of_two_runs_started_together_one_runs(tmp_path, digits_dir):
  """With the same seed and with another, in a folder that is new."""
  for number in range(20):
    workdir = tmp_path / str(number)
    both = [[*command(workdir, digits_dir)[1:], f"--config.seed={seed}"] for seed in (0, number % 2)]
    running = [
      subprocess.Popen([sys.executable, "-m", "cpsc_jax.main", *argv], stderr=subprocess.PIPE) for argv in both
    ]
    said = [process.communicate()[1].decode() for process in running]
    codes = [process.returncode for process in running]
    assert sorted(codes) == [0, 2], said
    loser = said[codes.index(2)]
    assert "is in use by process" in loser or "belongs to another config" in loser
    winner = json.loads((workdir / "results.json").read_text())
    assert winner["seed"] == (0, number % 2)[codes.index(0)]


def said_by(argv, **options):
  """(exit code, stderr) of a run in a process of its own."""
  command = [sys.executable, "-m", "cpsc_jax.main", *argv]
  done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, **options)
  return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("free", [0, 20_000, 300_000, 1_000_000, "100000 left", "500000 left", "880000 left"])
def test_wherever_the_disk_fills_up_one_sentence_says_so(small_disk, digits_dir, finished, free):
  """In a new run, and in one that has ended but for its results; with space again, it goes on."""
  workdir, resumed = small_disk / "w", isinstance(free, str)
  if resumed:
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("results.json", "student*", "generator", "*.png"))
  space = int(free.split()[0]) if resumed else free
  (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - space))
  argv = command(workdir, digits_dir, "--config.teacher.epochs=1")[1:]
  code, said = said_by(argv)
  assert code == 2 and said.startswith("cpsc_jax: ") and said.count("\n") == 1 and "No space left on device" in said
  (small_disk / "filler").unlink()
  assert main(["main", *argv]) == 0 and outcome(workdir) == outcome(finished)


def without_privileges():
  """A child process of root then has the permissions of a folder's owner, as everybody else has."""
  for privilege in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    ctypes.CDLL(None).prctl(24, privilege, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.slow
@pytest.mark.parametrize("place", [".", "checkpoints", "events", "teacher", "config.json"])
@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_missing_permissions_end_in_one_sentence(tmp_path, digits_dir, finished, place, mode):
  workdir = tmp_path / "w"
  shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns("results.json", "2"))
  (workdir / place).chmod(mode)
  argv = command(workdir, digits_dir)[1:]
  try:
    code, said = said_by(argv, preexec_fn=without_privileges)
  finally:
    (workdir / place).chmod(0o755)
  if mode and place in ("teacher", "config.json"):  # these are only read
    assert code == 0
  else:
    assert code == 2 and said.startswith("cpsc_jax: ") and said.count("\n") == 1
    assert "Permission denied" in said and str(workdir) in said
  assert main(["main", *argv]) == 0 and outcome(workdir) == outcome(finished)


def test_damaged_results_are_named(capsys, tmp_path, digits_dir, finished):
  workdir = tmp_path / "w"
  shutil.copytree(finished, workdir)
  (workdir / "results.json").write_text("{")
  said = refused(capsys, command(workdir, digits_dir)[1:], "was changed since (not as in files.sha256: results.json)")
  assert f"delete {workdir / 'results.json'} and repeat the command" in said
  (workdir / "files.sha256").unlink()  # as with a run of an earlier version
  refused(capsys, command(workdir, digits_dir)[1:], "results.json cannot be read", "delete that file and run the same")
  want = results_of(finished)["student"]
  (workdir / "results.json").unlink()
  assert main(command(workdir, digits_dir)) == 0 and results_of(workdir)["student"] == want


def test_a_teacher_that_was_exchanged_is_refused(capsys, tmp_path, digits_dir, finished):
  """Between a kill and the resume; with the old one back, the run goes on."""
  workdir = tmp_path / "w"
  shutil.copytree(finished, workdir)
  (workdir / "results.json").unlink()
  shutil.move(workdir / "teacher", tmp_path / "kept")
  shutil.copytree(finished / "student", workdir / "teacher")
  refused(capsys, command(workdir, digits_dir)[1:], "was not trained by this run", "put this run's own back, or delete")
  card = checkpoint.read_card(workdir / "teacher") | {"origin": checkpoint.read_card(tmp_path / "kept")["origin"]}
  (workdir / "teacher" / checkpoint.CARD).write_text(json.dumps(checkpoint.sealed({**card, "seconds": 0.0})))
  refused(capsys, command(workdir, digits_dir)[1:], "was begun with another teacher", "put that one back")
  shutil.rmtree(workdir / "teacher")
  shutil.move(tmp_path / "kept", workdir / "teacher")
  assert main(command(workdir, digits_dir)) == 0 and results_of(workdir)["student"] == results_of(finished)["student"]


def test_images_that_were_exchanged_are_refused(capsys, tmp_path, digits_dir, finished, monkeypatch):
  """Between a kill and the resume: the test images at any time, the training images where they are used again."""
  from cpsc_jax import datasets

  workdir, load = tmp_path / "w", datasets.Prepared._load
  shutil.copytree(finished, workdir)
  (workdir / "results.json").unlink()
  argv = command(workdir, digits_dir)[1:]

  def exchanged(which):
    def other(data, split, rows=None):
      found = load(data, split, rows)
      return datasets.Split(found.images, found.labels[::-1]) if split == which else found

    return other

  monkeypatch.setattr(datasets.Prepared, "_load", exchanged("test"))
  refused(capsys, argv, "was begun with other test images", "put that one back")
  (workdir / "origin.json").unlink()
  refused(capsys, argv, "was not trained by this run: it was trained with other test images")
  shutil.rmtree(workdir / "teacher")
  (workdir / "origin.json").unlink()
  refused(capsys, argv, "teacher_training/checkpoints/1 was written with other test images")
  (workdir / "origin.json").unlink()
  monkeypatch.setattr(datasets.Prepared, "_load", exchanged("train"))
  refused(capsys, argv, "teacher_training/checkpoints/1 was written with other training images")
  monkeypatch.setattr(datasets.Prepared, "_load", load)
  assert main(["main", *argv]) == 0 and outcome(workdir) == outcome(finished), "made again, and the same"


def test_a_checkpoint_of_another_run_is_refused(capsys, tmp_path, digits_dir, finished):
  """It fits in every shape, and is intact."""
  workdir, argv = tmp_path / "w", command(tmp_path / "w", digits_dir, "--config.seed=7")[1:]
  shutil.copytree(finished, workdir)
  (workdir / "results.json").unlink()
  config = json.loads((workdir / "config.json").read_text())
  refused(capsys, argv, "belongs to another config (it differs in seed)")
  (workdir / "config.json").write_text(json.dumps({**config, "seed": 7}))
  refused(capsys, argv, "was begun with another config")
  (workdir / "origin.json").unlink()
  refused(capsys, argv, "was not trained by this run: it was trained with another config")
  shutil.rmtree(workdir / "teacher")
  refused(capsys, argv, "teacher_training/checkpoints/1 was written with another config, or by an older version")
  (workdir / "config.json").write_text(json.dumps({**config, "seed": 8}))
  (workdir / "origin.json").write_text(json.dumps(json.loads((finished / "origin.json").read_text()) | {"more": 1}))
  refused(capsys, argv, "origin.json was changed since it was written")
  shutil.copy(finished / "origin.json", workdir)
  refused(capsys, argv, "config.json was changed since the run was begun (it differs in seed)")


def test_a_given_teacher_may_be_moved_but_not_exchanged(capsys, tmp_path, digits_dir, finished):
  """Its digest says which it is, before and after the end of the run."""

  def argv(teacher):
    return command(tmp_path / "w", digits_dir, "--config.arm=real_kd", f"--config.teacher.checkpoint={teacher}")

  shutil.copytree(finished / "teacher", tmp_path / "first")
  assert main(argv(tmp_path / "first")) == 0
  want = results_of(tmp_path / "w")
  shutil.move(tmp_path / "first", tmp_path / "second")
  for again in (False, True):  # finished; and with the results to be written anew
    if again:
      (tmp_path / "w" / "results.json").unlink()
    assert main(argv(tmp_path / "second")) == 0 and results_of(tmp_path / "w")["student"] == want["student"]
  shutil.copytree(finished / "student", tmp_path / "third")
  refused(capsys, argv(tmp_path / "third")[1:], "belongs to another config (it differs in teacher.checkpoint)")
  shutil.move(tmp_path / "third", tmp_path / "first")
  refused(capsys, argv(tmp_path / "first")[1:], "is finished, with another teacher", "put that one back")


def test_non_finite_loss_ends_the_run(capsys, tmp_path, digits_dir, finished):
  argv = command(tmp_path / "w", digits_dir, f"--config.teacher.checkpoint={finished / 'teacher'}")[1:]
  assert main(["main", *argv, "--config.student.lr=1e30", "--config.student.warmup_epochs=0"]) == 3
  error = capsys.readouterr().err
  assert "not finite in epoch 1" in error and "student/" in error and "Traceback" not in error


def test_a_batch_that_devices_cannot_share_is_refused(tmp_path, digits_dir):
  argv = [
    sys.executable,
    "-m",
    "cpsc_jax.main",
    *command(tmp_path / "w", digits_dir, "--config.schedule.batch_size=36")[1:],
  ]
  environment = with_devices(8)
  done = subprocess.run(argv, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
  assert (
    done.returncode == 2
    and "config.schedule.batch_size must be a positive multiple of 8, the number of devices, got 36" in done.stderr
  )


@pytest.mark.slow
def test_eight_devices_run_the_same_program(finished, tmp_path, digits_dir):
  flags = (f"--config.teacher.checkpoint={finished / 'teacher'}",)
  argv = [sys.executable, "-m", "cpsc_jax.main", *command(tmp_path / "w", digits_dir, *flags)[1:]]
  environment = with_devices(8)
  subprocess.run(argv, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
  one, eight = (first_epoch(workdir) for workdir in (finished, tmp_path / "w"))
  assert results_of(tmp_path / "w")["hardware"]["devices"] == 8
  assert len(one["terms"]) == 8 and one["totals"].keys() == {"generator", "student"}
  for kind in ("terms", "totals"):
    assert eight[kind] == pytest.approx(one[kind], rel=1e-2)


@pytest.mark.slow
def test_cifar10_smoke_on_the_real_images(tmp_path):
  from cpsc_jax.datasets.prepare import prepare

  subprocess.run([sys.executable, shared("data", "unpack.py"), "cifar10", tmp_path], check=True)
  prepare("cifar10", str(tmp_path / "d"), str(next(tmp_path.glob("*.tar.gz"))))

  def smoke(name):
    return f"--config={REPOSITORY / 'configs' / name}.py:smoke"

  assert main(command(tmp_path / "w", tmp_path / "d", config=smoke("cifar10"))) == 0
  assert results_of(tmp_path / "w")["evaluation"] == {"split": "test", "images": 10000}
  given = f"--config.teacher.checkpoint={tmp_path / 'w' / 'teacher'}"
  assert main(command(tmp_path / "rgal", tmp_path / "d", given, config=smoke("rgal_cifar10"))) == 0
  assert results_of(tmp_path / "rgal")["evaluation"] == {"split": "test", "images": 10000}
