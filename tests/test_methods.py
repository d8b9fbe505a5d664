"""One contract for every row of METHODS, and the formulas of the neighbours' terms."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from conftest import REPOSITORY, command
from cpsc_jax.configs import rgal_cifar10
from parity import assert_close
from spmd_worker import smoke_config as config_of
from test_algorithm import equal, jit
from test_losses import softmax

from cpsc_jax import algorithm, checkpoint, distill, losses, mesh, nets, settings
from cpsc_jax.errors import Refusal
from cpsc_jax.main import main
from cpsc_jax.methods import METHODS, cmi, rgal
from cpsc_jax.state import Output, View

EVERY = pytest.mark.parametrize("method", METHODS)


def flag_of(method):
  name = "digits.py:smoke" if method == "cpsc" else f"{method}_cifar10.py:digits_smoke"
  return f"--config={REPOSITORY / 'configs' / name}"


@functools.cache
def start(method, **changes):
  """(game, teacher variables, state) of the config that the smoke test runs."""
  config = config_of(method)
  config.update_from_flattened_dict(changes)
  devices = mesh.make_mesh()
  config = settings.resolve(config, devices)
  net = nets.classifier(config.teacher.net, 10)
  card = {"net": config.teacher.net, "num_classes": 10, "mean": (0.3057,), "std": (0.3762,)}
  game = distill.build_game(config, devices, net, card)
  teacher = nets.init(net, jax.random.key(5), jnp.zeros((2, 8, 8, 1)))
  state = algorithm.initial_state(game, 0, (8, 8, 1))
  return game, mesh.replicate(teacher, devices), mesh.place(state, algorithm.shardings(game))


@EVERY
def test_contract(method, tmp_path):
  """Finite terms under the method's names, a student that moves, a teacher that does not, one program, exact resume."""
  game, teacher, state = start.__wrapped__(method)  # an epoch consumes its state
  kept, before = jax.device_get((teacher, state.student.params))
  epoch = algorithm.compile_epoch(game, 2)
  first, terms = epoch(state, teacher)
  named = lambda terms: {name for name, (weight, _) in terms.items() if weight} | {"total"}
  assert set(terms["generator"]) == named(game.method.generator_terms)
  assert set(terms["student"]) == named(game.method.student_terms)
  assert all(np.isfinite(value).all() for value in jax.tree.leaves(jax.device_get(terms)))
  assert terms["student"]["total"].shape == (2, game.student_steps)
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before, jax.device_get(first.student.params))
  assert all(jax.tree.leaves(moved.get("net", moved)))

  checkpointer = checkpoint.Checkpointer(tmp_path)
  checkpointer.save(1, {"state": first}, {})
  checkpointer.close()
  second, _ = epoch(first, teacher)
  assert epoch._cache_size() == 1, "the second epoch must not compile again"
  checkpointer = checkpoint.Checkpointer(tmp_path)
  shapes = mesh.place(algorithm.initial_state(game, 0, (8, 8, 1)), algorithm.shardings(game))
  restored = checkpointer.restore({"state": shapes})[0]["state"]
  checkpointer.close()
  again, _ = epoch(restored, teacher)
  plain = lambda state: jax.device_get(state.replace(key=jax.random.key_data(state.key)))
  assert equal(plain(second), plain(again)), "a resumed run goes on as if it had never stopped"
  assert epoch._cache_size() == 1
  assert equal(teacher, kept), "the teacher is never written"
  if game.method.inverts:
    assert int(second.memory["pool"]["count"]) == 4 and np.asarray(second.memory["pool"]["images"]).any()


@EVERY
def test_smoke_run_reaches_its_report(method, tmp_path, digits_dir, finished):
  if method == "cpsc":
    pytest.skip("this is the run of every test of tests/test_run.py")
  workdir = tmp_path / "w"
  flags = [f"--config.teacher.checkpoint={finished / 'teacher'}"]
  assert main(command(workdir, digits_dir, *flags, config=flag_of(method))) == 0
  results = json.loads((workdir / "results.json").read_text())
  assert results["method"] == method and results["student"]["last"]["epoch"] == 2
  assert {path.name for path in workdir.iterdir()} >= {"samples.png", "curves.png", "student", "results.json"}
  inverts = method in ("rgal", "deepinversion", "cmi")
  assert (workdir / "generator").exists() != inverts and (workdir / "pool.npz").exists() == inverts
  conditional = method == "cpsc" or inverts
  assert (results["generator"]["label_fidelity"] is not None) == conditional
  if inverts:
    with np.load(workdir / "pool.npz") as held:
      assert held["images"].shape == (64, 8, 8, 1) and held["images"].dtype == np.uint8
      assert results["generator"]["pool"] == 64 and set(held["labels"]) <= set(range(10))
  assert main(command(workdir, digits_dir, *flags, config=flag_of(method))) == 0, "a finished run is left alone"


def test_an_iteration_starts_the_generator_afresh():
  game, teacher, state = start("rgal")
  begin = jit(algorithm.start_afresh(game))
  a, b = begin(state, jax.random.key(1)), begin(state, jax.random.key(2))
  kernel = lambda s: np.asarray(s.generator.params["conv3"]["kernel"])
  assert not np.array_equal(kernel(a), kernel(b)) and not np.array_equal(kernel(a), kernel(state))
  assert not np.array_equal(a.memory["draft"]["latent"], b.memory["draft"]["latent"])
  assert equal(a.student, state.student) and np.isinf(a.memory["draft"]["loss"])


def test_inversion_keeps_the_batch_of_the_least_loss():
  """Steps whose loss rises leave the draft as it was; the latents move all the same."""
  game, teacher, state = start("rgal")
  state = jit(algorithm.start_afresh(game))(state, jax.random.key(1))
  step = jit(algorithm.inversion_step(game, teacher))
  lowest, images = np.inf, None
  for i in range(6):
    before = state
    state, terms = step(state, jax.random.key(i))
    draft = state.memory["draft"]
    assert not np.array_equal(draft["latent"], before.memory["draft"]["latent"])
    if float(terms["total"]) < lowest:
      lowest, images = float(terms["total"]), np.asarray(draft["images"])
    assert float(draft["loss"]) == pytest.approx(lowest, rel=1e-6)
    assert np.array_equal(draft["images"], images)
  kept = algorithm.keep_best(game)(state).memory["pool"]
  assert np.array_equal(kept["images"][0], images) and np.array_equal(kept["labels"][0], draft["labels"])


def test_an_untrained_generator_fills_the_pool_too():
  game, teacher, state = start("rgal", arm="untrained_generator")
  state = jit(algorithm.start_afresh(game))(state, jax.random.key(1))
  after = algorithm.keep_best(game)(state)
  assert game.generator_steps == 0
  assert np.asarray(after.memory["pool"]["images"][0]).std() > 0


@pytest.mark.parametrize("method", ["cpsc", "dafl"])
def test_triplets_can_be_added_to_any_method(method):
  changes = {"loss.generator.triplet": 0.1, "loss.student.triplet": 0.2}
  game, teacher, state = start(method, **changes)
  key = jax.random.key(0)
  _, terms = jit(algorithm.generator_step(game, teacher))(state, key)
  assert np.isfinite(terms["triplet"])
  _, terms = jit(algorithm.student_step(game, teacher))(state, key)
  weighted = sum(game.method.student_terms[name][0] * float(value) for name, value in terms.items() if name != "total")
  assert float(terms["total"]) == pytest.approx(weighted, rel=1e-5) and "triplet" in terms


def test_the_published_triplets_are_a_switch():
  rng = np.random.default_rng(0)
  stage = jnp.asarray(rng.normal(size=(12, 2, 2, 4)))
  output = Output(jnp.asarray(rng.normal(size=(12, 4))), None, (stage,))
  view = View(None, output, output, key=jax.random.key(0))
  config = rgal_cifar10.get_config("digits")
  values = {}
  for quirk in (False, True):
    config.quirks.unswapped_triplets = quirk
    _, term = rgal.triplet_terms(config)[0]["triplet"]
    values[quirk] = float(term(view))
  labels = output.logits.argmax(-1)
  for quirk, value in values.items():
    want = losses.triplets((stage,), output.logits, labels, view.key, 0.2, focal=True, swapped=not quirk)
    assert value == pytest.approx(float(want))
  assert values[False] != values[True]


@pytest.mark.parametrize(
  ("method", "changes", "word"),
  [
    ("dafl", {"loss.generator.scl": 0.7}, "config.loss.generator.scl is 0.7, but method 'dafl' has no such term"),
    ("rgal", {"loss.student.l2": 1.0}, "config.loss.student.l2"),
    ("rgal", {"pool.size": 100}, "multiple of config.pool.batch_size"),
    ("cmi", {"loss.views.negatives": 100}, "config.loss.views.negatives is 100"),
    ("cpsc", {"generator.net": "pixels"}, "nothing to train"),
    ("rgal", {"generator.flip": True}, "config.generator.flip"),
    ("zskt", {"reference": True}, "CPSC-DFKD's"),
  ],
)
def test_bad_settings_are_refused(method, changes, word):
  config = config_of(method)
  config.update_from_flattened_dict(changes)
  with pytest.raises(Refusal, match=word):
    settings.resolve(config, mesh.make_mesh())


def test_stages_that_do_not_match_are_refused():
  config = ml_collections.ConfigDict(config_of("zskt").to_dict())
  settings.check_stages(config, "wrn_16_2")
  with pytest.raises(Refusal, match=r"config.loss.student.attention compares stages, and those of wrn_10_1"):
    settings.check_stages(config, "resnet18")
  config = ml_collections.ConfigDict(config_of("rgal").to_dict())
  with pytest.raises(Refusal, match=r"config.loss.student.channel"):
    settings.check_stages(config, "resnet18")


def test_projections_are_trained_and_not_saved():
  game, teacher, state = start("rgal")
  assert isinstance(game.student, nets.StageProjections)
  after, _ = jit(lambda s, x, y: algorithm.learn(game, teacher, s, x, y, jax.random.key(0)))(
    state, jnp.asarray(np.random.default_rng(0).normal(size=(32, 8, 8, 1)), jnp.float32), jnp.arange(32) % 10
  )
  assert not equal(after.student.params["stage_0"], state.student.params["stage_0"])
  net, variables = nets.without_head(game.student, after.student.variables)
  assert nets.count_parameters(variables["params"]) == 77562
  x = jnp.ones((2, 8, 8, 1))
  whole = game.student.apply(after.student.variables, x, train=False)
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
  close = lambda ours, theirs: assert_close(ours, theirs, limit)
  array = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)
  kl = lambda p, q: np.sum(p * (np.log(p) - np.log(q)), -1)
  p, q = softmax(t / 20), softmax(s / 20)
  close(losses.kl(array(t), array(s), 20.0), 400 * kl(p, q).mean())
  agreed = t.argmax(1) == s.argmax(1)
  assert 0 < agreed.sum() < 7
  close(losses.kl_where_agreed(array(t), array(s)), (kl(softmax(t), softmax(s)) * agreed).mean())
  p, q = softmax(t / 3), softmax(s / 3)
  m = (p + q) / 2
  close(losses.jensen_shannon(array(t), array(s)), np.mean(kl(p, m) + kl(q, m)) / 2)
  close(losses.l1(array(t), array(s)), np.abs(t - s).mean())
  mean = softmax(t).mean(0)
  close(losses.imbalance(array(t)), np.sum(mean * np.log(mean)))
  assert np.isfinite(jax.grad(lambda x: losses.imbalance(x))(array(np.eye(4) * 1000))).all()
  close(losses.inactivity(array(s)), -np.abs(s).mean())
  x = stages[0]
  neighbours = [
    x[:, :, :-1] - x[:, :, 1:],
    x[:, :-1] - x[:, 1:],
    x[:, :-1, :-1] - x[:, 1:, 1:],
    x[:, 1:, :-1] - x[:, :-1, 1:],
  ]
  close(losses.total_variation(array(x)), sum(np.sqrt((d**2).sum()) for d in neighbours))
  close(losses.norm(array(x)), np.sqrt((x**2).sum()))
  look = lambda a: (lambda m: m / np.linalg.norm(m, axis=1, keepdims=True))((a**2).mean(-1).reshape(7, -1))
  want = sum(((look(a) - look(b)) ** 2).mean() for a, b in zip(stages, others, strict=True))
  close(losses.attention(array(stages), array(others)), want)
  want = sum(((a.mean((1, 2)) - b) ** 2).mean() for a, b in zip(stages, projected, strict=True))
  close(losses.channel_distillation(array(stages), array(projected)), want)


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_contrast_of_views(batches):
  """CMI's loss against its formula, with an empty, a part-filled and a full bank."""
  from cpsc_jax import pool

  rng = np.random.default_rng(batches)
  rows = lambda n: rng.normal(size=(n, 5)).astype(np.float32)
  bank = pool.empty(3, 4, features=((10,), jnp.float32))
  for _ in range(batches):
    bank = pool.add(bank, features=jnp.asarray(np.concatenate([rows(4), rows(4)], 1)))
  whole, local = rows(4), rows(4)
  as_output = lambda means: Output(None, None, (jnp.asarray(means)[:, None, None, :],))
  critic = lambda x: x / jnp.linalg.norm(x, axis=1, keepdims=True)
  view = View(None, as_output(whole), None, images=jnp.zeros((4, 8, 8, 1)), key=jax.random.key(0), bank=bank)
  view = view.replace(teach=lambda x: as_output(local), criticise=lambda x: critic(x))
  ours = float(cmi.instance_contrast(view, 12, 0.2))
  held = np.asarray(bank["features"]).reshape(12, 10)[: 4 * batches]
  a = np.asarray(critic(jnp.asarray(np.concatenate([local, held[:, :5]]))))
  b = np.asarray(critic(jnp.asarray(np.concatenate([whole, held[:, 5:]]))))
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
