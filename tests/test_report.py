"""Pictures and the table, from made-up files: what they show, and what is refused."""

import json

import matplotlib.image
import numpy as np
import pytest

from cpsc_jax import report
from cpsc_jax.errors import Refusal

TERMS = {"generator": ("adversarial", "ce", "bn"), "student": ("kd", "l2")}


def made_up(epochs=40, every=1, players=("generator", "student"), classes=10, split="test"):
  """results.json, history.json and the images of a run that never was."""
  rng = np.random.default_rng(0)
  entries = []
  for epoch in range(1, epochs + 1):
    terms = {f"{player}/{name}": float(rng.normal()) for player in players for name in TERMS[player]}
    entries.append({"epoch": epoch, "terms": terms, "totals": {player: float(rng.normal()) for player in players}})
    if epoch % every == 0 or epoch == epochs:
      entries[-1] |= {"accuracy": float(rng.uniform()), "agreement": float(rng.uniform())}
  row = {key: entries[-1][key] for key in ("epoch", "accuracy", "agreement")}
  fidelity = rng.uniform(size=classes).tolist() if classes else None
  generator = {
    "net": "cifar",
    "parameters": 61205,
    "label_fidelity": 0.984 if classes else None,
    "label_fidelity_per_class": fidelity,
  }
  results = {
    "name": "digits",
    "arm": "distill",
    "seed": 2,
    "headline": "last",
    "teacher": {"net": "wrn_16_1", "parameters": 174778, "accuracy": 0.989},
    "student": {"net": "wrn_10_1", "parameters": 77562, "last": row, "best": row},
    "generator": generator if "generator" in players else None,
    "evaluation": {"split": split, "images": 454},
    "seconds": 121.7,
    "seconds_by_part": {"teacher": 17.6, "student": 92.9},
    "hardware": {"device": "cpu", "devices": 1},
    "config": {
      "schedule": {"epochs": epochs},
      "loss": {player: dict.fromkeys(TERMS[player], 0.5) for player in players},
    },
  }
  return results, {"teacher": [], "student": entries}, rng.uniform(size=(classes or 1, 5, 8, 8, 1)).astype(np.float32)


@pytest.fixture
def workdir(tmp_path):
  """Writes the files of a run."""

  def write(**options):
    results, history, images = made_up(**options)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "history.json").write_text(json.dumps(history))
    if results["generator"]:
      np.savez(tmp_path / "samples.npz", images=images)
    return tmp_path

  return write


def figure(**options):
  results, history, _ = made_up(**options)
  return report.curves(history["student"], results)


def titles(drawn):
  return [axis.get_title().split(":")[0] for axis in drawn.axes]


def test_command_draws_and_prints(workdir, capsys):
  folder = workdir()
  before = {path.name for path in folder.iterdir()}
  assert report.main([str(folder)]) == 0
  drawn = {path.name for path in folder.iterdir()} - before
  assert drawn == {"curves.png", "samples.png", "report.html"}, "and nothing half written"
  for picture in ("curves.png", "samples.png"):
    pixels = matplotlib.image.imread(folder / picture)
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.05, f"{picture} shows nothing"
  text = capsys.readouterr().out
  assert "digits: distill, seed 2\n" in text.replace(" \n", "\n").replace("  ", "")
  for words in ("student, last epoch (40)  <- headline", "0.9890", "label fidelity 0.984", str(folder / "samples.png")):
    assert words in text
  assert "122 s in all: teacher 18 s, student 93 s, everything else 11 s, on 1 x cpu; 454 test images" in text


def test_drawing_again_gives_the_same_picture(workdir):
  folder = workdir()
  first, again = [(report.main([str(folder)]), (folder / "curves.png").read_bytes()) for _ in range(2)]
  assert first == again


@pytest.mark.parametrize("epochs, ticks", [(75, [1, 10, 20, 30, 40, 50, 60, 70, 75]), (7, [1, 2, 3, 4, 5, 6, 7])])
def test_curves_show_the_end_of_the_run(epochs, ticks):
  drawn = figure(epochs=epochs)
  for axis in drawn.axes:
    assert axis.get_xlim() == (1, epochs)
    assert axis.get_xticks().tolist() == ticks


@pytest.mark.parametrize("last", [1, 2, 3, 8, 9, 10, 11, 40, 41, 75, 79, 80, 81, 99, 100, 101, 239, 240, 1000, 12345])
def test_ticks(last):
  ticks = report.epoch_ticks(last)
  assert ticks[0] == 1 and ticks[-1] == last and len(ticks) <= 10
  gaps = np.diff(ticks)
  assert len(ticks) <= 2 or gaps.min() >= max(1, 0.4 * gaps.max())


def test_totals_are_drawn_apart_from_the_terms():
  drawn = figure()
  assert [axis.get_title() for axis in drawn.axes[1:]] == [
    "generator: terms, unweighted",
    "generator: total, weighted",
    "student: terms, unweighted",
    "student: total, weighted",
  ]
  labels = [[line.get_label() for line in axis.lines] for axis in drawn.axes]
  assert labels == [
    ["accuracy", "agreement", "teacher"],
    ["adversarial", "bn", "ce"],
    ["total"],
    ["kd", "l2"],
    ["total"],
  ]
  assert len(figure(players=("student",)).axes) == 3


def test_values_of_the_history_are_drawn():
  results, history, _ = made_up(epochs=6, every=2)
  drawn = report.curves(history["student"], results)
  accuracy, total = drawn.axes[0].lines[0], drawn.axes[4].lines[0]
  assert list(accuracy.get_xdata()) == [2, 4, 6]
  assert list(accuracy.get_ydata()) == [entry["accuracy"] for entry in history["student"] if "accuracy" in entry]
  assert list(total.get_ydata()) == [entry["totals"]["student"] for entry in history["student"]]


def test_a_single_measured_epoch_shows_its_point():
  for options in ({"epochs": 1}, {"epochs": 7, "every": 7}, {"epochs": 50, "every": 50}):
    line = figure(**options).axes[0].lines[0]
    assert line.get_marker() == "o" and len(line.get_xdata()) == 1
    low, high = line.axes.get_xlim()
    assert low <= line.get_xdata()[0] <= high and not line.get_clip_on()
  assert figure(epochs=50).axes[0].lines[0].get_marker() in ("", "None")


def test_legends_cover_no_curve():
  drawn = figure()
  drawn.draw_without_rendering()
  legends = [axis.get_legend() for axis in drawn.axes if axis.get_legend()]
  assert len(legends) == 3
  for legend in legends:
    assert not any(legend.get_window_extent().overlaps(axis.get_window_extent()) for axis in drawn.axes)
    assert legend.get_window_extent().x1 <= drawn.bbox.x1, "and they are whole"


def test_scales_follow_the_values():
  results, history, _ = made_up(epochs=30)
  for entry in history["student"]:
    entry["terms"]["student/kd"] = 3.0 * 0.7 ** entry["epoch"]
    entry["totals"]["student"] = 3.0 + 0.1 * entry["epoch"]
  terms, total = report.curves(history["student"], results).axes[3:]
  assert terms.get_yscale() == "symlog" and total.get_yscale() == "linear"


def test_validation_split_is_named(workdir, capsys):
  assert report.main([str(workdir(split="validation"))]) == 0
  text = capsys.readouterr().out
  assert "digits: distill, seed 2, on the validation split" in text and "454 validation images" in text
  assert "454 validation images" in figure(split="validation").axes[0].get_title()


def test_a_generator_without_classes(workdir, capsys):
  assert report.main([str(workdir(classes=None))]) == 0
  assert "no classes" in capsys.readouterr().out


def test_a_run_without_a_generator(workdir, capsys):
  folder = workdir(players=("student",))
  assert report.main([str(folder)]) == 0
  assert not (folder / "samples.png").exists() and "label fidelity" not in capsys.readouterr().out


@pytest.mark.parametrize(
  "seconds, parts, words",
  [
    (121.7, {"teacher": 17.6, "student": 92.9}, "122 s in all: teacher 18 s, student 93 s, everything else 11 s"),
    (10.4, {"teacher": 5.5, "student": 4.8}, "11 s in all: teacher 6 s, student 5 s, everything else 0 s"),
    (99.9, {"teacher": 0.0, "student": 92.9}, "100 s in all: student 93 s, everything else 7 s"),
  ],
)
def test_seconds_add_up(seconds, parts, words):
  assert report.seconds_in_words({"seconds": seconds, "seconds_by_part": parts}) == words


def test_markup_in_names_is_shown_as_it_is(workdir, capsys):
  folder = workdir()

  def edit(results):
    results["teacher"]["net"] = "[/red]:smile:"
    results["name"] = r"$\nothing$"

  change(folder, "results.json", edit)
  assert report.main([str(folder)]) == 0
  assert "[/red]:smile:" in capsys.readouterr().out


def refused(capsys, folder, *words):
  assert report.main([str(folder)]) == 2
  error = capsys.readouterr().err
  assert error.startswith("cpsc_jax: ") and error.count("\n") == 1 and "Traceback" not in error
  for word in words:
    assert word in error, error


def test_a_folder_that_cannot_be_written_to_is_refused(workdir, capsys):
  folder = workdir()
  (folder / "curves.png.partial").mkdir()
  refused(capsys, folder, "cannot write to")


def test_missing_and_unfinished_runs_are_refused(workdir, tmp_path, capsys):
  refused(capsys, tmp_path / "nowhere", "no run in", "nowhere", "--workdir of a finished run")
  folder = workdir()
  (folder / "results.json").unlink()
  refused(capsys, folder, "is not finished", str(folder))


def change(folder, name, edit):
  path = folder / name
  content = json.loads(path.read_text())
  edit(content)
  path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["results.json", "history.json", "samples.npz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
def test_damaged_files_are_refused(workdir, capsys, name, damage):
  folder = workdir()
  path = folder / name
  content = path.read_bytes()
  path.unlink()
  if damage != "missing":
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "other": b'["\\u001b[31m", \xff]'}[damage])
  where = "is not finished" if (name, damage) == ("results.json", "missing") else name
  refused(capsys, folder, where)


@pytest.mark.parametrize(
  "name, edit, words",
  [
    ("results.json", lambda r: r.pop("evaluation"), "'evaluation.split'"),
    ("results.json", lambda r: r.pop("generator"), "'generator'"),
    ("results.json", lambda r: r["student"].update(last=None), "'student.last.epoch'"),
    ("results.json", lambda r: r["teacher"].update(accuracy="0.9"), "'teacher.accuracy'"),
    ("results.json", lambda r: r["generator"].pop("label_fidelity"), "'generator.label_fidelity'"),
    ("results.json", lambda r: r["generator"].update(label_fidelity_per_class=[0.5]), "10 classes, results.json 1"),
    ("history.json", lambda h: h.update(student=[]), "no epoch"),
    ("history.json", lambda h: h["student"][3].pop("totals"), "'totals'"),
    ("history.json", lambda h: h["student"][3].update(accuracy="high"), "epoch 4"),
    ("history.json", lambda h: h["student"][3]["terms"].update({"student/kd": None}), "epoch 4"),
  ],
)
def test_what_is_missing_is_named(workdir, capsys, name, edit, words):
  folder = workdir()
  change(folder, name, edit)
  refused(capsys, folder, words, "delete results.json")


def test_samples_of_another_shape_are_refused(workdir, capsys):
  folder = workdir()
  for images in (np.zeros((10, 64), np.float32), np.zeros((10, 5, 8, 8, 1), np.uint8), np.zeros((10, 5, 8, 8, 2))):
    np.savez(folder / "samples.npz", images=images)
    refused(capsys, folder, "samples.npz has images", str(images.shape))


def test_samples_grid():
  images = np.random.default_rng(0).uniform(size=(2, 3, 8, 8, 1))
  grid, cell = report.mosaic(images)
  assert cell == 9 and grid.shape == (18, 27)
  np.testing.assert_array_equal(grid[9:17, 18:26], images[1, 2, ..., 0])
  assert (grid[8] == 1).all() and report.mosaic(np.repeat(images, 3, -1))[0].shape == (18, 27, 3)


def test_a_damaged_diagnosis_is_named(tmp_path):
  path = tmp_path / "000008.npz"
  np.savez(path, warnings=np.array(["one"]), confidence=np.float32(0.5))
  whole, refused = path.read_bytes(), 0
  assert report.read_diagnosis(path)["warnings"].tolist() == ["one"]
  for byte in range(0, len(whole), 7):
    path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 2]) + whole[byte + 1 :])
    try:
      report.read_diagnosis(path)
    except Refusal as refusal:
      refused += 1
      assert str(path) in str(refusal) and "delete that file" in str(refusal)
  assert refused > 20
