"""Sweeps: the grammar of grids, which members are one program, searches, tables, and whole sweeps."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import SMOKE
from cpsc_jax.configs import digits
from parity import assert_trees_close
from scipy import stats
from test_page import write_run

from cpsc_jax import datasets, initial, paired, report, run
from cpsc_jax.__main__ import main as command
from cpsc_jax.errors import NonFiniteLoss, Refusal
from cpsc_jax.main import main
from cpsc_jax.saved import load
from cpsc_jax.state import Hyper, State
from cpsc_jax.sweep import grid, members, search, table, together, work
from cpsc_jax.sweep.grid import BASE, Axis, Point, Range
from cpsc_jax.sweep.members import Member, of_point, program
from cpsc_jax.sweep.search import Rung

SCL, ADV = "loss.generator.scl", "loss.generator.adversarial"


@pytest.fixture
def config():
  return digits.get_config("smoke")


# The grammar.


def test_axes_and_types(config):
  text = f"{SCL}=0, 0.7,2;generator.conditional=true,False; student.steps=2,3;student.optimiser=adam"
  assert grid.parse(text, config) == (
    Axis((SCL,), (0.0, 0.7, 2.0)),
    Axis(("generator.conditional",), (True, False)),
    Axis(("student.steps",), (2, 3)),
    Axis(("student.optimiser",), ("adam",)),
  )
  linked = grid.parse("loss.generator.ikd + loss.student.l2=1,5", config)
  assert linked == (Axis(("loss.generator.ikd", "loss.student.l2"), (1.0, 5.0)),)
  rates = grid.parse("student.lr=log(0.01..0.3);student.steps=even(1 .. 4)", config)
  assert [axis.values for axis in rates] == [Range(0.01, 0.3, True, False), Range(1, 4, False, True)]


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("", "a grid looks like"),
    ("student.lr", "a grid looks like"),
    ("student.lr=", "a grid looks like"),
    (f"{SCL}=1;", "a grid looks like"),
    ("student.rl=0.1", "no key 'student.rl' (did you mean 'student.lr'?)"),
    ("student=0.1", "it is a section"),
    ("scl=0.1", "no key 'scl' (did you mean '"),
    ("seed=1,2", "--seeds"),
    ("name=a", "cannot vary name"),
    ("dataset.name=mnist", "one data set"),
    ("evaluate.split=test", "measured alike"),
    ("method=dafl", "make a sweep of each"),
    ("student.milestones=1,2", "tuples"),
    (f"{SCL}=a", "it must be a number"),
    (f"{SCL}=-1", "at least 0"),
    (f"{SCL}=nan", "at least 0"),
    (f"{SCL}=0,,1", "it must be"),
    ("student.steps=1.5", "a whole number"),
    ("generator.conditional=1", "True or False"),
    ("student.optimiser=sdg", "one of sgd, adam, adamw, nesterov"),
    (f"{SCL}=1,1.0", "twice"),
    (f"{SCL}=1;{SCL}=2", "names loss.generator.scl twice"),
    ("student.lr=log(0.1,0.2)", "a range looks like"),
    ("student.lr=lin(0.1..0.2)", "a range looks like"),
    ("student.lr=log(0.2..0.1)", "LOW < HIGH"),
    (f"{SCL}=log(0..1)", "0 < LOW < HIGH"),
    ("student.optimiser=even(adam..sgd)", "no number"),
    ("student.lr+student.steps=1", "different types"),
  ],
)
def test_what_a_grid_cannot_say(text, words, config):
  with pytest.raises(Refusal) as refused:
    grid.parse(text, config)
  assert words in str(refused.value) and "\n" not in str(refused.value)


def test_points_are_every_combination_once_and_the_base_first(config):
  axes = [grid.parse(text, config) for text in (f"{SCL}=0,0.7,2;student.lr=0.1,0.2", f"{SCL}=0;{ADV}=0,1")]
  found = {point.name: point.changes for point in grid.points(axes, config)}
  assert list(found)[0] == BASE and found[BASE] == {}
  assert len(found) == 7, "six of the first grid, of which the second has one, and one more"
  assert found["scl=2_lr=0.2"] == {SCL: 2.0, "student.lr": 0.2}
  assert found["scl=0_adversarial=0"] == {SCL: 0.0, ADV: 0.0}
  alike = grid.parse("student.lr=0.2;generator.lr=0.1", config)
  assert [point.name for point in grid.points([alike], config)] == [BASE, "student.lr=0.2_generator.lr=0.1"]
  with pytest.raises(Refusal, match="of which a search draws|from which a search draws"):
    grid.points([grid.parse("student.lr=log(0.1..0.2)", config)], config)
  steps = ",".join(map(str, range(1, 102)))
  with pytest.raises(Refusal, match="more than 10,000 combinations"):
    grid.points([grid.parse(f"student.steps={steps};generator.steps={steps}", config)], config)


def test_names_can_be_folders_and_differ(config):
  texts = ("teacher.checkpoint=/a/b,/a?b", "student.lr=0.1234561,0.1234562")
  for text in texts:
    names = [point.name for point in grid.points([grid.parse(text, config)], config)]
    assert len(set(names)) == 3 and not any(set("/? ,") & set(name) for name in names)


def test_drawn_points(config):
  axes = [grid.parse("student.lr=log(0.001..1);student.steps=even(1..5);generator.conditional=true,false", config)]
  points, again = (grid.drawn(axes, config, 200, np.random.default_rng(3)) for _ in range(2))
  assert points == again and points[0].name == BASE and len({point.name for point in points}) == 200
  rates = np.array([point.changes["student.lr"] for point in points[1:]])
  assert rates.min() >= 0.001 and rates.max() <= 1
  assert abs(np.mean(rates < 0.0316) - 0.5) < 0.12, "half of them below the geometric mean"
  assert {point.changes.get("student.steps", 1) for point in points} == {1, 2, 3, 4, 5}
  narrow = grid.parse("student.momentum=even(0.99991..0.99999)", config)[0].values
  assert {narrow.draw(np.random.default_rng(seed)) for seed in range(99)} <= {0.99991, 0.9999, 0.99999}
  few = grid.drawn([grid.parse("generator.conditional=true,false", config)], config, 10, np.random.default_rng(0))
  assert [point.name for point in few] == [BASE, "conditional=False"]


# Programs.


def programs(config, *changes):
  spec = datasets.find("digits", "")
  found = []
  for each in changes:
    c, card = run.resolved(of_point(config, Point("", each), 0), spec)
    found.append(program(c, card))
  return found


def test_numbers_share_a_program_and_structure_does_not(config):
  base, *same = programs(
    config,
    {},
    {SCL: 2.0},
    {"student.lr": 0.2, "generator.lr": 0.1},
    {"loss.student.kd": 3.0, "teacher.epochs": 9, "teacher.lr": 0.2},
    {"arm": "distill", "seed": 7},
  )
  assert base and set(same) == {base}
  others = programs(
    config, {SCL: 0.0}, {"student.momentum": 0.8}, {"generator.conditional": False}, {"teacher.net": "wrn_16_1"}
  )
  assert len({base, *others}) == 5
  assert programs(config, {"arm": "real_kd"}, {"arm": "real_labels"}) == [None, None]


def test_a_rate_is_a_factor_only_where_all_of_its_steps_move_along(config):
  assert members.rates(config) == ("student.lr", "generator.lr")
  config.student.lr_end = 1e-3
  assert members.rates(config) == ("generator.lr",)
  config.student.schedule = "steps"
  assert members.rates(config) == ("student.lr", "generator.lr")
  config.method = "deepinversion"
  assert members.rates(config) == ("student.lr",)


def test_teachers_are_shared_by_points_that_do_not_change_them():
  same = [members.teacher_point(Point("", changes)) for changes in ({}, {SCL: 2.0, "student.lr": 1.0})]
  assert same[0] == same[1] == Point("seed", {})
  other = members.teacher_point(Point("", {SCL: 2.0, "teacher.lr": 0.2}))
  assert other.changes == {"teacher.lr": 0.2} and other.name.endswith("-seed")


def test_the_factor_of_a_rate_is_the_ratio(config):
  c, _ = run.resolved(of_point(config, Point("", {"student.lr": 0.2}), 0), datasets.find("digits", ""))
  first, _ = run.resolved(config, datasets.find("digits", ""))
  weights = initial.weights({"kd": 1.0})
  state = State(*[None] * 6, hyper=Hyper(weights, weights))
  got = together.with_rates(state, c, first).hyper
  assert float(got.student.lr) == pytest.approx(0.2 / config.student.lr) and float(got.generator.lr) == 1


# Searches.


@pytest.mark.parametrize("budget", [9, 10, 40, 41, 300])
@pytest.mark.parametrize("seeds", [1, 2])
def test_a_search_costs_no_more_than_its_budget_and_no_less_than_it_could(budget, seeds):
  rungs = search.planned("halving", budget, seeds, 20)
  assert [rung.epochs for rung in rungs] == [3, 7, 20]
  assert seeds * search.cost(rungs) <= budget < seeds * search.cost(search.halving(rungs[0].points + 1, (3, 7, 20)))
  assert [rung.points for rung in rungs[1:]] == [rungs[0].points // 3, max(rungs[0].points // 9, 1)]
  assert search.planned("random", budget, seeds, 20) == [Rung(budget // seeds, 20)]


def test_rungs_and_their_cost():
  assert search.lengths(2) == [1, 2] and search.lengths(1) == [1] and search.lengths(600) == [67, 200, 600]
  assert search.lengths(20, least=5) == [7, 20], "none that ends while the student still waits"
  assert search.cost([Rung(9, 2), Rung(3, 6), Rung(1, 18)]) == pytest.approx((18 + 12 + 12) / 18)
  assert [rung.points for rung in search.planned("halving", 2, 1, 27)] == [8, 2, 1]
  with pytest.raises(Refusal, match=r"--budget is 1, too little for the 3 points .* give 2 or more"):
    search.planned("halving", 1, 1, 27)
  with pytest.raises(Refusal, match="the 2 points that --search random needs .* give 6 or more"):
    search.planned("random", 3, 3, 20)
  assert search.planned("random", 10**9, 1, 20) == [Rung(grid.MOST_POINTS, 20)]


def test_checks_come_before_any_work(config, tmp_path):
  sweep = work.Sweep(config, (), tmp_path / "sweep", (f"{SCL}=0,2",), 2)

  def refused(words, **changes):
    with pytest.raises(Refusal) as error:
      work.checked(dataclasses.replace(sweep, **changes))
    assert words in str(error.value) and "\n" not in str(error.value), error.value

  refused("--seeds is 0", seeds=0)
  refused("--budget is for a search", budget=3)
  refused("needs --budget", search="random")
  refused("schedule.epochs cannot be set", search="halving", budget=9, grids=("schedule.epochs=2,3",))
  refused(
    "point conditional=False_between_share=0.5: ", grids=("generator.conditional=false;generator.between_share=0.5",)
  )
  refused("point norm_parts=3: config.student.norm_parts is 3", grids=("student.norm_parts=3",))
  reference = digits.get_config("smoke")
  reference.reference = True
  given = digits.get_config("smoke")
  given.teacher.checkpoint = str(tmp_path)
  refused("names a teacher that is trained already", config=given, grids=("teacher.lr=0.1,0.2",))
  refused("base and scl=0 are the same run", config=reference)
  found = work.checked(dataclasses.replace(sweep, search="random", budget=4))
  assert found.sweep.config.evaluate.split == "validation" and config.evaluate.split == "test"
  assert len(found.points) == 2 and not (tmp_path / "sweep").exists()


def test_rungs_of_a_search_are_the_start_of_its_last_one(config, tmp_path):
  config.schedule.epochs = 9
  sweep = work.Sweep(config, ("--config", "digits:smoke"), tmp_path, ("student.lr=log(0.01..1)",), 1, "halving", 9)
  found = work.checked(sweep)
  assert [rung.epochs for rung in found.rungs] == [1, 3, 9]
  first, second, last = (work.members(found, found.points[:1], number)[0] for number in range(3))
  lengths = [(each.config.schedule.epochs, each.config.schedule.horizon) for each in (first, second, last)]
  assert lengths == [(1, 9), (3, 9), (9, 0)]
  assert first.earlier is None and second.earlier == first.workdir and last.earlier == second.workdir
  assert last.workdir == tmp_path / "members" / "base-0" and first.teacher == last.teacher
  assert {"--config.evaluate.split=validation", "--config.schedule.horizon=9"} <= set(first.command)


def test_a_folder_belongs_to_one_sweep(config, tmp_path):
  sweep = work.Sweep(config, (), tmp_path, (f"{SCL}=0,2",), 2)
  work.claim(sweep)
  work.claim(sweep)
  other = digits.get_config("smoke")
  other.student.lr = 0.3
  changes = {"grids": (f"{SCL}=0",), "seeds": 3, "config": other}
  with pytest.raises(Refusal, match=r"belongs to another sweep \(it differs in --grid, --seeds, student.lr\)"):
    work.claim(dataclasses.replace(sweep, **changes))
  (tmp_path / work.SWEEP).write_text("{")
  with pytest.raises(Refusal, match="cannot be read"):
    work.claim(sweep)
  (tmp_path / "run").mkdir()
  (tmp_path / "run" / "config.json").write_text("{}")
  with pytest.raises(Refusal, match="has a run, and a sweep needs a folder of its own"):
    work.claim(dataclasses.replace(sweep, workdir=tmp_path / "run"))


# The command line.


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([], "--grid is required"),
    (["--grid", "student.rl=1"], "did you mean 'student.lr'"),
    (["--grid", f"{SCL}=1", "--config.student.rl=1"], "no key 'student.rl'"),
    (["--grid", f"{SCL}=1", "--seed=1"], "unknown flag --seed"),
    (["--grid", f"{SCL}=1", "--seeds=x"], "invalid int value"),
    (["--grid", f"{SCL}=1", "--search=grdi"], "invalid choice"),
    (["--grid", f"{SCL}=1", "--together=-1"], "--together is -1"),
  ],
)
def test_flags_are_refused_in_one_sentence(flags, words, tmp_path, capsys):
  assert command(["sweep", SMOKE, f"--workdir={tmp_path / 'w'}", *flags]) == 2
  error = capsys.readouterr().err
  assert error.startswith("cpsc_jax: ") and error.count("\n") == 1 and words in error, error
  assert not (tmp_path / "w").exists()


# Tables.


def made_up(folder, point, changes, seed, accuracy):
  if accuracy is None:
    return Member(Point(point, changes), seed, None, folder / f"{point}-{seed}", None)
  workdir = write_run(folder / f"{point}-{seed}", seed=seed, accuracy=accuracy)
  return Member(Point(point, changes), seed, None, workdir, None)


def test_the_interval_is_that_of_a_paired_t_test():
  a, b = np.random.default_rng(0).normal(size=(2, 5))
  want = stats.ttest_rel(a, b).confidence_interval(0.95)
  assert paired.interval(a - b) == pytest.approx(tuple(want))
  assert paired.interval([0.1]) is None


def test_rows_pair_by_seed_and_name_what_failed_or_waits(tmp_path):
  found = [made_up(tmp_path, BASE, {}, seed, accuracy) for seed, accuracy in enumerate((0.90, 0.94, 0.92))]
  found += [made_up(tmp_path, "scl=2", {SCL: 2.0}, seed, accuracy) for seed, accuracy in enumerate((0.91, 0.97, None))]
  found += [made_up(tmp_path, "scl=9", {SCL: 9.0}, 0, None)]
  together.fail(found[-1], NonFiniteLoss("not finite"))
  base, two, nine = table.rows(found)
  assert base["mean"] == pytest.approx(0.92) and base["deviation"] == pytest.approx(0.02) and base["difference"] is None
  assert two["difference"] == pytest.approx(0.02) and two["pairs"] == 2 and two["waiting"] == [2]
  assert two["interval"] == pytest.approx(list(stats.ttest_1samp([0.01, 0.03], 0).confidence_interval(0.95)))
  assert nine["failed"] == {"0": "not finite"} and nine["mean"] is None and not nine["waiting"]
  about = {"title": "a sweep", "notes": [], "search": "grid"}
  text = table.write(tmp_path, "table", found, about, page=True)
  assert "| scl=2 | 2 | 0.9400 | 0.0424 | +0.0200 [-0.1071, +0.1471] |" in text
  assert "seed 2 waits" in text and "seed 0 not finite" in text and (tmp_path / "table.md").read_text() == text
  assert json.loads((tmp_path / "table.json").read_text())["points"][1]["changes"] == {SCL: 2.0}
  assert (
    "2 runs" not in (tmp_path / "table.html").read_text() and "95 % interval" in (tmp_path / "table.html").read_text()
  )


def test_a_search_ranks_points_that_have_all_of_their_seeds(tmp_path):
  found = [made_up(tmp_path, name, {}, 0, accuracy) for name, accuracy in ((BASE, 0.9), ("a", 0.95), ("b", 0.92))]
  found.append(made_up(tmp_path, "a", {}, 1, None))
  together.fail(found[-1], NonFiniteLoss("not finite"))
  assert [point.name for point in work._ranked(found)] == ["b", BASE]


def test_a_teacher_that_diverges_ends_its_own_members_alone(config, tmp_path, monkeypatch, capsys):
  of = work.checked(work.Sweep(config, (), tmp_path, ("teacher.lr=9", f"{SCL}=2"), 2, most=1))
  each, alone = work.members(of, of.points), []

  def teach(of, member):
    if member.seed == 0 and "teacher.lr" in member.point.changes:
      raise NonFiniteLoss("teacher: the loss is not finite.")
    (member.teacher / "teacher").mkdir(parents=True)
    (member.teacher / "teacher" / work.CARD).touch()

  monkeypatch.setattr(work, "_teach", teach)
  monkeypatch.setattr(work, "_alone", lambda member, data: alone.append(member.name))
  list(work.trained(of, each))
  (failed,) = (member for member in each if member.failure)
  assert failed.name == "lr=9-0" and failed.failure == "teacher: the loss is not finite."
  assert set(alone) == {member.name for member in each} - {failed.name}
  assert "The sweep goes on." in capsys.readouterr().out


@pytest.mark.parametrize(
  ("kind", "failed", "words"), [("grid", 1, ""), ("grid", 2, "none of"), ("random", 1, "no point")]
)
def test_a_grid_ends_without_a_point_that_has_all_seeds_and_a_search_does_not(
  kind, failed, words, config, tmp_path, monkeypatch
):
  of = work.checked(work.Sweep(config, (), tmp_path / "sweep", (f"{SCL}=2",), 2, kind, 4 * (kind == "random")))
  names = [point.name for point in of.points]
  found = [made_up(tmp_path, name, {}, seed, 0.9 if seed >= failed else None) for name in names for seed in (0, 1)]
  for member in found:
    if member.seed < failed:
      together.fail(member, NonFiniteLoss("not finite"))
  monkeypatch.setattr(work, "members", lambda *_: found)
  monkeypatch.setattr(datasets.Data, "require", lambda _: None)
  if words:
    with pytest.raises(Refusal, match=words):
      work.carry_out(of)
  else:
    assert "0.9000" in work.carry_out(of)


def test_a_member_that_was_interrupted_alone_goes_on_alone(config, tmp_path, monkeypatch):
  of = work.checked(work.Sweep(config, (), tmp_path, (f"{SCL}=2",), 2))
  each, alone = work.members(of, of.points), []
  (each[0].workdir / "checkpoints" / "1").mkdir(parents=True)
  for member in each:
    (member.teacher / "teacher").mkdir(parents=True, exist_ok=True)
    (member.teacher / "teacher" / work.CARD).touch()

  def together_(group, root, data, whole=False):
    together.folder_of(root, group).mkdir(parents=True)
    return group

  monkeypatch.setattr(together, "carry_out", together_)
  monkeypatch.setattr(work, "_alone", lambda member, data: alone.append(member.name))
  yielded = [[member.name for member in taken] for taken in work.trained(of, each)]
  assert alone == [each[0].name] and [member.name for member in each[1:]] in yielded


def test_a_dry_run_counts_the_iterations_of_each_point(config, tmp_path, monkeypatch):
  monkeypatch.setattr(together, "rehearsed", lambda *_: together.Rehearsal(1, 1.0, 1.0, 0.0))
  grids = ("schedule.iterations=7", "schedule.epochs=5")
  text = work.plan_text(work.checked(work.Sweep(config, (), tmp_path / "sweep", grids, 1)))
  for name, seconds in (("base", 4), ("iterations=7", 14), ("epochs=5", 10)):
    assert f"1 to do in {seconds} s: {name}-0" in text


# Whole sweeps.


def swept(workdir, digits_dir, *flags):
  return command(["sweep", SMOKE, f"--workdir={workdir}", f"--config.dataset.data_dir={digits_dir}", *flags])


@pytest.mark.slow
def test_members_together_agree_with_runs_alone_and_are_resumed(tmp_path, digits_dir, monkeypatch, capsys):
  """Two weights, two rates and two seeds with a teacher each; killed while its members are ended one by one."""
  flags = (digits_dir, "--grid", f"{SCL}=2;student.lr=0.2", "--seeds=2")
  end, ended = together._end, []

  def killed(member, *rest):
    if len(ended) == 2:
      raise KeyboardInterrupt
    ended.append(member.name)
    end(member, *rest)

  monkeypatch.setattr(together, "_end", killed)
  assert swept(tmp_path, *flags) == 130
  monkeypatch.setattr(together, "_end", end)
  before = {name: (tmp_path / "members" / name / "results.json").stat().st_mtime_ns for name in ended}
  assert len(list((tmp_path / "groups" / "members").iterdir())) == 1
  capsys.readouterr()
  assert swept(tmp_path, *flags) == 0
  said = capsys.readouterr().out
  assert "4 members: resuming after epoch 2 of 2" in said and "| scl=2_lr=0.2 | 2 |" in said
  assert before == {name: (tmp_path / "members" / name / "results.json").stat().st_mtime_ns for name in ended}
  assert not list((tmp_path / "groups" / "members").iterdir())
  assert {path.name for path in (tmp_path / "teachers").iterdir()} == {"seed-0", "seed-1"}

  member = tmp_path / "members" / "scl=2_lr=0.2-1"
  results = report.read_results(member)
  assert results["together"] == 4 and results["teacher"]["seed"] == results["seed"] == 1
  alone, words = tmp_path / "alone", results["command"].split()
  assert words[:2] == ["cpsc-jax", SMOKE]
  assert main([*words, f"--workdir={alone}"]) == 0
  ours, theirs = (json.loads((folder / "history.json").read_text())["student"] for folder in (member, alone))
  for mine, its in zip(ours, theirs, strict=True):
    assert mine.keys() == its.keys() and mine["totals"] == pytest.approx(its["totals"], rel=1e-3)
    assert mine.get("diagnostics", {}).keys() == its.get("diagnostics", {}).keys()
  assert_trees_close(load(member / "student")[1], load(alone / "student")[1], 2e-2)
  names = [{str(path.relative_to(folder)) for path in folder.rglob("*.np*")} for folder in (member, alone)]
  assert names[0] == names[1]

  # What an ordinary run does with its folder, it does with a member's: its files again, without training.
  (member / "results.json").unlink()
  assert main([*words, f"--workdir={member}"]) == 0
  assert "resuming after epoch 2 of 2" in capsys.readouterr().out
  assert report.read_results(member)["student"]["last"] == results["student"]["last"]


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["distill", "real_kd"])
def test_successive_halving_goes_on_from_the_rung_before(arm, tmp_path, digits_dir, capsys):
  flags = (
    digits_dir,
    f"--config.arm={arm}",
    "--config.schedule.epochs=4",
    "--search=halving",
    "--seeds=1",
    "--budget=2",
  )
  assert swept(tmp_path, *flags, "--grid", "student.lr=log(0.001..0.5)") == 0
  said = capsys.readouterr().out
  assert "a search chooses on a part held out" in said and "rung 1 of 3, 1 epochs: 5 points" in said
  assert len(list((tmp_path / "rungs" / "1").iterdir())) == 5
  (last,) = (tmp_path / "members").iterdir()
  short, middle = (tmp_path / "rungs" / epochs / last.name for epochs in ("1", "2"))
  histories = [json.loads((folder / "history.json").read_text())["student"] for folder in (short, middle, last)]
  assert [len(history) for history in histories] == [1, 2, 4]
  assert histories[1][:1] == histories[0] and histories[2][:2] == histories[1]
  best = max(json.loads((tmp_path / "table_1.json").read_text())["points"], key=lambda row: row["mean"])
  assert last.name == f"{best['point']}-0"
  assert report.read_results(last)["evaluation"]["split"] == "validation"
  config = json.loads((last / "config.json").read_text())
  assert config["schedule"]["epochs"] == 4 and config["schedule"]["horizon"] == 0


@pytest.mark.slow
def test_a_dry_run_lists_members_and_writes_nothing(tmp_path, digits_dir, capsys):
  assert swept(tmp_path / "w", digits_dir, "--grid", f"{SCL}=0,2", "--seeds=2", "--dry-run") == 0
  said = capsys.readouterr().out
  assert "3 points, 2 seed(s): 6 members" in said and "2 teachers are trained first, 0 of them are there" in said
  assert "4 in a program of" in said and "2 in a program of" in said and "base-0, base-1, scl=2-0, scl=2-1" in said
  assert "in all" in said and not (tmp_path / "w").exists()


def test_fewer_members_where_memory_is_short(monkeypatch, capsys):
  monkeypatch.setattr(together, "device_memory", lambda: 1000)
  built = []

  def build(number):
    built.append(number)
    return type("Program", (), {"needed": 200 * number})()

  assert together.fitting(10, build)[0] == 4 and built == [10, 4]
  assert together.fitting(4, build, beside=300)[0] == 2, "what is left besides those that have begun"
  assert together.fitting(1, lambda number: type("Program", (), {"needed": 10**9})())[0] == 1
  assert "would not fit: 4 members together" in capsys.readouterr().out
  state = {"images": np.zeros(90, np.uint8), "weights": np.zeros(2, np.float32), "count": np.zeros(2, np.uint8)}
  assert [together.beginning(state, copies) for copies in (2, 3, 50)] == [4, 2, 1]
  monkeypatch.setattr(together, "device_memory", lambda: 0)
  assert together.fitting(10, build)[0] == 10 and together.beginning(state, 2) > 10**9, "where it is not known"
