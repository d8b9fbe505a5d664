"""The HTML pages: every number is that of a file, nothing is loaded from elsewhere, and a browser shows all of it."""

import html.parser
import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from scipy import stats
from test_report import change, made_up

from cpsc_jax import page, report
from cpsc_jax.page import published, svg

VOID = {"meta", "img", "br", "link", "input", "hr"}
CLOSED_AT_ONCE = {"line", "circle", "rect", "polyline"}  # of SVG, unless they have a title


class Reader(html.parser.HTMLParser):
  """A page taken apart: {tag: attributes of each}, its numbers as (value, source, text), its other text."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.numbers, self.text, self._open = {}, [], "", []
    self.feed(text)
    self.close()
    assert not self._open, f"not closed: {self._open}"

  def handle_starttag(self, tag, attributes):
    self.tags.setdefault(tag, []).append(dict(attributes))
    if tag not in VOID:
      self._open.append(tag)
    if tag == "data":
      self.numbers.append([*map(dict(attributes).get, ("value", "data-from")), ""])

  def handle_startendtag(self, tag, attributes):
    self.tags.setdefault(tag, []).append(dict(attributes))

  def handle_endtag(self, tag):
    assert self._open and self._open.pop() == tag, tag

  def handle_data(self, data):
    if self._open and self._open[-1] == "data":
      self.numbers[-1][2] += data
    elif not {"svg", "style", "pre"} & set(self._open):
      self.text += data


def at(tree, path, separator="."):
  for key in path.split(separator):
    tree = tree[int(key) if isinstance(tree, list) else key]
  return tree


def wanted(source, folders):
  """The number that a source names, from the files."""
  who, kind, *rest = source.split(" ")
  first = folders[who.split(",")[0].split("-")[0]]
  results = {name: json.loads((folder / "results.json").read_text()) for name, folder in folders.items()}
  match kind:
    case "results":
      return at(results[who], rest[0])
    case "history":
      entries = json.loads((first / "history.json").read_text())["student"]
      return at(next(entry for entry in entries if entry["epoch"] == int(rest[0])), rest[1], "|")
    case "diagnosis":
      with np.load(first / "diagnostics" / f"{int(rest[0]):06d}.npz") as arrays:
        return arrays[rest[1]][tuple(map(int, rest[2].split(","))) if rest[2:] else ()]
    case "layers":
      with np.load(first / "diagnostics" / f"{int(rest[0]):06d}.npz") as arrays:
        return arrays["norm_distance"].sum()
    case "gap":
      return 100 * (results[who]["teacher"]["accuracy"] - results[who]["student"][rest[0]]["accuracy"])
    case "mean" | "paired" | "interval":
      values = [at(results[name.split("-")[0]], rest[0]) for name in who.split(",")]
      if kind != "mean":
        values = [
          100 * (value - at(results[name.split("-")[1]], rest[0]))
          for value, name in zip(values, who.split(","), strict=True)
        ]
      if kind == "interval":
        ends = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        return ends[int(rest[1])]
      return statistics.stdev(values) if rest[1:] else statistics.fmean(values)
  raise AssertionError(f"unknown source {source}")


def check_numbers(text, folders, at_least):
  """Each number is what its source says, as it is written; and no accuracy stands there without a source."""
  read = Reader(text)
  assert len(read.numbers) >= at_least
  for value, source, shown in read.numbers:
    truth = float(wanted(source, folders))
    assert float(value) == pytest.approx(truth, rel=1e-6), source
    plain = shown.replace(",", "").lstrip("+")
    digits = len(plain.partition("e")[0].partition(".")[2])
    step = 10.0**-digits * 10.0 ** int(plain.partition("e")[2] or 0)
    scales = (1, 100) if "deviation" in source else (1,)
    close = [abs(abs(float(plain)) - abs(scale * truth)) <= 0.51 * step + 1e-9 for scale in scales]
    assert any(close), (source, shown, truth)
  assert not re.findall(r"\b[01]\.\d{4}\b", read.text), "accuracies have a source"
  return read


def check_form(read):
  """Self-contained, without scripts, and with words for those who do not see the pictures."""
  assert not {"script", "link", "iframe", "object"} & set(read.tags)
  assert read.tags["html"][0]["lang"] == "en" and read.tags["title"]
  for image in read.tags.get("img", ()):
    assert image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 10
  for picture in read.tags["svg"]:
    assert picture["role"] == "img" and len(picture["aria-label"]) > 10
  addresses = [value for of in read.tags.values() for each in of for value in each.values() if value and "://" in value]
  assert not addresses


def diagnosis(classes=10, rng=None):
  """What a diagnosis might find."""
  rng = rng or np.random.default_rng(1)
  names = ("teacher_accuracy", "accuracy", "agreement", "fidelity", "confidence", "vendi_score")
  return {
    **{f"{name}_per_class": rng.uniform(size=classes) for name in names},
    "images_per_class": rng.integers(40, 50, classes),
    "class_shares": rng.dirichlet(np.ones(classes)),
    "confusion": rng.integers(0, 9, (classes, classes)),
    "reliability_count": np.array([0, 3, 9]),
    "reliability_confidence": np.array([np.nan, 0.5, 0.9]),
    "reliability_accuracy": np.array([np.nan, 0.4, 1.0]),
    "class_balance": np.float32(0.9),
    "terms": np.array(["adversarial", "ce", "bn"]),
    **{f"term_{name}": rng.normal(size=3) for name in ("value", "weighted", "gradient", "weighted_gradient")},
    "term_cosine": np.array([[1, -0.9, 0.1], [-0.9, 1, np.nan], [0.1, np.nan, 1]]),
    "layers": np.array(["first/norm", "second/norm"]),
    "norm_distance": np.array([1.5, 0.5]),
    "grid": rng.integers(0, 256, (classes, 4, 8, 8, 1)).astype(np.uint8),
    "epoch_seconds": np.float64(1.25),
    "warnings": np.array(["The generator draws one image."]),
  }


def write_run(folder, seed=0, arm="distill", every=5, diagnosed=(5, 10), accuracy=None, **options):
  """The files of a run that never was."""
  results, history, images = made_up(epochs=10, every=every, **options)
  results |= {"seed": seed, "arm": arm, "method": "cpsc"}
  results["config"] |= {"seed": seed, "arm": arm, "name": "digits", "teacher": {"checkpoint": ""}}
  results["config"]["dataset"] = {"name": "digits", "data_dir": ""}
  results["teacher"]["digest"] = "d1"
  if accuracy:
    results["student"] = results["student"] | {"last": results["student"]["last"] | {"accuracy": accuracy}}
  classes = options.get("classes", 10)
  for epoch in diagnosed:
    numbers = {
      "confidence": 0.5 + epoch / 100,
      "vendi_score": 3.25,
      "real_vendi_score": 4.5,
      "calibration_error": 0.125,
    }
    history["student"][epoch - 1]["diagnostics"] = numbers
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text("{}")
  (folder / "results.json").write_text(json.dumps(results))
  (folder / "history.json").write_text(json.dumps(history))
  if results["generator"]:
    np.savez(folder / "samples.npz", images=images)
  for epoch in diagnosed:
    (folder / "diagnostics").mkdir(exist_ok=True)
    np.savez(folder / "diagnostics" / f"{epoch:06d}.npz", **diagnosis(classes or 10))
  return folder


def page_of(folder):
  history = json.loads((folder / "history.json").read_text())
  return report.write_page(folder, report.read_results(folder), history).read_text()


def test_every_number_of_a_run_is_in_its_files(tmp_path):
  folder = write_run(tmp_path / "run")
  read = check_numbers(page_of(folder), {"run": folder}, at_least=100)
  check_form(read)
  for words in ("a gap of", "adversarial", "How it was made", "The generator draws one image.", "first/norm"):
    assert words in (folder / "report.html").read_text()
  shown = " ".join(read.text.split())
  assert "The student wrn_10_1 has" in shown and "its teacher wrn_16_1 has" in shown
  assert len(read.tags["img"]) == 3, "samples after two epochs, and those of the end"


def test_the_page_of_a_real_run(finished):
  text = (finished / "report.html").read_text()
  results = json.loads((finished / "results.json").read_text())
  read = check_numbers(text, {finished.name: finished}, at_least=80)
  check_form(read)
  assert results["teacher"]["digest"] in read.text and results["command"] in text
  for key, (was, now) in results["changed"].items():
    assert key in read.text, key
    assert was != now
  for warning in results["warnings"]:
    assert warning in read.text


def test_what_is_not_known_is_left_out(tmp_path):
  """A run of an older version, one without a generator, and one without classes."""
  for name, options in {
    "old": {"diagnosed": ()},
    "plain": {"diagnosed": (), "players": ("student",)},
    "classless": {"classes": None, "diagnosed": ()},
  }.items():
    folder = write_run(tmp_path / name, **options)
    read = check_numbers(page_of(folder), {name: folder}, at_least=15)
    check_form(read)
    assert "Diagnostics" not in read.text and "Class by class" not in read.text
    assert ("Samples" in read.text) == (name != "plain")


def test_a_run_that_goes_on(tmp_path):
  """Its page says how far it is, and shows no diagnosis of epochs that it will repeat."""
  folder = write_run(tmp_path / "run")
  results, history = (json.loads((folder / name).read_text()) for name in ("results.json", "history.json"))
  for key in ("seconds", "seconds_by_part", "generator"):
    results.pop(key)
  history["student"] = history["student"][:7]
  text = report.write_page(folder, results, history).read_text()
  check_form(Reader(text))
  assert "epoch 7 of 10 is done" in text and "What looks wrong after epoch 5" in text


def test_names_are_shown_as_they_are(tmp_path):
  folder = write_run(tmp_path / "run", diagnosed=(10,))
  hostile = "<script>alert(1)</script>"

  def edit(results):
    results["name"] = results["teacher"]["net"] = results["command"] = hostile
    results["class_names"] = [f"{hostile}{i}" for i in range(10)]
    results["changed"] = {"name": ["a", hostile]}

  change(folder, "results.json", edit)
  text = page_of(folder)
  check_form(Reader(text))
  assert hostile not in text and text.count("&lt;script&gt;") > 10


def test_many_classes_stay_readable(tmp_path):
  folder = write_run(tmp_path / "run", classes=150, diagnosed=(10,))
  read = check_numbers(page_of(folder), {"run": folder}, at_least=100)
  assert "The 100 worst of 150." in read.text and "Confusion matrix" not in read.text
  assert "Most frequent mistakes" in read.text and max(int(image["height"]) for image in read.tags["img"]) < 300


def test_control_arms_beside_a_run_are_in_its_verdict(tmp_path):
  folder = write_run(tmp_path / "run")
  arm = write_run(tmp_path / "control", arm="untrained_generator", accuracy=0.25)
  write_run(tmp_path / "other_seed", arm="real_kd", seed=1)
  stranger = write_run(tmp_path / "other_teacher", arm="real_labels")
  change(stranger, "results.json", lambda results: results["teacher"].update(digest="d2"))
  (tmp_path / "damaged").mkdir()
  (tmp_path / "damaged" / "results.json").write_text("{")
  unreadable = write_run(tmp_path / "unreadable", arm="gaussian_noise")
  (unreadable / "history.json").unlink()
  (unreadable / "history.json").mkdir()
  (unreadable / "files.sha256").write_text(f"{64 * '0'}  history.json\n")
  read = check_numbers(page_of(folder), {"run": folder, "control": arm}, at_least=100)
  assert read.text.count("Control, ") == 1 and "untrained generator" in read.text


def test_figures_of_others_stand_beside_a_run_of_their_pair(tmp_path):
  folder, title = write_run(tmp_path / "a"), "Published by others for these networks"
  assert title not in Reader(page_of(folder)).text

  def of_a_pair(results):
    results["config"]["dataset"]["name"] = "cifar100"
    results["teacher"]["net"], results["student"]["net"] = "wrn_40_2", "wrn_16_1"

  change(folder, "results.json", of_a_pair)
  text = Reader(page_of(folder)).text
  assert title in text and "from another teacher (75.83)" in text and "the student has 65.31" in text
  shown = re.sub(r"\s+", "", text)
  assert "DFQ54.7721.06CMI57.9117.92FastDFKD,10steps54.0221.81" in shown and "AdaDFKD" not in shown
  of_resnets = published.FIGURES["cifar10", "resnet34", "resnet18"]
  assert list(of_resnets.methods) == ["DAFL", "ZSKT", "DFQ", "CMI", "FastDFKD, 10 steps", "AdaDFKD"]
  change(folder, "results.json", lambda results: results["config"].update(task="quantise"))
  assert title not in Reader(page_of(folder)).text


def test_comparison(tmp_path, capsys):
  """Runs of equal configs are one row; differences are paired by seed."""
  folders = {}
  for arm, accuracies in {"distill": (0.90, 0.93, 0.96), "untrained_generator": (0.70, 0.75)}.items():
    for seed, accuracy in enumerate(accuracies):
      name = f"{arm}_{seed}"
      folders[name] = write_run(tmp_path / name, seed=seed, arm=arm, accuracy=accuracy)
  out = tmp_path / "out.html"
  assert report.main([*map(str, folders.values()), "--out", str(out)]) == 0
  assert f"written: {out}" in capsys.readouterr().out
  read = check_numbers(out.read_text(), folders, at_least=40)
  check_form(read)
  shown = {source: text for _, source, text in read.numbers}
  names = list(folders)
  assert shown[f"{','.join(names[:3])} mean student.last.accuracy"] == "0.9300"
  assert shown[f"{','.join(names[:3])} mean student.last.accuracy deviation"] == "3.00"
  pairs = ",".join(f"{a}-{b}" for a, b in zip(names[3:], names[:2], strict=True))
  assert shown[f"{pairs} paired student.last.accuracy"] == "-19.00"
  assert shown[f"{pairs} interval student.last.accuracy 0"] == "-31.71", "12.71 standard errors of two pairs"
  assert "arm=untrained_generator" in read.text and len(read.tags["img"]) == 5
  assert not list(tmp_path.glob("*.partial"))


def test_runs_with_the_teacher_of_their_own_seed_are_one_row(tmp_path):
  def runs(parent, of_seed):
    folders = {}
    for arm in ("distill", "untrained_generator"):
      for seed in (0, 1):
        folder = write_run(tmp_path / parent / f"{arm}_{seed}", seed=seed, arm=arm, accuracy=0.9 + seed / 100)
        folders[folder.name] = folder

        def edit(results):
          results["config"]["teacher"]["checkpoint"] = f"teachers/{seed}"
          results["teacher"] |= {"digest": f"d{seed}", "seed": seed if of_seed else None}

        change(folder, "results.json", edit)
    return folders

  own, other = runs("own", True), runs("other", False)
  pages = [report.compare(list(folders.values()), tmp_path / "out.html").read_text() for folders in (own, other)]
  sources = [" ".join(source for _, source, _ in check_numbers(text, own, at_least=20).numbers) for text in pages]
  assert "distill_0,distill_1 mean" in sources[0] and "distill_0,distill_1 mean" not in sources[1]


def test_a_repetition_is_a_row_of_its_own(tmp_path):
  """A seed that was run twice is no second seed: its interval would be too narrow."""
  seeds = {"a": 0, "b": 1, "a_again": 0, "b_again": 1}
  folders = {name: write_run(tmp_path / name, seed=seed, accuracy=0.9) for name, seed in seeds.items()}
  read = check_numbers(report.compare(list(folders.values()), tmp_path / "out.html").read_text(), folders, at_least=20)
  sources = [source for _, source, _ in read.numbers]
  assert any(source.startswith("a,b mean") for source in sources)
  assert any(source.startswith("a_again-a,b_again-b paired") for source in sources)
  assert "digits, repetition 2" in read.text


def test_pages_are_utf8_whatever_the_locale_and_the_names(tmp_path):
  folder = write_run(tmp_path / os.fsdecode(b"caf\xc3\xa9_\xff"), diagnosed=())
  change(folder, "results.json", lambda results: results.update(name="Zürich"))
  locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
  command = [sys.executable, "-m", "cpsc_jax", "report", folder]
  done = subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **locale}, capture_output=True)
  assert done.returncode == 0, done.stderr
  assert "Zürich" in (folder / "report.html").read_bytes().decode("utf-8")


def write_phases(folder, accuracy, **options):
  """The files of a run of three phases that never was."""
  write_run(folder, **options)
  (folder / "history.json").unlink()
  found = {"sizes": [4, 3, 3], "accuracy": accuracy, "average": statistics.fmean(accuracy), "forgetting": 0.125}
  change(folder, "results.json", lambda results: results.update(incremental=found, generator=None))
  return folder


def test_runs_of_phases_are_compared_by_their_average_accuracy(tmp_path):
  accuracies = {"distill": (0.90, 0.75, 0.60), "no_rehearsal": (0.90, 0.50, 0.40)}
  folders = {arm: write_phases(tmp_path / arm, list(each), arm=arm) for arm, each in accuracies.items()}
  read = check_numbers(report.compare(list(folders.values()), tmp_path / "out.html").read_text(), folders, at_least=18)
  check_form(read)
  shown = {source: text for _, source, text in read.numbers}
  assert shown["no_rehearsal-distill paired incremental.average"] == "-15.00"
  assert shown["distill results incremental.accuracy.-1"] == "0.6000" and "0.125" not in read.text
  chart = next(each["aria-label"] for each in read.tags["svg"])
  assert chart == (
    "accuracy: distill goes from 0.9 at 4 classes to 0.6 at 10 classes;"
    " no_rehearsal goes from 0.9 at 4 classes to 0.4 at 10 classes"
  )


def test_keys_that_older_records_lack_have_their_defaults(tmp_path):
  folders = [write_run(tmp_path / name, seed=seed) for seed, name in enumerate("abc")]
  for folder, value, changed in zip(folders[1:], (0.0, 0.5), ({}, {"loss.newer": [0.0, 0.5]}), strict=True):

    def edit(results, value=value, changed=changed):
      results["config"]["loss"]["newer"], results["changed"] = value, changed

    change(folder, "results.json", edit)
  text = report.compare(folders[:2], tmp_path / "out.html").read_text()
  assert "loss.newer" not in text and "a,b mean" in text, "the second has the default, which the first lacks"
  text = Reader(report.compare(folders, tmp_path / "out.html").read_text()).text
  assert "loss.newer0.00.00.5" in text


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
  folder, other = write_run(tmp_path / "a"), write_run(tmp_path / "b")

  def refused(argv, *words):
    assert report.main(list(map(str, argv))) == 2
    error = capsys.readouterr().err
    assert error.startswith("cpsc_jax: ") and error.count("\n") == 1 and all(word in error for word in words), error

  refused([folder, folder], "named twice")
  refused([folder, "--out", tmp_path / "x.html"], "--out is for several runs")
  refused([folder, tmp_path / "nowhere"], "no run in")
  refused([folder, other, "--out", tmp_path / "no" / "x.html"], "choose another --out")
  phases = write_phases(tmp_path / "phases", [0.9, 0.6, 0.5])
  refused([folder, phases], "phases is a run of several phases, and others are not")
  (other / "diagnostics" / "000010.npz").write_bytes(b"PK")
  refused([folder, other, "--out", tmp_path / "x.html"], "000010.npz", "delete that file")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
  folders = [write_run(tmp_path / parent / "run", seed=seed) for seed, parent in enumerate("ab")]
  text = report.compare(folders, tmp_path / "out.html").read_text()
  assert all(str(folder) in text for folder in folders)


# Charts.


def test_curves_are_where_they_belong():
  drawn = svg.chart([svg.Curve("a", [(1, 0.0), (3, 0.5), (5, 1.0)])], "a rises")
  points = re.search(r'<polyline[^>]* points="([^"]*)"', drawn)[1]
  (x1, y1), (x2, y2), (x3, y3) = (map(float, pair.split(",")) for pair in points.split())
  assert x2 - x1 == pytest.approx(x3 - x2) and y1 - y2 == pytest.approx(y2 - y3) and y1 > y3
  assert x1 >= svg.LEFT and x3 <= svg.WIDTH and y1 <= svg.HEIGHT and y3 >= 0


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [1e-3, 1e-3], [1e9, -1e9], [1e-12, 2e-12], [5.0, 5.0 + 1e-9]])
def test_charts_of_any_values(values):
  drawn = svg.chart([svg.Curve("a", list(enumerate(values, 1)))], "whatever")
  numbers = [float(x) for x in re.findall(r'(?:[xy]\d?|cx|cy)="([-\d.]+)"', drawn)]
  assert all(-20 < x < svg.WIDTH + 20 for x in numbers) and "nan" not in drawn.lower()
  assert 1 <= drawn.count('class="grid"') <= 8


def test_the_page_does_without_a_diagnosis_whose_file_is_gone(tmp_path):
  """Arrays are those of the last file that there is, and single numbers those of the history, which has them all."""
  folder = write_run(tmp_path / "run")
  (folder / "diagnostics" / "000010.npz").unlink()
  check_numbers(page_of(folder), {"run": folder}, at_least=100)
  text = (folder / "report.html").read_text()
  assert "What looks wrong after epoch 5" in text and "After epoch 10; curves are over epochs" in text
  (folder / "diagnostics" / "000005.npz").unlink()
  assert "After epoch 10; curves are over epochs" in page_of(folder)


def test_heatmaps_show_their_numbers():
  drawn = svg.heatmap([[0.25, 0.75], [float("nan"), -1.0]], ["a", "b"], "a label", signed=True)
  assert "a / b: 0.75" in drawn and "b / b: -1.00" in drawn and "b / a: -<" in drawn
  assert re.search(r'class="minus"[^>]*opacity:1.000', drawn)


# In a browser.

ASK = """<script>addEventListener("load", () => {
  const wide = document.documentElement.scrollWidth - innerWidth;
  const outside = [...document.querySelectorAll("body *")].filter(e => !e.closest(".wide, svg") &&
    e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + " " + e.textContent.slice(0, 40));
  const missing = [...document.images].filter(i => !i.naturalWidth).length;
  const flat = [...document.querySelectorAll("svg")].filter(s => s.getBoundingClientRect().height < 20).length;
  parent.postMessage({wide, outside, missing, flat, at: innerWidth}, "*");
});</script>"""
FRAME = """<!DOCTYPE html><body><script>
addEventListener("message", e => document.body.setAttribute("data-found", JSON.stringify(e.data)));
</script><iframe src="PAGE" width="WIDTH" height="900" style="border: 0"></iframe></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_browser_shows_all_of_it(finished, tmp_path, width, kind):
  browser = shutil.which("chromium")
  if not browser:
    pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
  folder = write_run(tmp_path / "a_run_with_a_long_name_such_as_sweeps_have")
  if kind == "run":
    pages = [page_of(folder), (finished / "report.html").read_text()]
  else:
    other = write_run(tmp_path / "another_run_with_a_long_name", arm="untrained_generator")
    both = [write_phases(tmp_path / name, [0.9, 0.6, 0.5], arm=name) for name in ("distill", "no_rehearsal")]
    pages = [report.compare(pair, tmp_path / "out.html").read_text() for pair in ([folder, other], both)]
  for number, text in enumerate(pages):
    path = tmp_path / f"{number}.html"
    path.write_text(text.replace("</body>", f"{ASK}</body>"))
    frame = tmp_path / f"frame{number}.html"  # a window cannot be as narrow as a phone
    frame.write_text(FRAME.replace("PAGE", path.name).replace("WIDTH", str(width)))
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / f'profile{number}'}"]
    flags += ["--window-size=1400,1000", "--hide-scrollbars", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=5000", "--dump-dom"]
    done = subprocess.run(
      [browser, "--headless", *flags, f"file://{frame}"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))
    assert found == {"wide": 0, "outside": [], "missing": 0, "flat": 0, "at": width}, found


def test_the_page_needs_no_jax():
  """It is written from files alone."""
  code = "import sys, cpsc_jax.page; assert 'jax' not in sys.modules and 'matplotlib' not in sys.modules"
  assert page.GRIDS and subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
