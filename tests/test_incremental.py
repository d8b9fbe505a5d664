"""Class-incremental learning: phases and orders, terms against NumPy, what a phase may open, a run and its files."""

import dataclasses
import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, command, made_once
from cpsc_jax.configs import incremental_cifar10, incremental_cifar100, incremental_digits
from test_configs import right, wrong

from cpsc_jax import (
  algorithm,
  checkpoint,
  config,
  datasets,
  experiment,
  losses,
  mesh,
  nets,
  optim,
  phases,
  sample,
  schema,
  streams,
)
from cpsc_jax import run as runs
from cpsc_jax.errors import Refusal
from cpsc_jax.main import main
from cpsc_jax.state import Output, Statistics, View
from cpsc_jax.tasks import incremental

DIGITS = datasets.DATASETS["digits"]
SMOKE = f"--config={REPOSITORY / 'configs' / 'incremental_digits.py'}:smoke"


def settings(**changes):
  """The smoke config with keys changed, a__b for a.b."""
  c = incremental_digits.get_config("smoke")
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


# Phases, orders and what is refused.


@pytest.mark.parametrize(
  ("number", "first", "expected"),
  [(5, 0, (2,) * 5), (2, 0, (5, 5)), (6, 5, (5, 1, 1, 1, 1, 1)), (3, 4, (4, 3, 3)), (10, 0, (1,) * 10)],
)
def test_classes_are_divided_among_phases(number, first, expected):
  assert incremental.sizes(settings(incremental__phases=number, incremental__first=first), 10) == expected


def test_an_order_is_given_or_shuffled_by_a_seed():
  assert incremental.class_order(settings(), 4) == (0, 1, 2, 3)
  assert incremental.class_order(settings(incremental__order="3, 1,0,2"), 4) == (3, 1, 0, 2)
  shuffled = [incremental.class_order(settings(incremental__order=str(seed)), 10) for seed in (0, 0, 1)]
  assert shuffled[0] == shuffled[1] != shuffled[2] and all(sorted(each) == list(range(10)) for each in shuffled)


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    ({"incremental__phases": 3}, "phases is 3, into which 10 classes of 'digits' cannot be .* one of 1, 2, 5, 10"),
    ({"incremental__phases": 20}, "phases is 20, into which 10 classes"),
    ({"incremental__first": 4, "incremental__phases": 5}, "the 6 classes after the first 4 of 'digits'.*2, 3, 4, 7"),
    ({"incremental__first": 10}, "the 0 classes after the first 10"),
    ({"incremental__order": "0,1,2"}, "order has 3 numbers that are no permutation of the 10 classes of 'digits'"),
    ({"incremental__order": "0,1,2,3,4,5,6,7,8,8"}, "no permutation of the 10 classes"),
    ({"incremental__order": "first"}, "order is 'first'; it must be empty, the seed of a shuffle, or all classes"),
    ({"arm": "real_kd"}, "config.arm is 'real_kd', which is none of task 'incremental'; its arms are distill, untr"),
    ({"reference": True}, "config.reference is True, which class-incremental learning does not have; set it to False"),
    ({"student__micro_batches": 2}, "config.student.micro_batches is 2, which class-incremental learning does not"),
    ({"loss__student__channel": 0.1, "loss__student__relation": 0.5}, "channel and relation each put something"),
    ({"student__norm_parts": 2, "incremental__batch_size": 33}, "norm_parts is 2, which does not divide the 65 images"),
    (
      {"generator__warmup_epochs": 1, "incremental__refine": 1},
      "refine are 2 epochs together, and config.schedule.epochs is 2",
    ),
    ({"incremental__rests": True}, "rests is True, but generator.warmup_epochs is 0: the"),
    ({"incremental__refine": 1}, "refine needs config.loss.student.refine, whose weight is 0"),
    (
      {"loss__student__refine": 0.5},
      "loss.student.refine is 0.5, but config.incremental.refine is 0, so that there is",
    ),
    (
      {"generator__prior": "given", "generator__prior_shares": "0,0,1,1,1,1,1,1,1,1"},
      "nothing but 0 for the 2 classes of the first phase",
    ),
    ({"generator__between_share": 0.25}, "between_share is 0.25, but loss.student.balanced takes a sample between two"),
    ({"incremental__batch_size": 0}, "config.incremental.batch_size is 0; it must be at least 1"),
  ],
)
def test_bad_settings_are_refused_before_any_work(changes, word):
  c = settings(**{"incremental__phases": 5, **changes})
  with pytest.raises(Refusal, match=word):
    config.resolve(c, DIGITS, mesh.make_mesh())


@pytest.mark.parametrize(
  ("family", "changes", "word"),
  [
    (
      "rgal",
      {"incremental.rests": True, "pool.fresh_share": 0.25},
      "share of a batch, config.pool.fresh_share, is 0.25",
    ),
    ("fast", {"incremental.rests": True, "episodes.warmup": 2}, "after 2 batches, and the student waits for more than"),
    ("nayer", {"generator.embedding": "classes.npy"}, "classes.npy', a file with a row for each class, and each phase"),
  ],
)
def test_bad_settings_of_other_methods_are_refused(family, changes, word):
  c = other_method(family)
  c.update_from_flattened_dict({"generator.warmup_epochs": 1, "schedule.epochs": 4, "incremental.phases": 5} | changes)
  with pytest.raises(Refusal, match=word):
    config.resolve(c, DIGITS, mesh.make_mesh())


def other_method(method):
  """The smoke config of another method on the digits, with the keys of phases."""
  c = importlib.import_module(f"cpsc_jax.configs.{method}_cifar10").get_config("digits_smoke")
  schema.add_keys_of_task(c, "incremental")
  return c


def test_a_data_set_without_training_images_is_refused():
  spec = dataclasses.replace(DIGITS, sizes={"test": 454})
  with pytest.raises(Refusal, match="no training split, of which every phase learns new classes"):
    config.resolve(settings(teacher__checkpoint="somewhere"), spec, mesh.make_mesh())


@pytest.mark.parametrize("arm", incremental.ARMS)
def test_its_arms_belong_to_no_other_task(arm):
  c = incremental_digits.digits.get_config("smoke")
  c.arm = arm
  with pytest.raises(Refusal, match=f"config.arm is '{arm}', which is none of task 'distil'"):
    config.resolve(c, DIGITS, mesh.make_mesh())


@pytest.mark.parametrize(
  ("module", "variant"),
  [
    *((module, variant) for module in (incremental_digits, incremental_cifar10) for variant in ("", "smoke")),
    (incremental_cifar10, "cpu"),
    *((incremental_cifar100, variant) for variant in ("", "smoke", "abd", "cpsc")),
  ],
)
def test_configs_are_complete_and_resolve(module, variant):
  c = module.get_config(variant)
  assert dict(schema.flatten(c)).keys() == schema.keys_of(c.method, "incremental").keys()
  assert c.is_locked and c.incremental.is_locked and c.task == "incremental"
  config.resolve(c, datasets.find(c.dataset.name, "").spec, mesh.make_mesh())


@pytest.mark.parametrize("name", schema.KEYS_OF_TASK["incremental"])
def test_what_a_key_must_not_be_is_refused(name):
  flat, key = dict(schema.flatten(settings())), schema.keys_of("cpsc", "incremental")[name]
  for value in wrong(key):
    with pytest.raises(Refusal, match=rf"^config\.{name} is .*; it must be .+\.$"):
      schema.check(flat | {name: value})
  for value in right(key):
    schema.check(flat | {name: value})


# What a phase may open.


class Watched(datasets.Prepared):
  """Notes the classes of the training images that are opened."""

  def __init__(self, folder):
    super().__init__("digits", str(folder))
    self.opened = []

  def _load(self, split, rows=None):
    found = super()._load(split, rows)
    if split == "train":
      self.opened.append(set(np.unique(found.labels).tolist()))
    return found


def test_a_view_has_the_classes_of_its_phase_alone(digits_dir):
  watched, order = Watched(digits_dir), (7, 3, 9, 0, 1, 2, 4, 5, 6, 8)
  view = datasets.Classes(watched, order, known=2, seen=4)
  assert view.class_names() == ["7", "3", "9", "0"] and view.spec.num_classes == 4 and not watched.opened
  train, whole = view.load_train("test"), datasets.Prepared("digits", str(digits_dir)).load_train("test")
  assert watched.opened == [{9, 0}] and set(np.unique(train.labels)) == {2, 3}
  for label, original in ((2, 9), (3, 0)):
    ours, theirs = train.images[train.labels == label], whole.images[whole.labels == original]
    np.testing.assert_array_equal(ours, theirs)
  assert len(train) == view.spec.sizes["train"]
  test = view.load_evaluation("test")
  assert set(np.unique(test.labels)) == {0, 1, 2, 3} and len(test) == view.spec.sizes["test"]
  held, rest = view.load_evaluation("validation"), view.load_train("validation")
  assert set(np.unique(held.labels)) == {0, 1, 2, 3} and len(rest) + int(np.sum(held.labels > 1)) == len(train)
  kept = view.load_kept("test", 5)
  assert np.bincount(kept.labels).tolist() == [5, 5]


def test_only_teach_opens_images_that_are_kept():
  for path in (REPOSITORY / "cpsc_jax").rglob("*.py"):
    if ".load_kept(" in path.read_text():
      assert path.name == "teach.py"


# Terms.


def outputs(rng, number, classes, width=6):
  logits, pooled = rng.normal(size=(number, classes)), rng.normal(size=(number, width))
  return Output(jnp.asarray(logits), pooled=jnp.asarray(pooled))


def view(rng, c, seen, drawn=3):
  real, old = c.incremental.batch_size, c.incremental.known
  labels = np.concatenate([rng.integers(old, seen, real), rng.integers(0, old, drawn)])
  head = {"kernel": jnp.asarray(rng.normal(size=(6, old))), "bias": jnp.asarray(rng.normal(size=old))}
  return View(
    jnp.asarray(labels),
    outputs(rng, real + drawn, old),
    outputs(rng, real + drawn, seen),
    memory={"old_classifier": head, "refining": jnp.asarray(False)},
    student_params={"maps": {name: jnp.asarray(rng.normal(size=(6, 12))) for name in ("before", "now")}},
  )


def log_softmax(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def numpy_angles(x):
  """The loops of RKD's definition."""
  number = len(x)
  found = np.zeros((number,) * 3)
  for j in range(number):
    for i in range(number):
      for k in range(number):
        if j not in (i, k):
          a, b = x[i] - x[j], x[k] - x[j]
          found[j, i, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
  return found


def test_angles_are_those_of_the_definition():
  with jax.enable_x64(True):
    x = np.random.default_rng(0).normal(size=(5, 3))
    np.testing.assert_allclose(losses.angles(jnp.asarray(x)), numpy_angles(x), atol=1e-12)
    twice = jnp.asarray(np.concatenate([x, x[:1]]))  # two rows that are equal
    assert np.isfinite(jax.grad(lambda x: losses.angles(x).sum())(twice)).all()


@pytest.mark.parametrize(("old", "local", "logits", "relation"), [(10, 0.69, 0.39, 1.29), (90, 0.23, 1.16, 3.88)])
def test_factors_are_the_published_ones(old, local, logits, relation):
  """Of ten new classes, beside the weights 0.5, 0.15 and 0.5."""
  found = incremental.factors(settings(incremental__balance="rdfcil"), old, 10)
  weighted = 0.5 * found["local"], 0.15 * found["old_logits"], 0.5 * found["relation"]
  assert weighted == pytest.approx((local, logits, relation), abs=0.006)
  abd = incremental.factors(settings(incremental__balance="abd"), old, 10)
  assert abd == {"local": pytest.approx(10 / (old + 10))}


@pytest.mark.parametrize("balance", ["none", "abd", "rdfcil"])
def test_terms_are_those_of_numpy(balance):
  old, seen, real, drawn = 4, 7, 5, 3
  with jax.enable_x64(True):
    c = settings(incremental__known=old, incremental__batch_size=real, incremental__balance=balance)
    rng = np.random.default_rng(1)
    v = view(rng, c, seen, drawn)
    terms = incremental.terms(c, None, (8, 8, 1), seen)["student"]
    value = {name: float(np.mean(term.value(v))) for name, term in terms.items() if name != "classifier"}
  s, t, y = np.asarray(v.student.logits), np.asarray(v.teacher.logits), np.asarray(v.labels)
  f, g = np.asarray(v.student.pooled), np.asarray(v.teacher.pooled)
  factor = {"local": 1.0, "old_logits": 1.0, "relation": 1.0}
  if balance == "abd":
    factor["local"] = 3 / 7
  if balance == "rdfcil":
    alpha, beta = np.log2(3 / 2 + 1), np.sqrt(4 / 3)
    factor = {"local": (1 + 1 / alpha) / beta, "old_logits": alpha * beta, "relation": alpha * beta}
  rows, soft = np.arange(real), log_softmax(t[:real] / 2)
  expected = {
    "local": -log_softmax(s[:real, old:])[rows, y[:real] - old].mean() * factor["local"],
    "lwf": 4 * np.mean((np.exp(soft) * (soft - log_softmax(s[:real, :old] / 2))).sum(-1)),
    "old_logits": np.abs(t[real:] - s[real:, :old]).mean() * factor["old_logits"],
  }
  cross_entropy = -log_softmax(s)[np.arange(len(y)), y]
  # Each class, not each image, weighs the same: 3 new classes in the 5 real images, 4 old ones in the 3 drawn.
  balanced = (3 * cross_entropy[:real].mean() + 4 * cross_entropy[real:].mean()) / 7
  head = v.memory["old_classifier"]
  seen_now = f @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
  before, now = (np.asarray(v.student_params["maps"][name]) for name in ("before", "now"))
  relation = np.abs(numpy_angles(g[:real] @ before) - numpy_angles(f[:real] @ now)).mean() * factor["relation"]
  more = {"balanced": balanced, "refine": balanced, "relation": relation}
  more["old_features"] = np.square(t - seen_now).mean()
  assert value == pytest.approx(expected | more, rel=1e-6)


def test_terms_of_the_generator_are_those_of_numpy():
  rng = np.random.default_rng(5)
  with jax.enable_x64(True):
    logits, images = rng.normal(size=(6, 4)) * 500, rng.normal(size=(3, 7, 6, 2))
    seen = {
      "a": {"mean": rng.normal(size=5), "var": rng.uniform(0.5, 2, 5)},
      "b": {"mean": rng.normal(size=3), "var": rng.uniform(1, 2, 3)},
    }
    stored = jax.tree.map(lambda x: np.abs(x) + 0.1 * rng.uniform(size=x.shape), seen)
    statistics = Statistics(jax.tree.map(jnp.asarray, seen), jax.tree.map(jnp.asarray, stored))
    found = [
      losses.confident(jnp.asarray(logits), 1000.0),
      losses.even(jnp.asarray(logits)),
      losses.moments_divergence(statistics),
      losses.roughness(jnp.asarray(images)),
    ]
    assert losses.moments_divergence(Statistics(seen, seen)) == 0 and losses.moments_divergence(None) == 0
    assert losses.even(jnp.zeros((5, 4))) == pytest.approx(0)
  mean = np.exp(log_softmax(logits)).mean(0)
  divergence = [
    np.mean(
      np.log(np.sqrt(b["var"]) / np.sqrt(r["var"])) - (1 - (r["var"] + (r["mean"] - b["mean"]) ** 2) / b["var"]) / 2
    )
    for b, r in ((seen[layer], stored[layer]) for layer in seen)
  ]
  padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
  kernel = np.exp(-0.5 * (np.arange(-2, 3)[:, None] ** 2 + np.arange(-2, 3)[None] ** 2))
  kernel /= kernel.sum()
  blurred = sum(kernel[i, j] * padded[:, i : i + 7, j : j + 6] for i in range(5) for j in range(5))
  expected = [
    -log_softmax(logits / 1000)[np.arange(6), logits.argmax(1)],
    1 + (mean * np.log(mean)).sum() / np.log(4),
    np.mean(divergence),
    np.square(images - blurred).mean((1, 2, 3)),
  ]
  for ours, theirs in zip(found, expected, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def resolved(known=4, seen=6, **changes):
  """(resolved config of a phase, its setup without real images, the teacher's variables)."""
  c = settings(incremental__known=known, incremental__phases=5, incremental__batch_size=8, **changes)
  c.schedule.batch_size = 8
  devices = mesh.make_mesh()
  spec = dataclasses.replace(DIGITS, num_classes=seen)
  card = {"net": "wrn_10_1", "num_classes": known, "mean": [0.3], "std": [0.4]}
  c = config.resolve(incremental.of_teacher(c, card), spec, devices, nets.classifier("wrn_10_1", known))
  net = nets.classifier("wrn_10_1", known)
  setup = incremental.with_real(c, experiment.build(c, spec, net, card, devices), 50, card)
  return c, setup, nets.init(net, jax.random.key(1), jnp.zeros((2, 8, 8, 1)))


def real_images(number=50, known=4, seen=6):
  rng = np.random.default_rng(3)
  images = rng.integers(0, 256, (number, 8, 8, 1), dtype=np.uint8)
  labels = rng.integers(known, seen, number).astype(np.int32)
  split = datasets.Split(jnp.asarray(images), jnp.asarray(labels))
  return {"new": split, "kept": None}


def begun(c, setup, teacher):
  return experiment.initial_state(c, setup, streams.root(0), (8, 8, 1), teacher)


def test_the_student_begins_as_the_previous_network_with_more_rows():
  c, setup, teacher = resolved()
  state = begun(c, setup, teacher)
  ours, theirs = state.student.params["fc"], teacher["params"]["fc"]
  np.testing.assert_array_equal(ours["kernel"][:, :4], theirs["kernel"])
  np.testing.assert_array_equal(ours["bias"][:4], theirs["bias"])
  assert ours["kernel"].shape[1] == 6 and np.abs(ours["kernel"][:, 4:]).min() > 0
  x = jax.random.normal(jax.random.key(2), (5, 8, 8, 1))
  wide, _ = nets.forward(setup.student.net, state.student.variables, x, train=False)
  narrow, _ = nets.forward(setup.teacher, teacher, x, train=False)
  np.testing.assert_allclose(wide.logits[:, :4], narrow.logits, rtol=1e-5, atol=1e-5)


def test_the_classifier_term_moves_the_classifier_alone():
  c, setup, teacher = resolved(
    loss__student__classifier=1.0,
    **{f"loss__student__{name}": 0.0 for name in ("balanced", "kd", "old_features")},
  )
  state = begun(c, setup, teacher)
  assert list(setup.method.student_terms) == ["classifier"]
  state, batch = setup.method.source(state, jax.random.key(0), real_images())
  assert np.all(batch.labels[:8] >= 4) and np.all(batch.labels[8:] < 4)
  loss = algorithm.student_loss(setup, state.hyper.student, state.memory)
  output = nets.forward(setup.teacher, teacher, batch.images, train=False)[0]

  def of(params):
    return loss(params, state.student.batch_stats, batch, output, jax.random.key(1))[0]

  grads = jax.grad(of)(state.student.params)
  moved = {name for name, tree in grads.items() if any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(tree))}
  assert moved == {"fc"}


def test_only_the_method_s_own_terms_see_samples_alone():
  """The new classes' logits, and the real images, do not enter the divergence from the previous network."""
  c, setup, teacher = resolved()
  rng = np.random.default_rng(0)
  v = View(jnp.zeros((16,), int), outputs(rng, 16, 4), outputs(rng, 16, 6), memory=begun(c, setup, teacher).memory)
  value = setup.method.student_terms["kd"].value(v)
  t, s = log_softmax(np.asarray(v.teacher.logits)[8:]), log_softmax(np.asarray(v.student.logits)[8:, :4])
  np.testing.assert_allclose(value, (np.exp(t) * (t - s)).sum(-1), rtol=1e-5)
  adversarial = setup.method.generator_terms["adversarial"].value(v.replace(labels=v.labels))
  assert adversarial.shape == (16,)


# Iterations.


def epochs(c, setup, teacher, number):
  """States after each epoch, the first one before any."""
  program = algorithm.compile_epoch(setup, c.schedule.iterations, real_data=True)
  states, state = [], begun(c, setup, teacher)
  for _ in range(number):
    states.append(jax.tree.map(jnp.copy, state))
    state, _ = program(state, teacher, real_images())
  return [*states, state]


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_phase_warms_up_learns_and_refines():
  c, setup, teacher = resolved(
    generator__warmup_epochs=1,
    incremental__rests=True,
    incremental__refine=1,
    incremental__balance="rdfcil",
    schedule__epochs=3,
    schedule__iterations=2,
    loss__student__refine=0.5,
    loss__student__old_logits=0.15,
    loss__student__relation=0.5,
    loss__student__local=0.5,
    loss__student__old_features=0.1,
    loss__student__balanced=0.0,
  )
  start, warm, learnt, refined = epochs(c, setup, teacher, 3)
  assert same(start.student, warm.student) and not same(start.generator.params, warm.generator.params)
  assert same(warm.generator, learnt.generator) and same(learnt.generator, refined.generator)
  before, after = learnt.student.params, refined.student.params
  assert not same(before["net"]["conv1"], warm.student.params["net"]["conv1"])
  assert not same(before["maps"], warm.student.params["maps"])
  assert same(
    {k: v for k, v in before["net"].items() if k != "fc"}, {k: v for k, v in after["net"].items() if k != "fc"}
  )
  assert not same(before["net"]["fc"], after["net"]["fc"]) and same(before["maps"], after["maps"])
  assert not bool(learnt.memory["refining"]) and bool(refined.memory["refining"])
  net, variables = nets.deployed(setup.student.net, refined.student.variables)
  assert "maps" not in variables["params"] and net.num_classes == 6
  rates = [experiment.learning_rates(c, jnp.asarray(epoch), refined.hyper)["student"] for epoch in (2, 3)]
  assert float(rates[1]) == pytest.approx(c.incremental.refine_lr) != float(rates[0])


def test_an_epoch_goes_through_the_new_images_evenly():
  """48 images of 50 in 2 iterations of 3 updates: none twice; and in another order in the next epoch."""
  c, setup, teacher = resolved(schedule__iterations=2, student__steps=3)
  state, seen = begun(c, setup, teacher), []
  for step in range(4):
    state = setup.method.begin(state.replace(step=jnp.asarray(step)), jax.random.key(step))
    for _ in range(3):
      position = int(state.memory["position"])
      seen.append(np.asarray(state.memory["order"])[position : position + 8])
      state, _ = setup.method.source(state, jax.random.key(9), real_images())
  first, second = np.concatenate(seen[:6]), np.concatenate(seen[6:])
  assert len(set(first.tolist())) == 48 and len(set(second.tolist())) == 48 and not np.array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("method", "arm"),
  [
    *((name, "distill") for name in ("rgal", "deepinversion", "cmi", "dafl", "fast")),
    *(("rgal", arm) for arm in ("no_rehearsal", "joint")),
    *((name, "lwf") for name in ("fast", "nayer")),
  ],
)
def test_other_methods_draw_the_old_classes(method, arm):
  family = other_method(method)
  family.arm = arm
  family.incremental.update({"known": 4, "batch_size": 8})
  family.loss.student.update({"local": 1.0, "balanced": 1.0})
  devices, spec = mesh.make_mesh(), dataclasses.replace(DIGITS, num_classes=6)
  card = {"net": "wrn_10_1", "num_classes": 4, "mean": [0.3], "std": [0.4]}
  net = nets.classifier("wrn_10_1", 4)
  c = config.resolve(incremental.of_teacher(family, card), spec, devices, net)
  setup = incremental.with_real(c, experiment.build(c, spec, net, card, devices), 50, card)
  teacher = nets.init(net, jax.random.key(1), jnp.zeros((2, 8, 8, 1)))
  state = experiment.initial_state(c, setup, streams.root(0), (8, 8, 1), teacher)
  before = jax.tree.map(np.asarray, state.student.params)
  state, found = algorithm.compile_epoch(setup, c.schedule.iterations, real_data=True)(state, teacher, real_images())
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
  waits = bool(setup.method.waits) and not np.any(np.asarray(found["student"].total))
  assert waits or not same(before, jax.tree.map(np.asarray, state.student.params))


def test_then_optimisers_follow_each_other():
  params = {"a": jnp.ones(2), "b": {"kernel": jnp.ones(3)}}
  tx = optim.followed_by(2, optim.sgd(0.1, 0.9, 0.0), optim.alone(optim.sgd(1.0, 0.0, 0.0), ("b",)))
  state, grads = tx.init(params), jax.tree.map(jnp.ones_like, params)
  moves = []
  for _ in range(3):
    updates, state = tx.update(grads, state, params)
    moves.append((float(updates["a"][0]), float(updates["b"]["kernel"][0])))
  assert moves == [pytest.approx((-0.1, -0.1)), pytest.approx((-0.19, -0.19)), pytest.approx((0.0, -1.0))]


class Rare(Watched):
  """Has of one class a single training image."""

  def labels(self, split):
    found = np.asarray(super().labels(split))
    rare = np.flatnonzero(found == 9)[1:]
    return np.where(np.isin(np.arange(len(found)), rare), 8, found) if split == "train" else found


def test_a_phase_without_an_image_to_be_measured_on_is_refused(digits_dir, tmp_path):
  c = settings(incremental__phases=10, evaluate__split="validation")
  held = datasets.data.is_held_out(DIGITS)
  assert 9 not in np.asarray(Rare(digits_dir).labels("train"))[held]
  with pytest.raises(Refusal, match="the classes of phase 10 have no image in the validation part of 'digits'"):
    phases.run(c, tmp_path / "w", data=Rare(digits_dir))
  assert not (tmp_path / "w").exists()


# A run and its files.


@pytest.fixture(scope="session")
def finished_phases(common, digits_dir):
  """(folder, config, what was opened phase by phase) of a finished run of seconds in 3 phases; tests leave it so."""
  c = settings(incremental__phases=3, incremental__first=4, incremental__order="7,3,9,0,1,2,4,5,6,8")
  c.schedule.epochs = 2
  c.evaluate.every = c.checkpoint.every = 1
  opened = common / "phases_opened.json"

  def run():
    watched = Watched(digits_dir)
    phases.run(c, common / "phases", data=watched)
    opened.write_text(json.dumps([sorted(each) for each in watched.opened]))

  path = made_once(common / "phases", run)
  return path, c, [set(each) for each in json.loads(opened.read_text())]


def test_no_image_of_an_earlier_phase_is_opened_again(finished_phases):
  assert finished_phases[2] == [{7, 3, 9, 0}, {1, 2, 4}, {5, 6, 8}]


def test_results_have_the_accuracies_of_every_phase(finished_phases, digits_dir):
  workdir, _, _ = finished_phases
  results = json.loads((workdir / "results.json").read_text())
  found = results["incremental"]
  assert found["sizes"] == [4, 3, 3] and results["class_names"] == ["7", "3", "9", "0", "1", "2", "4", "5", "6", "8"]
  assert [len(row) for row in found["matrix"]] == [1, 2, 3]
  view = datasets.Classes(Watched(digits_dir), found["order"], 7, 10)
  test, saved = view.load_evaluation("test"), phases.saved.load(workdir / "student")
  x = datasets.normalise(test.images, saved.card["mean"], saved.card["std"])
  right = np.asarray(jnp.argmax(saved.net.apply(saved.variables, x, train=False).logits, -1) == test.labels)
  labels = np.asarray(test.labels)
  each = [right[(labels >= a) & (labels < b)].mean() for a, b in ((0, 4), (4, 7), (7, 10))]
  assert found["matrix"][-1] == pytest.approx(each) and found["accuracy"][-1] == pytest.approx(right.mean())
  last = json.loads((workdir / "phase_3" / "results.json").read_text())
  assert last["student"]["last"]["accuracy"] == pytest.approx(found["accuracy"][-1])
  assert results["seconds"] > 0 and results["config"]["incremental"]["known"] == 0
  ignored = [warning for warning in last["warnings"] if "ignores its label" in warning]
  assert ignored and all("chance is 14.3%" in warning for warning in ignored), "of the 7 classes that are drawn"


def test_samples_of_a_run_of_phases_are_of_its_last_generator(finished_phases, tmp_path):
  workdir, _, _ = finished_phases
  assert phases.saved.find(workdir, "generator") == workdir / "phase_3" / "generator"
  assert sample.main([str(workdir), "--per_class", "2", "--out", str(tmp_path / "x.npz")]) == 0
  with np.load(tmp_path / "x.npz") as arrays:
    assert arrays["labels"].tolist() == list(range(7)), "the classes before the last phase"
  (tmp_path / "joint").mkdir()
  for name in ("config.json", "results.json"):
    content = json.loads((workdir / name).read_text()) | {"arm": "joint"}
    (tmp_path / "joint" / name).write_text(json.dumps(content))
  with pytest.raises(Refusal, match="has no generator: it was run with arm 'joint'"):
    phases.saved.find(tmp_path / "joint", "generator")


def test_average_and_forgetting_are_those_of_the_field():
  found = phases.measures([[0.9, 0.9], [0.7, 0.8, 0.75], [0.5, 0.9, 0.6, 0.66]])
  assert found["average"] == pytest.approx((0.9 + 0.75 + 0.66) / 3)
  assert found["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.8 - 0.9)) / 2)


def test_a_finished_run_is_left_alone(finished_phases, digits_dir):
  workdir, c, _ = finished_phases
  watched = Watched(digits_dir)
  results = phases.run(c, workdir, data=watched).results
  assert not watched.opened and results == json.loads((workdir / "results.json").read_text())
  other = c.copy_and_resolve_references()
  other.incremental.order = "0"
  with pytest.raises(Refusal, match=r"belongs to another config \(it differs in incremental.order\)"):
    phases.run(other, workdir, data=watched)


def test_a_phase_that_was_interrupted_goes_on_bit_identically(finished_phases, digits_dir, tmp_path, monkeypatch):
  workdir, c, _ = finished_phases
  again = tmp_path / "w"
  shutil.copytree(workdir, again)
  for name in ("results.json", "files.sha256", "student", "phase_3"):
    (shutil.rmtree if (again / name).is_dir() else (again / name).unlink.__func__)(again / name)

  def stopped(*args, **options):
    def stop(entry):
      if entry["epoch"] == 2:
        raise KeyboardInterrupt

    return runs.run(*args, **options, on_epoch=stop)

  monkeypatch.setattr(phases, "run_phase", stopped)
  with pytest.raises(KeyboardInterrupt):
    phases.run(c, again, data=Watched(digits_dir))
  assert list((again / "phase_3" / "checkpoints").glob("1")) and not (again / "phase_3" / "results.json").exists()
  monkeypatch.undo()
  card = json.loads((again / "teacher" / "net.json").read_text())
  elsewhere = [{"platform": "elsewhere"}]
  (again / "teacher" / "net.json").write_text(json.dumps(checkpoint.sealed(card | {"environments": elsewhere})))
  results = phases.run(c, again, data=Watched(digits_dir)).results
  assert results["environments"][:1] == elsewhere and len(results["environments"]) == 2, (
    "where the first net was trained"
  )
  ours, theirs = (phases.saved.load(folder / "student") for folder in (again, workdir))
  assert same(ours.variables, theirs.variables)


def test_the_page_says_what_results_say(finished_phases):
  workdir = finished_phases[0]
  text, found = (workdir / "report.html").read_text(), json.loads((workdir / "results.json").read_text())["incremental"]
  for number in (found["average"], found["forgetting"], *found["accuracy"], *sum(found["matrix"], [])):
    assert f'<data value="{number!r}"' in text
  assert "1 / 2: -<" in text and "2 / 1: 0." in text, "a phase says nothing of classes to come"
  assert 'href="phase_3/report.html"' in text and (workdir / "phases.png").stat().st_size > 1000


def test_the_network_of_other_classes_is_refused(finished_phases, digits_dir, tmp_path):
  workdir, c, _ = finished_phases
  other = c.copy_and_resolve_references()
  other.incremental.order, other.teacher.checkpoint = "", str(workdir / "teacher")
  with pytest.raises(Refusal, match="knows the classes 7, 3, 9, 0, and the first phase has 0, 1, 2, 3"):
    phases.run(other, tmp_path / "w", data=Watched(digits_dir))
  other.incremental.first, other.incremental.phases = 0, 5
  with pytest.raises(Refusal, match="has num_classes 4"):
    phases.run(other, tmp_path / "v", data=Watched(digits_dir))


def test_a_phase_is_not_run_by_hand(digits_dir, tmp_path, capsys):
  flags = ["--config.incremental.known=4", "--config.teacher.checkpoint=somewhere"]
  assert main(command(tmp_path / "w", digits_dir, *flags, config=SMOKE)) == 2
  assert "config.incremental.known is 4; it is set for each phase" in capsys.readouterr().err


def test_what_does_not_go_through_phases_refuses_it(digits_dir, tmp_path):
  c = settings(dataset__data_dir=str(digits_dir))
  with pytest.raises(Refusal, match="is a run for each phase; start it by cpsc-jax --config"):
    runs.run(c, tmp_path / "w")
  assert not (tmp_path / "w").exists()


def test_a_dry_run_lists_the_phases(digits_dir, tmp_path, capsys):
  flags = ["--dry-run", "--config.incremental.order=9,8,7,6,5,4,3,2,1,0"]
  assert main(command(tmp_path / "w", digits_dir, *flags, config=SMOKE)) == 0
  out = capsys.readouterr().out
  assert "phase 1  trains wrn_10_1 for 1 epochs on 9, 8, 7, 6, 5" in out and not (tmp_path / "w").exists()
  assert "phase 2  2 epochs on 4, 3, 2, 1, 0, with arm 'distill' for 5 old classes" in out


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["untrained_generator", *incremental.ARMS])
def test_control_arms_run(arm, finished_phases, digits_dir, tmp_path):
  workdir, c, _ = finished_phases
  c, watched = c.copy_and_resolve_references(), Watched(digits_dir)
  c.arm, c.teacher.checkpoint, c.incremental.phases, c.incremental.first = arm, str(workdir / "teacher"), 3, 4
  c.generator.warmup_epochs = 1
  results = phases.run(c, tmp_path / arm, data=watched).results
  assert results["arm"] == arm and len(results["incremental"]["accuracy"]) == 3
  new = [{1, 2, 4}, {5, 6, 8}]
  opened = {
    "joint": [{7, 3, 9, 0, 1, 2, 4}, set(range(10))],
    "real_rehearsal": [new[0], {7, 3, 9, 0}, new[1], {7, 3, 9, 0, 1, 2, 4}],
  }
  assert watched.opened == opened.get(arm, new)
  second = json.loads((tmp_path / arm / "phase_3" / "results.json").read_text())
  assert (second["generator"] is None) == (arm in incremental.ARMS)
  history = json.loads((tmp_path / arm / "phase_3" / "history.json").read_text())["student"]
  assert [bool(entry["totals"]["student"]) for entry in history] == [False, True], "all wait as long"
  images = c.incremental.batch_size + (c.schedule.batch_size if arm in ("untrained_generator", "real_rehearsal") else 0)
  iterations = c.schedule.iterations * (3 if arm == "joint" else 1)  # as many passes over the images of three phases
  assert second["samples"]["student"] == iterations * c.student.steps * images
