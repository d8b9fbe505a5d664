"""benchmarks/plan.py and table.py: rows come from finished runs alone; plans are resumed, stopped and refused."""

import json
import pathlib
import subprocess
import sys
import threading
import time
import types

import ml_collections
import pytest
from conftest import REPOSITORY
from cpsc_jax.configs import digits

from cpsc_jax import checkpoint, datasets, run
from cpsc_jax import events as events_module
from cpsc_jax.config import dump
from cpsc_jax.errors import Refusal
from cpsc_jax.events import Events
from cpsc_jax.main import parse

sys.path.insert(0, str(REPOSITORY))

from benchmarks import plan as plans
from benchmarks import table
from benchmarks.plan import Row

PLAN = """from benchmarks.plan import Row
PAIR = "a pair"
ROWS = (Row("one", "digits:smoke", seeds=(0, 1)), Row("two, other", "digits:smoke", ("--config.student.lr=0.2",)))
PUBLISHED = (("a paper", "94.1 %", "95.7 %"),)
"""
# In place of a run: it waits for --wait seconds, or to be stopped, and leaves the results of its seed.
RUN = """#!{python}
import json, shutil, signal, sys, time, pathlib
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[3:])
workdir = pathlib.Path(flags["workdir"]); workdir.mkdir(parents=True, exist_ok=True)
with open(workdir / "calls", "a") as file: file.write(" ".join(sys.argv[1:]) + "\\n")
time.sleep(float(flags.get("config.wait", 0)))
if "config.fail" in flags: print("it broke"); sys.exit(3)
shutil.copytree({made!r}, workdir, dirs_exist_ok=True)
result = json.load(open({made!r} + "/results.json")); result["seed"] = int(flags["config.seed"])
(workdir / "results.json").write_text(json.dumps(result))
"""


@pytest.fixture
def plan(tmp_path, monkeypatch):
  """The path of a plan whose runs are stand-ins."""
  make(tmp_path / "made")
  run = tmp_path / "run"
  run.write_text(RUN.format(python=sys.executable, made=str(tmp_path / "made")))
  run.chmod(0o755)
  monkeypatch.setattr(plans.sys, "executable", str(run))
  monkeypatch.setattr(plans, "commit", lambda: "abc")
  path = tmp_path / "small.py"
  path.write_text(PLAN)
  return path


def finished(seed, accuracy, best=0.95, teacher=0.99):
  def entry(value):
    return {"epoch": 1, "accuracy": value, "agreement": value}

  return {
    "seed": seed,
    "arm": "distill",
    "method": "cpsc",
    "teacher": {"net": "wrn_16_1", "accuracy": teacher},
    "student": {"last": entry(accuracy), "best": entry(best)},
    "generator": None,
    "evaluation": {"split": "test", "images": 454},
    "samples": {"generator": 1000, "student": 2000},
    "seconds": 30.0,
    "seconds_by_part": {"teacher": 1.0, "student": 20.0 + seed},
    "hardware": {"cores": 1, "cpu": "a CPU", "devices": 1, "device": "cpu"},
  }


def make(workdir):
  """What a finished run of four epochs leaves, which was resumed after the second; its student rests in the first."""
  entries = [{"epoch": epoch, "accuracy": 0.1 * epoch} for epoch in (1, 2, 3, 4)]
  for first, last in ((1, 3), (3, 4)):
    events = Events(workdir / "events", first)
    for epoch in range(first, last + 1):
      events.add(epoch, {"accuracy": 0.1 * epoch}, {})
    time.sleep(1.1)  # the names of event files count seconds
  (workdir / "history.json").write_text(json.dumps({"student": entries}))
  config = {"episodes": {"warmup": 2}, "schedule": {"iterations": 2}}
  (workdir / "results.json").write_text(json.dumps(finished(0, 0.9) | {"config": config}))


def calls(out, name):
  path = out / "small" / name / "calls"
  return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_row_is_written_from_finished_runs_alone(tmp_path, plan):
  """Whatever else lies in the folders: a log, a history, an unfinished run."""
  p, out = plans.read(plan), tmp_path / "out"
  text = table.table(p, table.finished(out, p))
  assert text.count("not measured") == 2 and "| *published:* a paper |  | 94.1 % |" in text and "**a pair**" in text
  workdir = plans.folder(out, p, p.rows[0], 0)
  workdir.mkdir(parents=True)
  (workdir / "history.json").write_text("{}")
  workdir.with_suffix(".origin.json").write_text(json.dumps({"command": "c", "commit": "abc"}))
  assert table.finished(out, p) == {"one": [], "two, other": []}
  make(workdir)
  row = "| one | 0 | 0.9000 | 0.9000 |  | 0.9500 at 1 | 0.0900 | 0.9000 |  | 2,000 | 30 |"
  text = table.table(p, table.finished(out, p))
  assert row in text.splitlines() and text.count("not measured") == 1
  assert "Teacher wrn_16_1: 0.9900." in text
  assert "454 images of the test split; 1 core(s) of a CPU, 1 x cpu." in text


def test_rows_are_compared_with_the_base_seed_by_seed():
  rows = (plans.Row("base", "digits", seeds=(0, 1, 2)), plans.Row("other", "digits", seeds=(1, 2)))
  runs = {
    "base": [finished(seed, last, teacher=0.99 + 0.001 * seed) for seed, last in enumerate((0.90, 0.92, 0.94))],
    "other": [finished(seed, last, teacher=0.99 + 0.001 * seed + 3e-8) for seed, last in ((1, 0.93), (2, 0.97))],
  }
  runs["other"][0]["generator"] = {"pool_fidelity": 0.9}
  text = table.table(plans.Plan("p", "a pair", rows, base="base"), runs)
  assert "| deviation | against base | best epoch |" in text
  assert "| base | 0, 1, 2 | 0.9000, 0.9200, 0.9400 | 0.9200 | 0.0200 |  |" in text
  # differences 0.01 and 0.03: their mean, and their deviation 0.0141 over the root of 2
  assert "| 0.9500 | 0.0283 | +0.0200 ± 0.0100 |" in text and "| 0.900 (pool) |" in text
  assert "Teacher wrn_16_1: 0.9900 (seed 0), 0.9910 (seed 1), 0.9920 (seed 2); mean 0.9910." in text
  for other in runs["other"]:
    other["teacher"]["digest"] = "of another teacher"
  assert "±" not in table.table(plans.Plan("p", "a pair", rows, base="base"), runs).split("| other |")[1].split("\n")[0]
  assert "| other | not measured |" in table.table(plans.Plan("p", "a pair", rows, base="base"), {"base": runs["base"]})


def test_other_tasks_have_columns_of_their_own():
  rows = (plans.Row("base", "digits", seeds=(0, 1)), plans.Row("other", "digits", seeds=(0, 1)))
  plan = plans.Plan("p", "a pair", rows, base="base")

  def phases(seed, average):
    found = {"accuracy": [1.0, average - 0.1], "average": average, "forgetting": 0.2}
    return finished(seed, average - 0.1) | {"incremental": found}

  runs = {"base": [phases(0, 0.8), phases(1, 0.9)], "other": [phases(0, 0.7), phases(1, 0.8)]}
  text = table.table(plan, runs)
  assert "| row | seeds | average incremental accuracy | mean | deviation | against base | at the end | forg" in text
  assert "| other | 0, 1 | 0.7000, 0.8000 | 0.7500 | 0.0707 | -0.1000 ± 0.0000 | 0.6500 | 0.2000 | 30 |" in text
  stages = {"quantised": {"without_data": 0.5, "calibrated": 0.75}}
  runs = {"base": [finished(0, 0.9) | stages], "other": []}
  text = table.table(plan, runs)
  assert "| row | seeds | without data | calibrated | last epoch | mean | deviation | against base | gap to" in text
  assert "| base | 0 | 0.5000 | 0.7500 | 0.9000 | 0.9000 |  |  | 0.0900 | 0.9000 | 30 |" in text


def test_a_long_tail_has_columns_for_its_thirds():
  plan = plans.Plan("p", "a pair", (plans.Row("base", "digits", seeds=(0, 1)), plans.Row("other", "digits")), "base")

  def tailed(seed, head, middle, tail):
    student = {"last": {"head": head, "middle": middle, "tail": tail}}
    teacher = {"head": 0.9, "middle": 0.8, "tail": 0.1 * (seed + 1)}
    return finished(seed, 0.9) | {"long_tail": {"images_per_class": [9, 3, 1], "teacher": teacher, "student": student}}

  text = table.table(plan, {"base": [tailed(0, 0.9, 0.7, 0.3), tailed(1, 0.8, 0.7, 0.4)], "other": []})
  assert "| deviation | against base | head | middle | tail | best epoch |" in text
  assert "| 0.9000 | 0.0000 |  | 0.8500 | 0.7000 | 0.3500 |" in text
  assert "per class: 9, 3, 1; their accuracy in the mean: head 0.9000, middle 0.8000, tail 0.1500." in text


def test_curves_are_drawn_of_finished_rows(tmp_path, monkeypatch):
  """Mean and deviation of each value in order, a panel for each curve; a curve without a run has no point."""
  rows = [plans.Row(name, "digits", seeds=(0, 1)) for name in ("base", "none", "much", "other")]
  curves = {"weight of a": {2.0: "much", 0.0: "none", 1.0: "base"}, "weight of b": {1.0: "base", 3.0: "other"}}
  plan = plans.Plan("p", "a pair", tuple(rows), base="base", curves=curves)
  runs = {"base": [finished(0, 0.9), finished(1, 0.8)], "much": [finished(0, 0.5)], "none": [finished(0, 0.2)]}
  drawn = []
  monkeypatch.setattr(table, "save_figure", lambda figure, path, **_: drawn.append(figure))
  assert table.draw_curves(plan, runs, tmp_path / "p.png")
  (a, b) = drawn[0].axes
  assert (a.get_xlabel(), b.get_xlabel()) == ("weight of a", "weight of b")
  line, _, (bars,) = a.containers[0]
  assert line.get_xydata().tolist() == [[0.0, 0.2], [1.0, pytest.approx(0.85)], [2.0, 0.5]]
  (base,) = (each for each in a.lines if each.get_xydata().tolist() == [[1.0, pytest.approx(0.85)]])
  assert base.get_markerfacecolor() != line.get_markerfacecolor() == "white" and base.zorder > line.zorder, "it is seen"
  low, high = bars.get_segments()[1][:, 1]
  assert (high - low) / 2 == pytest.approx(0.1 / 2**0.5)
  assert b.containers[0][0].get_xydata().tolist() == [[1.0, pytest.approx(0.85)]]
  assert not table.draw_curves(plan, {}, tmp_path / "p.png"), "nothing is finished"
  monkeypatch.undo()
  assert table.draw_curves(plan, runs, tmp_path / "p.png") and (tmp_path / "p.png").stat().st_size > 1000


def test_rows_are_given_the_teachers_of_another(tmp_path, plan, capsys):
  """Those of their seed, after all of them are trained; of an unfinished row there is none."""
  out = tmp_path / "out"
  plan.write_text("""from benchmarks.plan import Row
PAIR, BASE = "a pair", "one"
ROWS = (
  Row("one", "digits:smoke", seeds=(0, 1)),
  Row("taught", "digits:smoke", seeds=(1,), teacher="one"),
  Row("last", "digits:smoke"),
)""")
  assert table.main([str(plan), f"--out={out}", "--only=taught"]) == 2
  assert "takes its teachers from 'one'; run that row first, seed 1" in capsys.readouterr().err
  (tmp_path / "made" / "teacher").mkdir()
  assert table.main([str(plan), f"--out={out}", "--only=one", "--only=taught"]) == 0
  given = (out / "small" / "taught-1" / "calls").read_text()
  assert f"--config.teacher.checkpoint={out / 'small' / 'one-1' / 'teacher'}" in given
  assert not (out / "small" / "last-0").exists()
  command = json.loads((out / "small.json").read_text())["taught"][0]["command"]
  assert str(tmp_path) not in command, "no path of this machine"
  assert table.main([str(plan), f"--out={out}", "--only=nobody"]) == 2
  assert "no row 'nobody'; there are one, taught, last" in capsys.readouterr().err


def test_a_plan_on_a_copy_elsewhere_goes_on(tmp_path, plan):
  """Finished rows with the teachers of another are not run again, though the teachers lie elsewhere now."""
  first, second = tmp_path / "first", tmp_path / "second"
  plan.write_text(PLAN.replace("seeds=(0, 1)", "seeds=(0,)").replace('("--config.student.lr=0.2",)', 'teacher="one"'))
  (tmp_path / "made" / "teacher").mkdir()
  sizes = {"net": "wrn_16_1", "num_classes": 10, "image_size": 8, "channels": 1, "mean": [0.3], "std": [0.4]}
  card = checkpoint.sealed(sizes | {"digest": "a digest"})
  (tmp_path / "made" / "teacher" / "net.json").write_text(json.dumps(card))
  assert table.main([str(plan), f"--out={first}"]) == 0
  workdir, teacher = first / "small" / "two_other-0", first / "small" / "one-0" / "teacher"
  config = digits.get_config("smoke").to_dict() | {"precision": "bfloat16"}  # of a machine with a GPU
  config["teacher"]["checkpoint"] = str(teacher)
  (workdir / "config.json").write_text(json.dumps(config))
  (workdir / "origin.json").write_text(json.dumps(checkpoint.sealed({"teacher": "a digest"})))
  first.rename(second)
  assert table.main([str(plan), f"--out={second}"]) == 0 and calls(second, "two_other-0") == 1


def test_what_was_measured_elsewhere_stays(tmp_path, plan):
  """Of the same command; a run in the folder takes its place, and none of another command counts."""
  into = tmp_path / "page.md"
  into.write_text("<!-- table small --><!-- /table small -->")
  assert table.main([str(plan), f"--out={tmp_path / 'there'}", f"--into={into}"]) == 0
  numbers = into.with_suffix(".json")
  there = json.loads(numbers.read_text())
  curve = there["small"]["one"][0]["curve"]
  assert curve["images"] == [0, 667, 1333, 2000] and curve["accuracy"] == pytest.approx([0.1, 0.2, 0.3, 0.4])
  there["small"]["one"][0]["student"]["last"]["accuracy"] = 0.7
  numbers.write_text(json.dumps(there))
  here = tmp_path / "here"
  assert table.main([str(plan), f"--out={here}", f"--into={into}", "--only=two, other"]) == 0
  assert json.loads(numbers.read_text())["small"]["one"] == there["small"]["one"] and calls(here, "one-0") == 0
  assert "| one | 0, 1 | 0.7000, 0.9000 |" in into.read_text()
  assert table.main([str(plan), f"--out={here}", f"--into={into}", "--only=one"]) == 0 and calls(here, "one-0") == 1
  assert "| one | 0, 1 | 0.9000, 0.9000 |" in into.read_text()
  plan.write_text(PLAN.replace("digits:smoke", "digits"))
  assert table.finished(tmp_path / "none", plans.read(plan), there["small"]) == {"one": [], "two, other": []}


def test_rows_that_differ_in_their_teachers_alone_keep_what_was_measured_of_each(tmp_path):
  rows = (Row("one", "digits"), Row("two", "digits:smoke"), Row("a", "digits", seeds=(0,), teacher="two"))
  p, command = plans.Plan("p", "a pair", rows), rows[0].command(0)
  recorded = {name: [{"command": command, "of": name}] for name in ("one", "a")}
  assert table.finished(tmp_path, p, recorded) == {**recorded, "two": []}
  assert table.finished(tmp_path, p, {"one": recorded["one"]}) == {"one": recorded["one"], "two": [], "a": []}
  renamed = plans.Plan("p", "a pair", (Row("new", "digits"),))
  assert table.finished(tmp_path, renamed, {"one": recorded["one"]}) == {"new": recorded["one"]}


def test_cores_are_divided_among_the_jobs():
  for jobs in (1, 2, 64):
    shares = plans.shares(jobs)
    assert len(shares) <= jobs and sum(map(len, shares)) == len(set().union(*shares)) > 0


def test_a_real_run_that_fails_is_named(tmp_path):
  with pytest.raises(Refusal, match=r"dafl-0 failed with 2: cpsc_jax: .*no key 'no_such'"):
    plans.run(["--config=digits:smoke", "--config.no_such=1"], tmp_path / "dafl-0", {0}, time.monotonic() + 600)


@pytest.mark.parametrize("config", ["quantise_digits", "incremental_digits", "digits"])
def test_a_run_is_known_by_the_config_that_it_has_resolved(tmp_path, config):
  """Where the task takes the student's network from its teacher, too, and where that teacher is gone."""
  c, _ = parse(["cpsc-jax", f"--config={config}", "--config.seed=0"])
  if c.task != "incremental":
    c, _ = run.resolved(c, datasets.find("digits", ""))
  teacher = "--config.teacher.checkpoint=gone"
  c = ml_collections.ConfigDict(c.to_dict())
  c.teacher.checkpoint = "gone"
  p = plans.Plan("p", "a pair", (Row("one", config),))
  workdir = plans.folder(tmp_path, p, p.rows[0], 0)
  make(workdir)
  (workdir / "config.json").write_text(dump(c))
  plans.carry_out(p, p.rows[0], 0, tmp_path, (teacher,), {0}, time.monotonic() + 60)
  with pytest.raises(Refusal, match=r"was run with another student\.lr"):
    plans.carry_out(p, p.rows[0], 0, tmp_path, (teacher, "--config.student.lr=0.7"), {0}, time.monotonic() + 60)


def test_a_plan_is_carried_out_once(tmp_path, plan, capsys):
  out, into = tmp_path / "out", tmp_path / "page.md"
  into.write_text("before\n<!-- table small -->\nold\n<!-- /table small -->\nafter\n")
  argv = [str(plan), f"--out={out}", f"--into={into}", "--config.dataset.data_dir=D"]
  assert table.main(argv) == 0
  page, numbers = into.read_text(), json.loads(into.with_suffix(".json").read_text())
  assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
  assert "| one | 0, 1 | 0.9000, 0.9000 | 0.9000 | 0.0000 |" in page and "not measured" not in page
  assert [run["seed"] for run in numbers["small"]["one"]] == [0, 1]
  assert (tmp_path / "small.png").read_bytes().startswith(b"\x89PNG") and (out / "small.png").exists()
  other = numbers["small"]["two, other"][0]
  assert (
    "flags" not in other
    and other["commit"] == "abc"
    and other["command"].endswith("--config.seed=0 --config.student.lr=0.2")
  )
  first = (out / "small" / "two_other-0" / "calls").read_text()
  assert "--config.dataset.data_dir=D" in first and "--config.student.lr=0.2" in first
  assert table.main(argv) == 0 and calls(out, "one-0") == calls(out, "two_other-0") == 1, "nothing is run twice"
  config = digits.get_config("smoke").to_dict() | {"precision": "float32"}  # as a CPU makes it of "auto"
  config["student"]["lr"] = 0.7
  (out / "small" / "one-0" / "config.json").write_text(json.dumps(config))
  assert table.main(argv) == 2 and "one-0 was run with another student.lr" in capsys.readouterr().err
  config["student"]["lr"] = digits.get_config("smoke").student.lr
  (out / "small" / "one-0" / "config.json").write_text(json.dumps(config))
  assert table.main(argv) == 0
  plan.write_text(PLAN.replace("0.2", "0.3"))
  assert table.main(argv) == 2 and "was begun as" in capsys.readouterr().err


def test_a_run_that_fails_does_not_keep_others_from_being_written(tmp_path, plan, capsys):
  into = tmp_path / "page.md"
  into.write_text("<!-- table small --><!-- /table small -->")
  plan.write_text(PLAN.replace('"digits:smoke", seeds=(0, 1)', '"digits:smoke", ("--config.fail=1",), (0, 1)'))
  argv = [str(plan), f"--out={tmp_path / 'out'}", f"--into={into}", "--config.wait=0"]
  assert table.main(argv) == 2
  assert "one-0 failed with 3: it broke 1 more failed." in capsys.readouterr().err.splitlines()[-1]
  assert "| one | not measured |" in into.read_text() and "| two, other | 0 | 0.9000 |" in into.read_text()
  numbers = json.loads(into.with_suffix(".json").read_text())
  assert numbers["small"]["two, other"][0]["flags"] == ["--config.wait=0"]


def test_a_student_that_only_rests_has_seen_no_images(tmp_path):
  make(tmp_path)
  results = json.loads((tmp_path / "results.json").read_text())
  results["config"]["episodes"]["warmup"], results["samples"]["student"] = 4, 0
  assert table.curve(tmp_path, results)["images"] == [0, 0, 0, 0]


def test_a_budget_stops_what_is_under_way_and_begins_nothing_else(tmp_path, plan, capsys):
  out = tmp_path / "out"
  assert table.main([str(plan), f"--out={out}", "--budget=2s", "--config.wait=60"]) == 0
  assert "one, seed 0: stopped; the same command resumes it" in capsys.readouterr().out
  assert [calls(out, name) for name in ("one-0", "one-1", "two_other-0")] == [1, 0, 0]
  assert table.main([str(plan), f"--out={out}"]) == 0 and calls(out, "one-0") == 2


def test_two_calls_do_not_write_at_once(tmp_path, plan, monkeypatch):
  """Two calls may carry out different rows of one plan in one folder."""
  inside, most = [], []

  def slow(*_):
    inside.append(1)
    most.append(len(inside))
    time.sleep(0.05)
    inside.pop()
    return {}

  monkeypatch.setattr(table, "_write", slow)
  calls = [threading.Thread(target=table.write, args=(tmp_path / "out", None, None)) for _ in range(4)]
  for call in calls:
    call.start()
  for call in calls:
    call.join()
  assert most == [1] * 4


def test_a_run_stops_with_its_plan(tmp_path):
  """A run that went on by itself would hold the folder that the next call is to resume."""
  program = "import subprocess, sys, functools; from benchmarks.plan import _begin; import os, time\n"
  program += "child = subprocess.Popen(['sleep', '600'], preexec_fn=functools.partial(_begin, {0}))\n"
  program += "print(child.pid, flush=True); time.sleep(600)"
  plan = subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
  run = int(plan.stdout.readline())
  assert _is_running(run)
  plan.kill()
  plan.wait()
  for _ in range(100):
    if not _is_running(run):
      return
    time.sleep(0.1)
  raise AssertionError("the run goes on")


def _is_running(pid):
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_what_cannot_be_carried_out_is_refused(tmp_path, plan, capsys):
  out = tmp_path / "out"

  def refused(*argv):
    assert table.main([*argv, f"--out={out}"]) == 2
    return capsys.readouterr().err

  assert "failed with 3: it broke" in refused(str(plan), "--config.fail=1")
  assert "--budget is '2 days'" in refused(str(plan), "--budget=2 days")
  assert "--budget is 'nanh'" in refused(str(plan), "--budget=nanh")
  assert "--jobs is 0; it must be at least 1" in refused(str(plan), "--jobs=0")
  damaged = tmp_path / "damaged.md"
  damaged.write_text("<!-- table small --><!-- /table small -->")
  damaged.with_suffix(".json").write_text("<<<<<<< HEAD")
  assert "damaged.json cannot be read" in refused(str(plan), f"--into={damaged}")
  assert "--teacher is not an option" in refused(str(plan), "--teacher")
  assert "cannot be read" in refused(str(tmp_path / "none.py"))
  assert "lacks the marks <!-- table small -->" in refused(str(plan), f"--into={plan}")
  make(out / "small" / "one-0")
  (out / "small" / "one-0.origin.json").unlink()
  assert "one-0.origin.json is not beside it; copy that too" in refused(str(plan))
  plan.write_text("PAIR = ''")
  assert "lacks ROWS" in refused(str(plan))
  plan.write_text(PLAN.replace("two, other", "One"))
  assert "two rows of the same name" in refused(str(plan))
  plan.write_text(PLAN + 'BASE = "three"')
  assert "has no row 'three', which its BASE names" in refused(str(plan))
  plan.write_text(PLAN + "CURVES = {'a': {0.0: 'one', 1.0: 'four'}}")
  assert "has no row 'four', which its CURVES names" in refused(str(plan))
  for teacher, seed in (("three", 0), ("two, other", 0), ("one", 9)):
    late = f'\nROWS = (Row("last", "digits", seeds=({seed},), teacher={teacher!r}), *ROWS)'
    if teacher == "one":
      late = f'\nROWS = (*ROWS, Row("last", "digits", seeds=({seed},), teacher="one"))'
    plan.write_text(PLAN + late)
    assert f"takes its teachers from '{teacher}', which is no earlier row" in refused(str(plan))


def test_a_run_that_was_resumed_has_one_timeline(tmp_path, monkeypatch):
  """Time goes on where the last checkpoint was; what was lost with the interruption does not count."""
  clock = iter(range(1000, 2000, 10))
  monkeypatch.setattr(events_module, "time", types.SimpleNamespace(time=lambda: next(clock)))
  for first, last in ((1, 3), (3, 4)):
    events = Events(tmp_path / "events", first)
    for epoch in range(first, last + 1):
      events.add(epoch, {"accuracy": 0.5}, {})
    time.sleep(1.1)
  assert table.timeline(tmp_path) == {1: 10, 2: 20, 3: 30, 4: 40}


def test_the_plans_of_the_repository_can_be_read():
  for path in sorted(REPOSITORY.glob("benchmarks/plans/*.py")):
    for row in plans.read(path).rows:
      assert parse(["cpsc-jax", f"--config={row.config}", *row.flags])
  with pytest.raises(Refusal, match="--budget is"):
    plans.seconds_of("h")
