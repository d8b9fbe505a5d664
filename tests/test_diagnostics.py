"""Diagnostics on constructed cases with known answers, beside twins in NumPy, SciPy and scikit-learn."""

import dataclasses
import functools
import inspect
import json
import subprocess
import sys
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import sklearn.calibration
import sklearn.metrics
import sklearn.neighbors
from conftest import REPOSITORY, command, with_devices
from spmd_worker import smoke_config

from cpsc_jax import algorithm, datasets, diagnostics, evaluate, examine, experiment, losses, mesh, nets, streams
from cpsc_jax.config import resolve
from cpsc_jax.main import main
from cpsc_jax.methods import METHODS
from cpsc_jax.nets.layers import unit
from cpsc_jax.state import Hyper, Output, Statistics, Weights
from cpsc_jax.streams import Stream

RNG = np.random.default_rng(0)
STATIC = ("num_classes", "bins", "neighbours")


class Compiled:
  """The functions of `cpsc_jax.diagnostics`, each compiled as a whole."""

  def __getattr__(self, name):
    function = getattr(diagnostics, name)
    static = [key for key in STATIC if key in inspect.signature(function).parameters]
    self.__dict__[name] = jax.jit(function, static_argnames=static)
    return self.__dict__[name]


COMPILED = Compiled()
EVERYONE = functools.partial(np.ones, dtype=bool)


def close(found, wanted, tolerance=1e-4):
  np.testing.assert_allclose(np.asarray(found), wanted, rtol=tolerance, atol=tolerance)


# Predictions.


def test_confusion_and_shares_agree_with_sklearn():
  labels, predicted = RNG.integers(0, 5, 300), RNG.integers(0, 5, 300)
  matrix = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(6))
  np.testing.assert_array_equal(COMPILED.confusion(labels, predicted, 6), matrix)
  shares = np.asarray(COMPILED.share_per_class(labels, labels == predicted, 6))
  close(shares[:5], sklearn.metrics.recall_score(labels, predicted, average=None))
  assert np.isnan(shares[5]), "nothing is known of a class without images"


def test_reliability_agrees_with_sklearn():
  confidence = RNG.uniform(0, 1, 1000).astype(np.float32)
  correct = RNG.uniform(0, 1, 1000) < confidence**2
  curve = COMPILED.reliability(jnp.asarray(confidence), jnp.asarray(correct), bins=10)
  accuracy, mean = sklearn.calibration.calibration_curve(correct, confidence, n_bins=10)
  close(curve["accuracy"], accuracy)
  close(curve["confidence"], mean)
  assert int(curve["count"].sum()) == 1000
  weights = np.asarray(curve["count"]) / 1000
  close(COMPILED.calibration_error(curve), np.sum(weights * np.abs(accuracy - mean)))


def test_calibration_of_predictors_with_known_errors():
  def error(confidence, correct):
    curve = COMPILED.reliability(jnp.asarray(confidence, jnp.float32), jnp.asarray(correct))
    return float(COMPILED.calibration_error(curve))

  calibrated = np.repeat([0.25, 0.5, 0.75, 1.0], 400), np.tile(np.arange(400), 4) < np.repeat([100, 200, 300, 400], 400)
  assert error(*calibrated) < 1e-6
  assert error(np.full(400, 0.75), calibrated[1][:400]) == pytest.approx(0.5), "sure of 3 in 4, right in 1"
  assert error(np.ones(10), np.zeros(10, bool)) == pytest.approx(1.0)


# Samples.


def test_balance_and_shares():
  predicted = jnp.asarray([[0, 1], [2, 3]])
  shares = COMPILED.class_shares(predicted, EVERYONE((2, 2)), 4)
  close(shares, [0.25] * 4)
  assert float(COMPILED.balance(shares)) == pytest.approx(1.0)
  one = COMPILED.class_shares(jnp.zeros((3, 5), int), EVERYONE((3, 5)), 4)
  assert float(COMPILED.balance(one)) == pytest.approx(0.0, abs=1e-6)
  p = RNG.dirichlet(np.ones(6))
  assert float(COMPILED.balance(jnp.asarray(p))) == pytest.approx(scipy.stats.entropy(p) / np.log(6), rel=1e-5)
  masked = COMPILED.class_shares(jnp.asarray([[0, 1], [1, 1]]), jnp.asarray([[True, True], [False, False]]), 2)
  close(masked, [0.5, 0.5])


def test_fidelity():
  predicted = jnp.asarray([[0, 0, 1], [0, 1, 1], [2, 0, 1]])
  exist = jnp.asarray([[True] * 3, [True, True, False], [False] * 3])
  found = np.asarray(COMPILED.fidelity(predicted, exist))
  close(found[:2], [2 / 3, 1 / 2])
  assert np.isnan(found[2]), "a class without a sample"


@pytest.mark.parametrize("n, d", [(40, 7), (7, 40)])
def test_vendi_score(n, d):
  x = RNG.normal(size=(n, d)).astype(np.float32)
  unit_rows = x / np.linalg.norm(x, axis=1, keepdims=True)
  values = np.linalg.eigvalsh(unit_rows @ unit_rows.T / n)
  close(COMPILED.vendi_score(x, EVERYONE(n)), np.exp(scipy.stats.entropy(np.maximum(values, 0))), 1e-3)
  assert float(COMPILED.vendi_score(np.repeat(x[:1], n, 0), EVERYONE(n))) == pytest.approx(1.0, abs=1e-3)
  different = np.eye(max(n, d), dtype=np.float32)[:n]
  assert float(COMPILED.vendi_score(different, EVERYONE(n))) == pytest.approx(n, rel=1e-4)
  half = np.arange(n) < 5
  assert float(COMPILED.vendi_score(different, half)) == pytest.approx(5, rel=1e-4), "of those that exist"
  assert np.isnan(COMPILED.vendi_score(x, np.zeros(n, bool)))


@pytest.mark.parametrize("n, d, mean", [(40, 7, 3), (7, 40, 3), (1000, 400, 10)])
def test_effective_rank(n, d, mean):
  x = RNG.normal(size=(n, d)).astype(np.float32) + mean
  singular = np.linalg.svd(x - x.mean(0), compute_uv=False)
  close(COMPILED.effective_rank(x, EVERYONE(n)), np.exp(scipy.stats.entropy(singular)), 2e-3)
  assert float(COMPILED.effective_rank(np.repeat(x[:1], n, 0), EVERYONE(n))) == pytest.approx(1.0)
  line = np.linspace(0, 1, n)[:, None] * x[:1]
  assert float(COMPILED.effective_rank(line.astype(np.float32), EVERYONE(n))) == pytest.approx(1.0, abs=0.05)
  cross = np.concatenate([np.eye(4), -np.eye(4)]).astype(np.float32) + 2
  assert float(COMPILED.effective_rank(cross, EVERYONE(8))) == pytest.approx(4.0, rel=1e-4)


def test_distances_agree_with_sklearn():
  x, y = RNG.normal(size=(30, 6)).astype(np.float32) + 50, RNG.normal(size=(20, 6)).astype(np.float32) + 50
  close(COMPILED.distances(x, y), sklearn.metrics.pairwise_distances(x, y), 1e-3)


def test_class_distances():
  x = RNG.normal(size=(3, 8, 5)).astype(np.float32)
  exist = EVERYONE((3, 8))
  exist[2, 4:] = False
  found = np.asarray(COMPILED.class_distances(x, exist))
  kept = [x[0], x[1], x[2, :4]]
  for a in range(3):
    for b in range(3):
      apart = sklearn.metrics.pairwise_distances(kept[a], kept[b])
      wanted = apart[~np.eye(len(apart), dtype=bool)].mean() if a == b else apart.mean()
      assert found[a, b] == pytest.approx(wanted, rel=1e-3), (a, b)
  within, between = COMPILED.within_and_between(found)
  close([within, between], [np.diag(found).mean(), found[~np.eye(3, dtype=bool)].mean()])


# Samples beside real images.


@pytest.mark.parametrize("d", [4, 60])
def test_frechet_distance(d):
  """With fewer and with more features than samples, from different matrices."""
  real = RNG.normal(size=(50, d)).astype(np.float32)
  drawn = (RNG.normal(size=(40, d)) @ RNG.normal(size=(d, d)) / np.sqrt(d) + 1).astype(np.float32)
  a, b = np.cov(real, rowvar=False), np.cov(drawn, rowvar=False)
  root = scipy.linalg.sqrtm(scipy.linalg.sqrtm(a).real @ b @ scipy.linalg.sqrtm(a).real).real
  wanted = np.sum((real.mean(0) - drawn.mean(0)) ** 2) + np.trace(a) + np.trace(b) - 2 * np.trace(root)
  assert float(COMPILED.frechet_distance(real, drawn, EVERYONE(40))) == pytest.approx(wanted, rel=0.02)
  assert float(COMPILED.frechet_distance(real, real, EVERYONE(50))) == pytest.approx(0, abs=0.02)
  moved = float(COMPILED.frechet_distance(real, real + 2, EVERYONE(50)))
  assert moved == pytest.approx(4 * d, rel=1e-3), "as far as the mean moved"
  padded = np.concatenate([drawn, np.full((10, d), 1e3, np.float32)])
  assert float(COMPILED.frechet_distance(real, padded, np.arange(50) < 40)) == pytest.approx(wanted, rel=0.02)


def overlap_by_sklearn(real, drawn, k):
  def radius(x):
    return sklearn.neighbors.NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, -1]

  apart = sklearn.metrics.pairwise_distances(real, drawn)
  in_real, in_drawn = apart < radius(real)[:, None], apart < radius(drawn)[None]
  return {
    "precision": in_real.any(0).mean(),
    "recall": in_drawn.any(1).mean(),
    "density": in_real.sum(0).mean() / k,
    "coverage": in_real.any(1).mean(),
  }


def test_overlap_agrees_with_sklearn():
  real, drawn = RNG.normal(size=(60, 3)), 0.7 * RNG.normal(size=(50, 3)) + 0.5
  real, drawn = real.astype(np.float32), drawn.astype(np.float32)
  found = COMPILED.manifold_overlap(real, drawn, EVERYONE(50))
  for name, wanted in overlap_by_sklearn(real, drawn, 5).items():
    assert float(found[name]) == pytest.approx(wanted, abs=1e-5), name
  masked = COMPILED.manifold_overlap(real, drawn, np.arange(50) < 30)
  for name, wanted in overlap_by_sklearn(real, drawn[:30], 5).items():
    assert float(masked[name]) == pytest.approx(wanted, abs=1e-5), name


def test_overlap_of_known_sets():
  real = RNG.normal(size=(300, 3)).astype(np.float32)
  same = COMPILED.manifold_overlap(real, real, EVERYONE(300))
  assert min(float(value) for value in same.values()) >= 0.99
  fresh = COMPILED.manifold_overlap(real, RNG.normal(size=(300, 3)).astype(np.float32), EVERYONE(300))
  assert float(fresh["precision"]) > 0.85 and float(fresh["coverage"]) > 0.85
  assert float(fresh["density"]) == pytest.approx(1.0, abs=0.2)
  far = COMPILED.manifold_overlap(real, real + 100, EVERYONE(300))
  assert max(float(value) for value in far.values()) == 0
  one = COMPILED.manifold_overlap(real, np.repeat(real[:1], 300, 0), EVERYONE(300))
  assert float(one["precision"]) == 1 and float(one["recall"]) == 0 and float(one["coverage"]) < 0.1


# Batch norms and terms.


def test_norm_distances_are_what_the_term_sums():
  def layer():
    return {"mean": jnp.asarray(RNG.normal(size=4)), "var": jnp.asarray(RNG.uniform(size=4))}

  layers = [("stage_10", "norm"), ("stage_2", "norm"), ("norm",)]
  statistics = Statistics({name: layer() for name in layers}, {name: layer() for name in layers})
  found = COMPILED.norm_distances(statistics)
  assert len(found) == 3 and sum(map(float, found.values())) == pytest.approx(float(losses.bn_statistics(statistics)))
  in_order = diagnostics.norm_distances(statistics)
  assert [name.partition(" ")[2] for name in in_order] == ["/".join(name) for name in layers]
  assert list(in_order) == sorted(in_order), "a pytree, which sorts its keys, keeps them in order"


def test_cosines():
  vectors = np.array([[1, 0, 0], [2, 2, 0], [-3, 0, 0], [0, 0, 0.0]])
  norms, cosine = COMPILED.cosines(jnp.asarray(vectors @ vectors.T))
  close(norms, [1, 8**0.5, 3, 0])
  close(cosine[0, :3], [1, 0.5**0.5, -1])
  assert np.isnan(cosine[3]).all(), "a gradient of 0 has no direction"


class Tiny(nn.Module):
  """A net that compiles quickly."""

  @nn.compact
  def __call__(self, x, train):
    x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Conv(8, (3, 3), name="convolution")(x))
    return nn.Dense(10, name="classifier")(nn.relu(x).mean((1, 2)))


def setup_of(method, net_name="tiny", **changes):
  config = smoke_config(method)
  config.update_from_flattened_dict({**changes, "student.net": net_name, "teacher.net": net_name})
  devices, spec = mesh.make_mesh(), datasets.DATASETS["digits"]
  nets.NETS["tiny"] = lambda num_classes, dtype=None: nets.adapt(Tiny(), spec.image_shape)
  config = resolve(config, spec, devices)
  net = nets.classifier(net_name, 10)
  setup = experiment.build(config, spec, net, {"mean": [0.3], "std": [0.4]}, devices)
  teacher = mesh.replicate(nets.init(net, jax.random.key(5), jnp.zeros((2, *spec.image_shape))), devices)
  return setup, teacher, experiment.initial_state(config, setup, streams.root(0), spec.image_shape, None)


def check_terms(setup, teacher, state):
  """The terms, and how long the gradient of their weighted sum is, as the generator's update has them."""
  key = streams.root(3)
  found = jax.device_get(examine.compile_terms(setup)(state, teacher, key))

  def total(images, y, trained):
    view, _ = algorithm.view_of(setup, teacher, state, images, y, trained, state.student.batch_stats, key)
    summed = algorithm.weighted_sum(setup.method.generator_terms, state.hyper.generator.terms, view)
    return summed.total, summed.terms

  @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
  def by_hand(state, key):
    z, y = setup.method.draw(state, key)
    params = {"generator": state.generator.params, **{name: part.params for name, part in state.trained.items()}}
    images, y, _ = algorithm.generated(setup, params, state.generator.batch_stats, z, y)
    params.pop("generator")
    return jax.grad(total, has_aux=True)(images, y, params)

  gradient, terms = jax.device_get(by_hand(state, key))
  names = list(setup.method.generator_terms)
  close(found["term_value"], [terms[name] for name in names], 1e-3)
  weights = np.array([setup.weights["generator"][name] for name in names])
  close(found["term_weighted"], weights * found["term_value"], 1e-5)
  pulls = found["term_weighted_gradient"]
  close(pulls, weights * found["term_gradient"], 1e-5)
  cosine = np.nan_to_num(found["term_cosine"])
  length = np.sqrt(pulls @ cosine @ pulls)
  assert length == pytest.approx(np.linalg.norm(gradient), rel=1e-2), "together they pull as the total does"
  return found


def test_terms_and_their_gradients():
  found = check_terms(*setup_of("dafl"))
  assert list(found["norm_distance"]) == ["000 norm"] and found["term_cosine"].shape == (3, 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_terms_of_every_method(method):
  found = check_terms(*setup_of(method, "wrn_10_1"))
  assert len(found["norm_distance"]) > 5


def test_terms_in_micro_batches_and_rematerialised():
  """What does not fit at once is not tried at once; what is computed again is the same."""
  setup, teacher, state = setup_of("zskt", rematerialise=True, **{"generator.micro_batches": 2})
  found = jax.device_get(examine.compile_terms(setup)(state, teacher, streams.root(3)))
  plain = dataclasses.replace(
    setup, generator=dataclasses.replace(setup.generator, policy=algorithm.gradients.Policy())
  )
  half = dataclasses.replace(
    plain, method=dataclasses.replace(plain.method, draw=lambda s, k: tuple(x[:16] for x in setup.method.draw(s, k)))
  )
  again = jax.device_get(examine.compile_terms(half)(state, teacher, streams.root(3)))
  close(found["term_gradient"], again["term_gradient"], 1e-3)


# Generators with known faults.


class Nearest(nn.Module):
  """A teacher that gives an image the class of the nearest mean of real images; its features are the pixels."""

  means: tuple

  @nn.compact
  def __call__(self, x, train=False):
    pixels = x.reshape(len(x), -1)
    logits = -jnp.sum(jnp.square(pixels[:, None] - jnp.asarray(self.means)), axis=-1)
    return Output(logits, unit(pixels), pooled=pixels)


@pytest.fixture(scope="module")
def digits(digits_dir):
  """(images (N, 8, 8, 1) normalised, labels, teacher) of the test digits."""
  split = datasets.find("digits", digits_dir).load_evaluation("test")
  images, labels = np.asarray(datasets.normalise(split.images, [0.3], [0.4])), np.asarray(split.labels)
  means = tuple(tuple(images[labels == label].mean(0).reshape(-1).tolist()) for label in range(10))
  return images, labels, Nearest(means)


def diagnosed(digits, samples):
  """What a diagnosis finds of a generator that gives `samples` (key, label) -> (40, 8, 8, 1), and its warnings."""
  images, _, teacher = digits
  devices = mesh.make_mesh()
  method = types.SimpleNamespace(
    samples=lambda state, key, label, number: (samples(key, label), jnp.ones(number, bool)),
    noise=types.SimpleNamespace(num_labels=10),
  )
  setup = types.SimpleNamespace(method=method, teacher=teacher, mesh=devices)
  drawn = evaluate.compile_sampler(setup, 40)(None, {}, jax.random.key(0))
  real = jnp.asarray(images[::2].reshape(len(images[::2]), -1))
  program = functools.partial(examine.of_samples, net=teacher, num_classes=10, labelled=True)
  found = jax.device_get(examine.once(program, devices)({}, drawn, real))
  found["fidelity_per_class"] = np.asarray(COMPILED.fidelity(drawn.teacher.labels, drawn.exist))
  return found, diagnostics.warnings(found, 10)


def test_real_images_passed_off_as_generated(digits):
  images, labels, _ = digits
  rows = jnp.asarray(np.stack([np.flatnonzero(labels[1::2] == label)[:16] * 2 + 1 for label in range(10)]))
  found, said = diagnosed(digits, lambda key, label: jnp.asarray(images)[jax.random.choice(key, rows[label], (40,))])
  assert np.nanmean(found["fidelity_per_class"]) > 0.85 and found["class_balance"] > 0.95
  assert found["precision"] > 0.8 and found["coverage"] > 0.6
  assert found["vendi_score"] == pytest.approx(found["real_vendi_score"], rel=0.1)
  noise, _ = diagnosed(digits, lambda key, label: jax.random.normal(key, (40, 8, 8, 1)))
  assert found["frechet_distance"] < 0.3 * noise["frechet_distance"] and noise["precision"] < 0.1
  assert found["student_mistakes"] == 0
  assert said == ["The samples are not adversarial: the student agrees with the teacher on nearly all of them."], (
    "the student is the teacher here, and nothing else is wrong"
  )


def test_a_generator_that_ignores_its_label(digits):
  images = jnp.asarray(digits[0])
  found, said = diagnosed(digits, lambda key, label: jax.random.choice(key, images, (40,)))
  assert np.nanmean(found["fidelity_per_class"]) == pytest.approx(0.1, abs=0.05)
  assert found["distance_within"] == pytest.approx(found["distance_between"], rel=0.05)
  assert any("ignores its label" in sentence and "chance is 10.0%" in sentence for sentence in said)


def test_an_ignored_label_is_said_to_be_drowned_by_a_term():
  """Only where another term's gradient is far above that of the labels, and gradients were looked at."""
  found = {"fidelity_per_class": np.full(10, 0.1), "terms": np.array(["adversarial", "bn", "ce"])}

  def said(*gradients):
    return diagnostics.warnings(found | {"term_weighted_gradient": np.array(gradients)}, 10)[0]

  assert said(1.3, 76.0, 1.2).endswith(
    "The gradient of the term bn at the image is 63 times that of ce: for samples of the class asked for, which a"
    " student may not need, lower loss.generator.bn or raise loss.generator.ce."
  )
  plain = diagnostics.warnings({"fidelity_per_class": np.full(10, 0.1)}, 10)[0]
  assert said(0.5, 2.0, 1.0) == said(0.5, 2.0, 0.0) == plain and "gradient" not in plain


def test_a_generator_that_always_draws_one_image(digits):
  images = jnp.asarray(digits[0])
  found, said = diagnosed(digits, lambda key, label: jnp.broadcast_to(images[0], (40, 8, 8, 1)))
  assert found["vendi_score"] == pytest.approx(1.0, abs=1e-3) and found["distance"] == pytest.approx(0, abs=0.05)
  assert found["recall"] == 0 and found["class_balance"] == pytest.approx(0, abs=1e-5)
  assert any("draws one image:" in sentence for sentence in said)
  assert any("of few classes" in sentence and "100% of them" in sentence for sentence in said)


def test_a_generator_that_draws_one_image_per_class(digits):
  images, labels, _ = digits
  first = jnp.asarray(np.stack([images[labels == label].mean(0) for label in range(10)]))
  found, said = diagnosed(digits, lambda key, label: jnp.broadcast_to(first[label], (40, 8, 8, 1)))
  assert np.nanmean(found["fidelity_per_class"]) == 1.0
  close(found["vendi_score_per_class"], np.ones(10), 1e-3)
  assert any("one image per class" in sentence for sentence in said)


def test_a_generator_without_one_class(digits):
  images, labels, _ = digits
  rows = jnp.asarray(np.stack([np.flatnonzero(labels == (0 if label == 7 else label))[:16] for label in range(10)]))
  _, said = diagnosed(digits, lambda key, label: jnp.asarray(images)[jax.random.choice(key, rows[label], (40,))])
  assert any("does not draw class 7:" in sentence for sentence in said)


# Whole diagnoses.


def rates_of(method, **changes):
  """The learning rates of epochs 1 to 16."""
  config = smoke_config(method)
  config.update_from_flattened_dict({"schedule.epochs": 16, "student.warmup_epochs": 0, **changes})
  config = resolve(config, datasets.DATASETS["digits"], mesh.make_mesh())
  one = Weights({}, jnp.float32(2.0))
  program = jax.jit(functools.partial(experiment.learning_rates, config))
  found = [program(np.int32(epoch), Hyper(one, one)) for epoch in range(1, 17)]
  return {player: [float(rates[player]) for rates in found] for player in found[0]}


def test_learning_rates_are_those_of_the_last_update():
  falling = {"schedule": "steps", "milestones": (5, 9), "decay": 0.1, "lr": 0.5}
  both = {f"{player}.{key}": value for player in ("student", "generator") for key, value in falling.items()}
  wanted = [1.0] * 4 + [0.1] * 4 + [0.01] * 8  # twice what the config says, by the factor in the state
  for player, rates in rates_of("cpsc", **both).items():
    np.testing.assert_allclose(rates, wanted, rtol=1e-5, err_msg=player)
  cosine = rates_of("zskt", **{"student.lr": 1.0, "generator.schedule": "steps", "generator.milestones": ()})
  updates = np.arange(2, 33, 2) - 1  # two iterations an epoch, one student update each
  np.testing.assert_allclose(cosine["student"], 1 + np.cos(np.pi * updates / 32), rtol=1e-4)


def test_a_player_that_does_not_train_has_no_learning_rate():
  waiting = rates_of("fast", **{"episodes.warmup": 4})
  assert list(waiting) == ["student"], "the generator's optimiser starts again in every iteration"
  assert np.isnan(waiting["student"][:2]).all() and np.isfinite(waiting["student"][2:]).all()
  assert list(rates_of("cpsc", arm="untrained_generator")) == ["student"]


def test_probes_are_what_they_say():
  images = jnp.asarray(RNG.integers(0, 256, (400, 8, 8, 1)), jnp.uint8)
  found = np.asarray(jax.jit(examine.probes)(jax.random.key(0), images)).astype(float)
  plain = np.asarray(images).astype(float)
  assert found.shape == plain.shape
  assert abs(np.corrcoef(found[0::4].ravel(), plain[0::4].ravel())[0, 1]) < 0.03 and found[0::4].std() > 60
  inside = (plain[1::4] > 80) & (plain[1::4] < 175)
  assert (found[1::4] - plain[1::4])[inside].std() == pytest.approx(25.5, rel=0.15)
  middle = plain[2::4][:, 0:3, 0:3].mean((1, 2))
  np.testing.assert_allclose(found[2::4][:, 1, 1], middle, atol=0.51)
  deviations = (np.std(array[3::4], axis=(1, 2, 3)) for array in (found, plain))
  np.testing.assert_allclose(next(deviations), next(deviations) / 2, rtol=0.02)


def arrays_of(workdir):
  """{epoch: arrays} of a run's diagnoses, without the clock."""
  found = {}
  for path in sorted((workdir / "diagnostics").glob("*.npz")):
    with np.load(path) as arrays:
      found[int(path.stem)] = {name: arrays[name] for name in arrays.files if name != "epoch_seconds"}
  return found


def test_a_run_is_diagnosed(finished):
  history = json.loads((finished / "history.json").read_text())["student"]
  (epoch, found), *_ = arrays_of(finished).items()
  assert epoch == 2 and "diagnostics" in history[1] and "diagnostics" not in history[0]
  numbers = history[1]["diagnostics"]
  for name, value in numbers.items():
    assert value == pytest.approx(float(found[name])), name
  assert found["confusion"].sum() == 454 and np.trace(found["confusion"]) / 454 == pytest.approx(history[1]["accuracy"])
  assert np.nanmean(found["fidelity_per_class"]) == pytest.approx(history[1]["label_fidelity"])
  agreement = np.sum(found["agreement_per_class"] * found["images_per_class"]) / 454
  assert agreement == pytest.approx(history[1]["agreement"])
  assert found["grid"].shape == (10, 4, 8, 8, 1) and found["grid"].dtype == np.uint8
  assert "term_value" not in found, "digits leave the gradients out"
  assert json.loads((finished / "results.json").read_text())["warnings"] == found["warnings"].tolist()
  assert numbers["student_learning_rate"] > 0 and numbers["generator_learning_rate"] == pytest.approx(1e-3)


def test_a_run_ends_the_same_without_diagnoses(finished, digits_dir, tmp_path):
  from cpsc_jax import checkpoint

  assert main(command(tmp_path / "w", digits_dir, "--config.evaluate.diagnostics_every=0")) == 0
  assert not (tmp_path / "w" / "diagnostics").exists()
  for net in ("teacher", "student", "student_best", "generator"):
    assert checkpoint.read_card(tmp_path / "w" / net)["digest"] == checkpoint.read_card(finished / net)["digest"]
  ours, theirs = (json.loads((path / "history.json").read_text())["student"] for path in (tmp_path / "w", finished))
  for entry in theirs:
    entry.pop("diagnostics", None)
  assert ours == theirs


LABELLED = {"cpsc", "rgal", "deepinversion", "cmi", "fast", "nayer"}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_diagnosed(method, finished, digits_dir, tmp_path):
  """What does not apply to a method is absent."""
  config = f"--config={REPOSITORY / 'configs' / f'{method}_cifar10.py'}:digits_smoke"
  flags = ("--config.evaluate.gradients=True", f"--config.teacher.checkpoint={finished / 'teacher'}")
  extra = {"config": config} if method != "cpsc" else {}
  assert main(command(tmp_path / method, digits_dir, *flags, "--config.evaluate.diagnostics_every=1", **extra)) == 0
  diagnoses = arrays_of(tmp_path / method)
  assert sorted(diagnoses) == [1, 2]
  for found in diagnoses.values():
    for name in ("confidence", "class_balance", "student_mistakes", "vendi_score", "frechet_distance", "coverage"):
      assert np.isfinite(found[name]), name
    assert ("fidelity_per_class" in found) == ("distance_within" in found) == (method in LABELLED)
    assert found["term_value"].shape == found["terms"].shape and np.isfinite(found["term_value"]).all()
    assert found["norm_distance"].shape == found["layers"].shape
  page = (tmp_path / method / "report.html").read_text()
  assert ("fidelity</th>" in page) == (method in LABELLED)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["real_kd", "real_labels", "untrained_generator"])
def test_control_arms_are_diagnosed(arm, finished, digits_dir, tmp_path):
  flags = (f"--config.arm={arm}", f"--config.teacher.checkpoint={finished / 'teacher'}")
  assert main(command(tmp_path / arm, digits_dir, *flags)) == 0
  found = arrays_of(tmp_path / arm)[2]
  assert "confusion" in found and ("grid" in found) == ("confidence" in found) == (arm == "untrained_generator")


@pytest.mark.slow
def test_diagnoses_do_not_depend_on_the_devices(digits_dir, tmp_path):
  worker = [sys.executable, REPOSITORY / "tests" / "diagnosis_worker.py", tmp_path / "found.npz", digits_dir]
  done = subprocess.run(worker, env=with_devices(8), capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  with np.load(tmp_path / "found.npz") as arrays:
    found = {number: {n[2:]: arrays[n] for n in arrays.files if n.startswith(number)} for number in ("1 ", "8 ")}
  assert found["1 "].keys() == found["8 "].keys() and len(found["1 "]) > 40
  for name, array in found["1 "].items():
    scale = max(np.max(np.abs(np.nan_to_num(array.astype(float)))), 1e-3)
    np.testing.assert_allclose(
      found["8 "][name], array, rtol=0, atol=(1 if name == "grid" else 1e-3 * scale), err_msg=name
    )


def test_no_key_of_a_diagnosis_serves_twice():
  from test_streams import assert_no_key_serves_twice, uses_of_keys

  setup, teacher, state = setup_of("cpsc", "wrn_10_1", **{"generator.crop_pad": 1, "loss.generator.triplet": 0.1})
  root = streams.root(0)

  def program(root):
    evaluate.compile_sampler(setup, 2).__wrapped__(state, teacher, streams.key(root, Stream.SAMPLE_SHEET))
    examine.compile_terms(setup).__wrapped__(
      state, teacher, streams.nth(streams.key(root, Stream.DIAGNOSIS), Stream.TERMS, 3)
    )
    return examine.probes(streams.key(root, Stream.PROBES), jnp.zeros((8, 8, 8, 1), jnp.uint8))

  assert_no_key_serves_twice(uses_of_keys(program, root))
