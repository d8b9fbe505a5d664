"""One contract for every row of METHODS, and the formulas of the neighbours' terms."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from conftest import REPOSITORY, command
from cpsc_jax.configs import default, rgal_cifar10
from parity import assert_close, drawn_by
from spmd_worker import smoke_config as config_of
from test_algorithm import equal
from test_losses import softmax

from cpsc_jax import (
  algorithm,
  checkpoint,
  config,
  datasets,
  experiment,
  initial,
  losses,
  mesh,
  methods,
  nets,
  pool,
  sources,
  streams,
)
from cpsc_jax.errors import Refusal
from cpsc_jax.main import main
from cpsc_jax.methods import METHODS, cmi, rgal
from cpsc_jax.setup import LATENTS
from cpsc_jax.state import Batch, Output, View
from cpsc_jax.streams import Stream

EVERY = pytest.mark.parametrize("method", METHODS)
SLOW = pytest.mark.slow
INVERTING = ("rgal", "deepinversion", "cmi", "fast", "nayer")
DIGITS = datasets.DATASETS["digits"]
# The terms that a smoke config gives a weight, and those of them that compare samples across the batch.
ACTIVE = {
  "cpsc": ({"adversarial", "ikd", "bn", "scl", "ce"}, {"kd", "l2", "ce"}),
  "rgal": ({"bn", "ce", "adversarial", "triplet", "activation", "balance"}, {"kd", "channel", "triplet"}),
  "dafl": ({"one_hot", "activation", "balance"}, {"kd"}),
  "dfad": ({"adversarial"}, {"l1"}),
  "zskt": ({"adversarial"}, {"kd", "attention"}),
  "deepinversion": ({"ce", "bn", "variation", "adversarial"}, {"kd"}),
  "cmi": ({"bn", "ce", "adversarial", "views"}, {"kd"}),
  "fast": ({"bn", "ce", "adversarial"}, {"kd"}),
  "nayer": ({"bn", "ce", "adversarial"}, {"kd"}),
}
COUPLED = {"bn", "scl", "triplet", "balance", "variation", "norm", "views"}


def flag_of(method):
  name = "digits.py:smoke" if method == "cpsc" else f"{method}_cifar10.py:digits_smoke"
  return f"--config={REPOSITORY / 'configs' / name}"


def resolved(method, /, **changes):
  c = config_of(method)
  c.update_from_flattened_dict(changes)
  return config.resolve(c, DIGITS, mesh.make_mesh())


def first_state(setup):
  key = streams.key(streams.root(0), Stream.DISTILLATION)
  return initial.placed(setup, initial.state(setup, key, DIGITS.image_shape))


@functools.cache
def start(method, /, **changes):
  """(setup, teacher variables, state) of the config that the smoke test runs."""
  c, devices = resolved(method, **changes), mesh.make_mesh()
  net = nets.classifier(c.teacher.net, 10)
  setup = experiment.build(c, DIGITS, net, {"mean": DIGITS.mean, "std": DIGITS.std}, devices)
  teacher = nets.init(net, jax.random.key(5), jnp.zeros((2, 8, 8, 1)))
  return setup, mesh.replicate(teacher, devices), first_state(setup)


def kept_by(setup, state, teacher=None):
  """The state after the end of an iteration's generator updates."""
  return setup.method.keep(state, jax.random.key(9), algorithm.teach_with(setup, teacher))


def terms_of(setup):
  return {"generator": setup.method.generator_terms, "student": setup.method.student_terms}


def on_host(state):
  return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


# The quick suite has one method of each kind: fresh samples, an image pool, a pool with a critic and a bank.
QUICK = ("cpsc",)


@pytest.mark.parametrize(
  "method", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_contract(method, tmp_path):
  """Finite terms under the method's names, a student that moves, a teacher that does not, one program, exact resume."""
  setup, teacher, state = start.__wrapped__(method)  # an epoch consumes its state
  kept, before = jax.device_get((teacher, state.student.params))
  epoch = algorithm.compile_epoch(setup, 2)
  first, losses = epoch(state, teacher)
  for player, terms in terms_of(setup).items():
    steps = getattr(setup, player).steps
    assert set(losses[player].terms) == set(terms) == set(setup.weights[player])
    assert losses[player].total.shape == (2, steps)
    assert all(value.shape == (2, steps) for value in losses[player].terms.values())
  assert all(np.isfinite(value).all() for value in jax.tree.leaves(jax.device_get(losses)))
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, jax.device_get(first.student.params))
  assert all(jax.tree.leaves(moved.get("net", moved)))

  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, {"state": first}, {})
  checkpointer.close()
  second, _ = epoch(first, teacher)
  assert epoch._cache_size() == 1, "the second epoch must not compile again"
  checkpointer = checkpoint.Checkpointer(tmp_path)
  restored = checkpointer.restore({"state": first_state(setup)})[0]["state"]
  checkpointer.close()
  again, _ = epoch(restored, teacher)
  assert equal(on_host(second), on_host(again)), "a resumed run goes on as if it had never stopped"
  assert epoch._cache_size() == 1
  assert equal(teacher, kept), "the teacher is never written"
  assert (setup.method.pool(second) is not None) == (method in INVERTING)
  if method in INVERTING:
    held = setup.method.pool(second)
    assert held is second.memory["pool"] and int(held.count) == 4 and np.asarray(held.arrays["images"]).any()


@EVERY
def test_exactly_the_active_terms_are_there(method):
  """A term is there if and only if its weight is not 0; the state begins with the config's weights."""
  setup, _, state = start(method)
  c = resolved(method)
  for (player, terms), names in zip(terms_of(setup).items(), ACTIVE[method], strict=True):
    weighted = {name: weight for name, weight in c.loss[player].items() if weight and name != "head"}
    assert set(terms) == names == set(weighted), "the nets of the smoke configs need no feature head"
    hyper = jax.device_get(getattr(state.hyper, player))
    assert setup.weights[player] == weighted and hyper.terms == pytest.approx(weighted) and hyper.lr == 1
    fewer = sorted(names)[1:]
    changes = {f"loss.{player}.{name}": 0.0 for name in names - set(fewer)}
    parts = methods.Parts(resolved(method, **changes), None, setup.generator, setup.teacher, (8, 8, 1), setup.mesh)
    assert set(getattr(methods.method(parts), f"{player}_terms")) == set(fewer)


@EVERY
def test_terms_are_of_single_samples_unless_they_couple_the_batch(method):
  """A coupling term is one number; any other is one per sample, and the same in whatever batch the sample is."""
  setup, teacher, state = start(method)
  for terms, names in zip(terms_of(setup).values(), ACTIVE[method], strict=True):
    assert {name for name, term in terms.items() if term.couples_batch} == names & COUPLED
  trained = {name: part.params for name, part in state.trained.items()}

  def values(x, y):
    t = nets.forward_observed(setup.teacher, teacher, x)
    s = setup.student.net.apply(state.student.variables, x, train=False)

    def teach(images):
      return nets.forward_observed(setup.teacher, teacher, images)

    view = View(y, t, s, x, jax.random.key(0), trained, state.memory, teach)
    return {
      (player, name): (term.couples_batch, term.value(view))
      for player, terms in terms_of(setup).items()
      for name, term in terms.items()
    }

  def single(x, y):
    return {key: value for key, (couples, value) in values(x, y).items() if not couples}

  x, y = jax.random.normal(jax.random.key(1), (8, 8, 8, 1)), jnp.arange(8)
  shapes = {}
  jax.eval_shape(lambda x, y: shapes.update({k: (couples, v.shape) for k, (couples, v) in values(x, y).items()}), x, y)
  assert all(shape == () for couples, shape in shapes.values() if couples)
  whole, part = jax.jit(single)(x, y), jax.jit(single)(x[:4], y[:4])
  assert whole and all(value.shape == (8,) for value in whole.values())
  for key, value in whole.items():
    np.testing.assert_allclose(value[:4], part[key], rtol=1e-4, atol=1e-6, err_msg=str(key))


@EVERY
def test_accumulation_of_coupling_terms_is_refused_by_name(method):
  for player, names in zip(("generator", "student"), ACTIVE[method], strict=True):
    changes = {f"{player}.micro_batches": 2}
    if player == "generator" and method in INVERTING:
      with pytest.raises(Refusal, match="config.generator.micro_batches must be 1 for methods that optimise"):
        resolved(method, **changes)
      continue
    for name in names & COUPLED:
      others = {f"loss.{player}.{other}": 0.0 for other in names & COUPLED - {name}}
      message = f"config.{player}.micro_batches is 2, but the term config.loss.{player}.{name} compares samples"
      with pytest.raises(Refusal, match=message):
        resolved(method, **changes, **others)
    without = {f"loss.{player}.{name}": 0.0 for name in names & COUPLED}
    assert resolved(method, **changes, **without)[player].micro_batches == 2


@pytest.mark.parametrize(
  ("changes", "term"),
  [
    ({"loss.ikd_form": "log"}, "l2"),  # the logarithm of a mean
    ({"loss.student.triplet": 0.1}, "triplet"),
    ({"teacher.net": "wrn_10_2"}, "head"),  # its features are wider than the student's
  ],
)
def test_terms_that_a_setting_couples_are_refused_too(changes, term):
  assert resolved("cpsc", **{"student.micro_batches": 2}).student.micro_batches == 2
  with pytest.raises(Refusal, match=f"config.student.micro_batches is 2, but the term config.loss.student.{term} "):
    resolved("cpsc", **{"student.micro_batches": 2}, **changes)


def test_a_frozen_head_has_no_term_that_couples_the_batch():
  changes = {"student.micro_batches": 2, "teacher.net": "wrn_10_2", "student.head": "frozen"}
  assert resolved("cpsc", **changes).student.head == "frozen"


@pytest.mark.parametrize(
  "method", [name if name in ("cpsc", "rgal") else pytest.param(name, marks=SLOW) for name in METHODS]
)
def test_smoke_run_reaches_its_report(method, tmp_path, digits_dir, finished):
  if method == "cpsc":
    pytest.skip("this is the run of every test of tests/test_run.py")
  workdir = tmp_path / "w"
  flags = [f"--config.teacher.checkpoint={finished / 'teacher'}"]
  assert main(command(workdir, digits_dir, *flags, config=flag_of(method))) == 0
  results = json.loads((workdir / "results.json").read_text())
  assert results["method"] == method and results["student"]["last"]["epoch"] == 2
  assert {path.name for path in workdir.iterdir()} >= {"samples.png", "curves.png", "student", "results.json"}
  inverts = method in INVERTING
  assert (workdir / "generator").exists() == (not inverts or method == "fast") and (
    workdir / "pool.npz"
  ).exists() == inverts
  conditional = method == "cpsc" or inverts
  fidelity = "pool_fidelity" if inverts else "label_fidelity"
  assert (results["generator"][fidelity] is not None) == conditional
  if inverts:
    with np.load(workdir / "pool.npz") as held:
      assert held["images"].shape == (64, 8, 8, 1) and held["images"].dtype == np.uint8
      assert results["generator"]["pool"] == 64 and set(held["labels"]) <= set(range(10))
  assert main(command(workdir, digits_dir, *flags, config=flag_of(method))) == 0, "a finished run is left alone"


def test_an_iteration_begins_with_a_new_generator():
  setup, teacher, state = start("rgal")
  begin = jax.jit(setup.method.begin)
  a, b = begin(state, jax.random.key(1)), begin(state, jax.random.key(2))
  kernels = [np.asarray(s.generator.params["conv3"]["kernel"]) for s in (a, b, state)]
  assert not np.array_equal(kernels[0], kernels[1]) and not np.array_equal(kernels[0], kernels[2])
  assert not np.array_equal(a.trained[LATENTS].params, b.trained[LATENTS].params)
  assert equal(a.student, state.student) and np.isinf(a.memory["best"]["loss"])


def test_inversion_keeps_the_batch_of_the_least_loss():
  """Steps whose loss rises leave the best batch as it was; the latents move all the same."""
  setup, teacher, state = start("rgal", **{"pool.dtype": "float32"})
  state = jax.jit(setup.method.begin)(state, jax.random.key(1))
  step = jax.jit(algorithm.generator_step(setup, teacher))
  lowest, images = np.inf, None
  for i in range(6):
    before = state
    state, losses = step(state, jax.random.key(i))
    best = state.memory["best"]
    assert not np.array_equal(state.trained[LATENTS].params, before.trained[LATENTS].params)
    if float(losses.total) < lowest:
      lowest, images = float(losses.total), np.asarray(best["images"])
    assert float(best["loss"]) == pytest.approx(lowest, rel=1e-6)
    assert np.array_equal(best["images"], images)
  kept = kept_by(setup, state).memory["pool"].arrays
  assert np.array_equal(kept["images"][0], images) and np.array_equal(kept["labels"][0], state.memory["labels"])


def test_an_untrained_generator_fills_the_pool_too():
  setup, teacher, state = start("rgal", arm="untrained_generator")
  state = jax.jit(setup.method.begin)(state, jax.random.key(1))
  after = kept_by(setup, state)
  assert setup.generator.steps == 0
  assert np.asarray(after.memory["pool"].arrays["images"][0]).std() > 0


@pytest.mark.parametrize(
  "method", [name if name in ("rgal", "nayer") else pytest.param(name, marks=SLOW) for name in INVERTING]
)
def test_a_share_of_the_students_batch_can_be_fresh(method):
  """A first quarter that the present generator draws, and the rest from the pool with its labels."""
  setup, _, state = start(method, **{"pool.fresh_share": 0.25, "pool.dtype": "float32"})
  state = jax.jit(setup.method.begin)(state, jax.random.key(1))
  images = jnp.full_like(state.memory["best"]["images"], 100.0)
  state = state.replace(memory={**state.memory, "best": {**state.memory["best"], "images": images}})
  state = kept_by(setup, state)
  key = jax.random.key(3)
  after, x, y = drawn_by(setup.method.source, state, key)
  assert x.shape == (32, 8, 8, 1) and y.shape == (32,)
  pooled = np.all(np.asarray(x) == 100, axis=(1, 2, 3))
  assert pooled.tolist() == [False] * 8 + [True] * 24
  z, labels = setup.method.noise.draw(streams.nth(key, Stream.PARTS, 0), 8)
  fresh, _ = sources.sample_images(setup.generator.net, state.generator.variables, z, labels)
  np.testing.assert_allclose(x[:8], fresh, rtol=1e-4, atol=1e-5)
  assert np.array_equal(y[:8], labels)
  drawn = pool.draw(state.memory["pool"], streams.nth(key, Stream.PARTS, 1), 24)
  assert np.array_equal(y[8:], drawn["labels"]) and np.isin(y[8:], state.memory["labels"]).all()
  assert equal(on_host(after), on_host(state)), "drawing a batch moves nothing"


def test_without_a_fresh_share_the_whole_batch_is_of_the_pool():
  setup, _, state = start("rgal", **{"pool.dtype": "float32"})
  state = kept_by(setup, jax.jit(setup.method.begin)(state, jax.random.key(1)))
  _, x, _ = drawn_by(setup.method.source, state, jax.random.key(3))
  held = np.asarray(state.memory["pool"].arrays["images"][0])
  assert all(any(np.array_equal(image, one) for one in held) for image in np.asarray(x))


def test_a_pool_of_8_bits_holds_pictures():
  """Within half a step of 255, clipped to black and white, and read back in the teacher's space."""
  mean, std = (0.4, 0.5), (0.2, 0.25)
  x = jax.random.normal(jax.random.key(0), (6, 4, 4, 2)) * 2
  held = sources.stored(x, "uint8", mean, std)
  assert held.dtype == jnp.uint8 and sources.stored(x, "float32", mean, std) is x
  pixels = np.clip(np.asarray(x) * std + mean, 0, 1)
  back = np.asarray(sources.restored(held, mean, std))
  assert np.abs(back * std + mean - pixels).max() <= 0.5 / 255 + 1e-6
  np.testing.assert_allclose(back, np.asarray(datasets.normalise(held, mean, std)))
  setup, _, state = start("rgal", **{"pool.dtype": "uint8"})
  state = jax.jit(setup.method.begin)(state, jax.random.key(1))
  kept = kept_by(setup, state).memory["pool"].arrays["images"]
  assert kept.dtype == jnp.uint8


def test_a_pool_gives_several_views_of_an_image():
  setup, _, state = start("rgal", **{"pool.views": 2, "student.crop_pad": 1})
  state = kept_by(setup, jax.jit(setup.method.begin)(state, jax.random.key(1)))
  _, x, y = drawn_by(setup.method.source, state, jax.random.key(3))
  assert x.shape[0] == y.shape[0] == 32
  assert np.array_equal(x[::2], x[1::2]) and np.array_equal(y[::2], y[1::2])
  assert len(np.unique(np.asarray(x[::2]).reshape(16, -1), axis=0)) > 8
  with pytest.raises(Refusal, match="config.pool.views is 3, which does not divide the 32 images"):
    resolved("rgal", **{"pool.views": 3, "student.crop_pad": 1})
  with pytest.raises(Refusal, match="all views of an image are the same without crops and flips"):
    resolved("rgal", **{"pool.views": 2, "student.crop_pad": 0})


def test_earlier_batches_are_replayed():
  """A quarter of the batch comes from a ring of the newest fresh images; the rest is fresh and joins it."""
  setup, _, state = start("cpsc", **{"pool.replay_share": 0.25, "pool.size": 48})
  source = jax.jit(setup.method.source)
  seen = []
  for i in range(4):
    state, batch = source(state, jax.random.key(i), None)
    x = batch.images
    assert x.shape[0] == 32
    seen.append(np.asarray(x[:24]))
    ring = state.memory["pool"]
    held = np.asarray(ring.arrays["images"]).reshape(-1, *x.shape[1:])[: 24 * min(i + 1, 2)]
    assert all(any(np.array_equal(image, one) for one in held) for image in np.asarray(x[24:]))
  held = np.asarray(state.memory["pool"].arrays["images"])
  assert np.array_equal(held[0], seen[2]) and np.array_equal(held[1], seen[3]), "the newest replace the oldest"
  with pytest.raises(Refusal, match="config.pool.size is 16, less than the 24 new images"):
    resolved("cpsc", **{"pool.replay_share": 0.25, "pool.size": 16})


@SLOW
def test_the_average_of_the_generator_draws_a_share():
  setup, teacher, state = start.__wrapped__("cpsc", **{"generator.ema": 0.9, "generator.ema_share": 0.25})
  first = jax.jit(algorithm.epoch(setup, 1))
  after, _ = first(state, teacher)
  average = after.memory["average"]
  assert equal(average, after.generator.variables), "after one iteration it is the generator"
  again, _ = first(after, teacher)
  want = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, average, again.generator.variables)
  for a, b in zip(jax.tree.leaves(again.memory["average"]), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  key = jax.random.key(7)
  _, x, y = drawn_by(setup.method.source, again, key)
  z, labels = setup.method.noise.draw(streams.nth(key, Stream.PARTS, 1), 8)
  old, _ = sources.sample_images(setup.generator.net, again.memory["average"], z, labels)
  np.testing.assert_allclose(x[24:], old, rtol=1e-4, atol=1e-5)
  assert np.array_equal(y[24:], labels)
  with pytest.raises(Refusal, match="config.generator.ema is 1.5"):
    resolved("cpsc", **{"generator.ema": 1.5})


STEPS = (algorithm.generator_step, algorithm.student_step)


@pytest.mark.parametrize("method", ["cpsc", pytest.param("dafl", marks=SLOW)])
def test_triplets_can_be_added_to_any_method(method):
  changes = {"loss.generator.triplet": 0.1, "loss.student.triplet": 0.2}
  setup, teacher, state = start(method, **changes)
  key = jax.random.key(0)
  _, of_generator = jax.jit(algorithm.generator_step(setup, teacher))(state, key)
  assert np.isfinite(of_generator.terms["triplet"])
  _, of_student = jax.jit(algorithm.student_step(setup, teacher))(state, key)
  weighted = sum(setup.weights["student"][name] * float(value) for name, value in of_student.terms.items())
  assert float(of_student.total) == pytest.approx(weighted, rel=1e-5) and "triplet" in of_student.terms


def test_the_published_triplets_are_a_switch():
  rng = np.random.default_rng(0)
  stage = jnp.asarray(rng.normal(size=(12, 2, 2, 4)))
  output = Output(jnp.asarray(rng.normal(size=(12, 4))), None, (stage,))
  view = View(None, output, output, key=jax.random.key(0))
  c = rgal_cifar10.get_config("digits")
  assert c.loss.triplet.swapped, "the paper's is the default"
  values = {}
  for swapped in (True, False):
    c.loss.triplet.swapped = swapped
    values[swapped] = float(rgal.triplet_terms(c)[0]["triplet"].value(view))
  labels, key = output.logits.argmax(-1), streams.key(view.key, Stream.SYNTHESIS_TRIPLETS)
  for swapped, value in values.items():
    want = losses.triplets((stage,), output.logits, labels, key, 0.2, focal=True, swapped=swapped)
    assert value == pytest.approx(float(want))
  assert values[False] != values[True]


@pytest.mark.parametrize(
  ("method", "changes", "word"),
  [
    ("dafl", {"loss.generator.scl": 0.7}, "config.loss.generator.scl is 0.7, but method 'dafl' has no such term"),
    ("rgal", {"loss.student.l2": 1.0}, "config.loss.student.l2"),
    ("rgal", {"pool.size": 100}, "multiple of config.pool.batch_size"),
    ("rgal", {"pool.fresh_share": 1.0}, "config.pool.fresh_share is 1.0"),
    ("rgal", {"pool.fresh_share": -0.5}, "config.pool.fresh_share is -0.5"),
    ("cmi", {"pool.bank": 100}, "config.pool.bank is 100; set it to a multiple of config.pool.batch_size"),
    ("cmi", {"loss.views.negatives": 100}, "config.loss.views.negatives is 100"),
    ("cmi", {"loss.views.temperature": 0.0}, "config.loss.views.temperature is 0.0"),
    ("cpsc", {"method": "cmi"}, "start from configs/cmi_cifar10.py"),
    ("cpsc", {"generator.net": "pixels"}, "no parameters to train"),
    ("cpsc", {"student.micro_batches": 5}, "config.student.micro_batches is 5, which does not divide a batch of 32"),
    ("rgal", {"generator.flip": True}, "config.generator.flip"),
    ("zskt", {"reference": True}, "CPSC-DFKD's"),
  ],
)
def test_bad_settings_are_refused(method, changes, word):
  with pytest.raises(Refusal, match=word):
    resolved(method, **changes)


def test_only_cmi_has_the_keys_of_its_views_and_bank():
  theirs = default.get_config()
  assert "views" not in theirs.loss and "views" not in theirs.loss.generator and "bank" not in theirs.pool
  ours = config_of("cmi")
  assert ours.loss.views.negatives and ours.loss.generator.views and ours.pool.bank


def test_stages_that_do_not_match_are_refused():
  devices = mesh.make_mesh()
  for method, term in (("zskt", "attention"), ("rgal", "channel")):
    c = config_of(method)
    config.check_terms(c, DIGITS, devices, nets.classifier("wrn_16_2", 10))
    with pytest.raises(Refusal, match=rf"config.loss.student.{term} compares stages, and those of wrn_10_1"):
      config.check_terms(c, DIGITS, devices, nets.classifier("resnet18", 10))


def test_projections_are_trained_and_not_saved():
  setup, teacher, state = start("rgal")
  assert isinstance(setup.student.net, nets.StageProjections)
  x = jnp.asarray(np.random.default_rng(0).normal(size=(32, 8, 8, 1)), jnp.float32)
  update = jax.jit(functools.partial(algorithm.student_update, setup))
  after, _ = update(teacher, state, Batch(x, jnp.arange(32) % 10), jax.random.key(0))
  assert not equal(after.student.params["stage_0"], state.student.params["stage_0"])
  net, variables = nets.deployed(setup.student.net, after.student.variables)
  assert nets.count_parameters(variables["params"]) == 77562
  x = jnp.ones((2, 8, 8, 1))
  whole = setup.student.net.apply(after.student.variables, x, train=False)
  assert np.array_equal(net.apply(variables, x, train=False).logits, whole.logits)
  means = [np.asarray(stage).mean((1, 2)) for stage in whole.stages]
  for i, mean in enumerate(means):
    layer = after.student.params[f"stage_{i}"]
    assert_close(whole.projected[i], mean @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]), 1e-5)


def test_terms_of_the_neighbours(dtype):
  rng = np.random.default_rng(0)
  t, s = 3 * rng.normal(size=(2, 7, 4))
  stages = [rng.normal(size=(7, n, n, k)) for n, k in ((4, 3), (2, 5))]
  others = [rng.normal(size=(7, n, n, k)) for n, k in ((4, 2), (2, 6))]
  projected = [rng.normal(size=(7, k)) for k in (3, 5)]
  limit = 1e-9 if dtype == np.float64 else 1e-4

  def close(ours, theirs):
    assert_close(ours, theirs, limit)

  def array(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)

  def kl(p, q):
    return np.sum(p * (np.log(p) - np.log(q)), -1)

  def attention_map(a):
    m = (a**2).mean(-1).reshape(7, -1)
    return m / np.linalg.norm(m, axis=1, keepdims=True)

  p, q = softmax(t / 20), softmax(s / 20)
  close(losses.kl(array(t), array(s), 20.0), 400 * kl(p, q))
  agreed = t.argmax(1) == s.argmax(1)
  assert 0 < agreed.sum() < 7
  close(losses.kl_where_agreed(array(t), array(s)), kl(softmax(t), softmax(s)) * agreed)
  p, q = softmax(t / 3), softmax(s / 3)
  m = (p + q) / 2
  close(losses.jensen_shannon(array(t), array(s)), (kl(p, m) + kl(q, m)) / 2)
  close(losses.l1(array(t), array(s)), np.abs(t - s).mean(-1))
  mean = softmax(t).mean(0)
  close(losses.balance(array(t)), np.sum(mean * np.log(mean)))
  assert np.isfinite(jax.grad(losses.balance)(array(np.eye(4) * 1000))).all()
  close(losses.activation(array(s)), -np.abs(s).mean(-1))
  x = stages[0]
  neighbours = [
    x[:, :, :-1] - x[:, :, 1:],
    x[:, :-1] - x[:, 1:],
    x[:, :-1, :-1] - x[:, 1:, 1:],
    x[:, 1:, :-1] - x[:, :-1, 1:],
  ]
  close(losses.total_variation(array(x)), sum(np.sqrt((d**2).sum()) for d in neighbours))
  close(losses.norm(array(x)), np.sqrt((x**2).sum()))
  want = sum(((attention_map(a) - attention_map(b)) ** 2).mean(-1) for a, b in zip(stages, others, strict=True))
  close(losses.attention(array(stages), array(others)), want)
  want = sum(((a.mean((1, 2)) - b) ** 2).mean(-1) for a, b in zip(stages, projected, strict=True))
  close(losses.channel_distillation(array(stages), array(projected)), want)


class UnitCritic:
  """A critic without parameters: rows at unit length."""

  def apply(self, variables, x):
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_contrast_of_views(batches):
  """CMI's loss against its formula, with an empty, a part-filled and a full bank."""
  rng = np.random.default_rng(batches)

  def rows(n):
    return rng.normal(size=(n, 5)).astype(np.float32)

  def as_output(means):
    return Output(None, None, (jnp.asarray(means)[:, None, None, :],))

  bank = pool.empty(3, 4, features=((10,), jnp.float32))
  for _ in range(batches):
    bank = pool.add(bank, features=jnp.asarray(np.concatenate([rows(4), rows(4)], 1)))
  whole, local = rows(4), rows(4)
  view = View(None, as_output(whole), None, images=jnp.zeros((4, 8, 8, 1)), key=jax.random.key(0))
  view = view.replace(trained={"critic": {}}, memory={"bank": bank}, teach=lambda x: as_output(local))
  c = ml_collections.ConfigDict({"negatives": 12, "temperature": 0.2, "flip": True})
  ours = float(cmi.instance_contrast(view, UnitCritic(), cmi.averaged_stages, c))
  held = np.asarray(bank.arrays["features"]).reshape(12, 10)[: 4 * batches]
  a = np.asarray(UnitCritic().apply({}, jnp.asarray(np.concatenate([local, held[:, :5]]))))
  b = np.asarray(UnitCritic().apply({}, jnp.asarray(np.concatenate([whole, held[:, 5:]]))))
  wrong = -np.log(np.diagonal(softmax(a @ b.T / 0.2)))
  assert ours == pytest.approx(wrong[:4].mean() + (wrong[4:].mean() if batches else 0.0), rel=1e-4)


def test_zoom_shows_a_part_at_full_size():
  """A ramp stays a ramp, within the range of the original, with a slope between a half and the whole of it."""
  ramp = jnp.broadcast_to(jnp.linspace(0, 1, 16)[None, None, :, None], (50, 16, 16, 1))
  seen = np.asarray(cmi.zoom(jax.random.key(0), ramp))
  assert seen.shape == ramp.shape and seen.min() >= -1e-5 and seen.max() <= 1 + 1e-5
  slopes = (seen[:, 8, 12, 0] - seen[:, 8, 4, 0]) / (8 / 15)
  assert 0.3 < slopes.min() < 0.6 and 0.75 < slopes.max() <= 1.001
  assert np.ptp(seen, axis=1).max() < 1e-5, "rows are alike"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cpsc", "fast", "nayer"])
def test_another_family_at_64_pixels(method):
  """ResNet-18 -> MobileNetV2 with the DCGAN generator: an iteration is finite and moves the student."""
  spec = dataclasses.replace(DIGITS, image_size=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
  c = config_of(method)
  c.teacher.net, c.student.net, c.generator.net = "resnet18", "mobilenet_v2", "dcgan"
  c.schedule.batch_size = c.pool.batch_size = 20
  c.pool.size, c.student.crop_pad = 20, 4
  c = config.resolve(c, spec, mesh.make_mesh())
  net = nets.classifier("resnet18", 10)
  setup = experiment.build(c, spec, net, {"mean": spec.mean, "std": spec.std}, mesh.make_mesh())
  teacher = nets.init(net, jax.random.key(5), jnp.zeros((2, 64, 64, 3)))
  state = experiment.initial_state(c, setup, jax.random.key(0), spec.image_shape, teacher)
  before = jax.device_get(state.student.params)
  state, found = algorithm.compile_epoch(setup, 1)(state, teacher)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((found, state.student.variables)))
  assert not equal(before, state.student.params)
