"""From which distribution labels are drawn: given ones, the teacher's, or by need; and teachers on a long tail."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import command
from spmd_worker import a_phase
from test_algorithm import equal
from test_methods import DIGITS, config_of, on_host, resolved, start
from test_quantise import resolved as quantised
from test_quantise import start as start_quantised

from cpsc_jax import algorithm, checkpoint, config, datasets, experiment, mesh, nets, prior, saved, streams
from cpsc_jax import tasks as all_tasks
from cpsc_jax.errors import Refusal
from cpsc_jax.main import main
from cpsc_jax.setup import Noise
from cpsc_jax.state import Batch, Output, Prior
from cpsc_jax.streams import Stream

KEY, DEVICES = jax.random.key(3), mesh.make_mesh()
SHARES = np.array([0.5, 0.0, 0.3, 0.2, 0.0])
GIVEN = "5,0,3,2,0,1,1,1,1,1"
NEED = prior.Need(floor=0.5, momentum=0.99)


def noise(**options):
  return Noise(4, 5, True, DEVICES, **options)


# Labels.


@pytest.mark.parametrize("balanced", [False, True])
def test_uniform_labels_are_those_that_were_drawn_before(balanced):
  """Bit by bit, with the keys they had: a config without a prior has none in its state."""
  _, y = noise(balanced=balanced).draw(KEY, 37, None)
  key = streams.key(KEY, Stream.LABELS)
  before = jax.random.permutation(key, jnp.arange(37) % 5) if balanced else jax.random.randint(key, (37,), 0, 5)
  assert np.array_equal(y, before) and y.dtype == jnp.int32
  _, _, state = start("cpsc")
  assert state.prior is None and state.memory == {}


def test_labels_have_the_given_shares():
  z, y = noise().draw(KEY, 20000, Prior(SHARES))
  assert np.array_equal(z, noise().draw(KEY, 20000)[0]), "the latents are the same"
  counts = np.bincount(y, minlength=5)
  deviation = np.sqrt(20000 * SHARES * (1 - SHARES))
  assert np.all(np.abs(counts - 20000 * SHARES) <= 4 * deviation) and y.dtype == jnp.int32


def test_balanced_labels_have_their_shares_in_every_batch():
  """Rounded up or down, and right in the mean; in a random order."""
  keys = jax.random.split(KEY, 400)
  labels = jax.vmap(lambda key: noise(balanced=True).draw(key, 37, Prior(SHARES))[1])(keys)
  counts = np.stack([np.bincount(row, minlength=5) for row in np.asarray(labels)])
  exact = 37 * SHARES
  assert np.all((counts >= np.floor(exact)) & (counts <= np.ceil(exact)))
  np.testing.assert_allclose(counts.mean(0), exact, atol=0.1)
  places = np.asarray(labels == 0).mean(0)  # how often each place of the batch has class 0
  assert np.all(np.abs(places - 0.5) < 5 * math.sqrt(0.25 / 400))


def test_a_class_of_share_0_is_never_drawn():
  """Not even by points at the ends, or where rounding makes the sum of the shares less than 1."""
  shares = jnp.asarray([0.0, *[0.1] * 10, 0.0], jnp.float32)
  points = jnp.asarray([0.0, np.nextafter(1, 0, dtype=np.float32), 1.0], jnp.float32)
  assert prior._at(shares, points).tolist() == [1, 10, 10]


def test_samples_between_classes_lie_between_those_of_the_prior():
  y, weights = noise(between=3).draw_between(KEY, 4000, Prior(SHARES))
  np.testing.assert_allclose(np.bincount(y.reshape(-1), minlength=5) / y.size, SHARES, atol=0.02)
  assert y.shape == weights.shape == (4000, 3)


def test_members_of_a_sweep_draw_from_their_own_shares():
  shares = jnp.asarray([SHARES, SHARES[::-1]])
  labels = jax.vmap(lambda each: prior.drawn(KEY, each, (200,)))(shares)
  for row, each in zip(labels, shares, strict=True):
    assert np.array_equal(row, prior.drawn(KEY, each, (200,)))


# Given shares.


def test_given_shares_are_read(tmp_path):
  numbers = [4, 1, 0, 3]
  (tmp_path / "a.json").write_text(json.dumps(numbers))
  (tmp_path / "a.txt").write_text("4\n1\n0\n3\n")
  np.save(tmp_path / "a.npy", np.array(numbers, np.int64))
  for given in ("4,1, 0,3", *(str(tmp_path / f"a.{ending}") for ending in ("json", "txt", "npy"))):
    np.testing.assert_allclose(prior.read(given), [1, 0.25, 0, 0.75])
  np.testing.assert_allclose(prior.first(prior.read("4,1,0,3"), 2), [0.8, 0.2])


def test_shares_that_are_none_are_refused(tmp_path):
  (tmp_path / "word.json").write_text('["a", "b"]')
  (tmp_path / "broken.json").write_text("[1, 2")
  (tmp_path / "table.json").write_text("[[1, 2], [3, 4]]")
  np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
  for given, said in (
    ("", "is '', which cannot be read"),
    ("1,two", "is '1,two', which cannot be read"),
    (str(tmp_path / "none.npy"), "cannot be read .*No such file"),
    (str(tmp_path / "word.json"), "cannot be read .*not real numbers"),
    (str(tmp_path / "broken.json"), "cannot be read"),
    (str(tmp_path / "objects.npy"), "cannot be read"),
    (str(tmp_path / "table.json"), r"has the shape \(2, 2\)"),
    ("1,nan,2", "class 1 is not finite"),
    ("1,inf", "class 1 is not finite"),
    ("3,1,-2", "class 2 has -2; no share may be negative"),
    ("0,0", "all shares are 0"),
  ):
    with pytest.raises(Refusal, match=f"config.generator.prior_shares .*{said}") as refusal:
      prior.read(given)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
  ("method", "changes", "said"),
  [
    ("cpsc", {"prior": "given"}, "config.generator.prior_shares is '', which cannot be read"),
    ("cpsc", {"prior": "given", "prior_shares": "1,2"}, "has 2 numbers, and 'digits' has 10 classes"),
    ("cpsc", {"prior": "given", "prior_shares": "1," * 10 + "1"}, "has 11 numbers"),
    ("cpsc", {"prior": "given", "prior_shares": "0,0" + ",1" * 8, "label_limit": 2}, "but 0 for the first 2 classes"),
    ("cpsc", {"prior_shares": GIVEN}, "prior_shares is set, but config.generator.prior is 'uniform'"),
    ("cpsc", {"prior": "need", "conditional": False}, "labels have no effect on what method 'cpsc' generates"),
    ("dafl", {"prior": "teacher"}, "labels have no effect on what method 'dafl' generates"),
    ("rgal", {"prior": "need"}, "the term config.loss.generator.balance pulls towards equally many"),
    ("nayer", {"prior": "need"}, "method 'nayer' makes whole lists of all classes"),
    ("cpsc", {"prior": "need", "prior_floor": 0.0}, "prior_floor is 0.0; it must be greater than 0"),
    ("cpsc", {"prior": "need", "prior_momentum": 1.0}, "prior_momentum is 1.0"),
  ],
)
def test_priors_that_cannot_be_are_refused(method, changes, said):
  with pytest.raises(Refusal, match=said):
    resolved(method, **{f"generator.{key}": value for key, value in changes.items()})


class WithoutNorms(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    features = x.reshape(x.shape[0], -1)
    return Output(nn.Dense(10)(features), features)


def test_a_teacher_without_batch_norms_is_not_estimated():
  c = config_of("cpsc")
  c.generator.prior = "teacher"
  with pytest.raises(Refusal, match="'teacher', which is estimated by batch norms, and the teacher has none"):
    config.resolve(c, DIGITS, DEVICES, WithoutNorms())


# The teacher's shares.


class Gaussian(nn.Module):
  """A batch norm of one number of the image, whose output is normal over the training images, and a classifier."""

  @nn.compact
  def __call__(self, x, train):
    u = nn.Dense(1, use_bias=False)(x.reshape(x.shape[0], -1))
    u = nn.BatchNorm(use_running_average=not train)(u)
    return Output(nn.Dense(3)(u), features=u)


def test_the_estimate_where_it_is_known():
  """If u is N(m, s^2) over the training images and the classifier's probabilities are right, the shares are their mean.

  The running statistics are far from those of noise, as they are with real images.
  """
  m, s, w, b = 0.7, 1.9, np.array([[2.0, -1.0, 0.3]]), np.array([0.5, 1.5, -1.0])
  net = Gaussian()
  variables = net.init(KEY, jnp.zeros((2, 8, 8, 1)), train=False)
  variables["params"]["BatchNorm_0"] = {"scale": jnp.array([s]), "bias": jnp.array([m])}
  variables["params"]["Dense_1"] = {"kernel": jnp.asarray(w), "bias": jnp.asarray(b)}
  variables["batch_stats"]["BatchNorm_0"] = {"mean": jnp.array([40.0]), "var": jnp.array([90.0])}
  nodes, weights = np.polynomial.hermite_e.hermegauss(80)
  logits = (m + s * nodes)[:, None] * w + b
  odds = np.exp(logits - logits.max(1, keepdims=True))
  exact = (weights / weights.sum()) @ (odds / odds.sum(1, keepdims=True))
  found = prior.of_teacher(net, variables, KEY, (8, 8, 1))
  assert exact.min() < 0.05 and exact.max() > 0.5, "far from uniform"
  np.testing.assert_allclose(found, exact, atol=0.02)
  assert np.array_equal(found, prior.of_teacher(net, variables, KEY, (8, 8, 1))), "the same in a resumed run"


# Need.


def test_an_estimate_follows_samples_one_by_one():
  """Against a NumPy loop over samples for one class at a time; the order within a class does not matter here."""
  rng = np.random.default_rng(0)
  labels, disagree = rng.integers(0, 7, 50), rng.random(50) < 0.4  # classes 5 and 6 are not drawn
  before = Prior(jnp.full(5, 0.2), jnp.asarray(rng.random(5), jnp.float32))
  after = prior.followed(before, NEED, jax.nn.one_hot(labels, 5), jnp.asarray(disagree))
  for label in range(5):
    hits = disagree[labels == label]
    kept = 0.99 ** len(hits)
    want = kept * float(before.disagreement[label]) + (1 - kept) * hits.mean()
    assert float(after.disagreement[label]) == pytest.approx(want, rel=1e-5)
  want = 0.1 + 0.5 * np.asarray(after.disagreement) / np.sum(after.disagreement)
  np.testing.assert_allclose(after.shares, want, rtol=1e-5)


def outputs_that_disagree_on(labels, wrong):
  """The teacher gives every sample its label, and the student another one to those of class `wrong`."""
  teacher = 9 * jax.nn.one_hot(labels, 10)
  student = 9 * jax.nn.one_hot(jnp.where(labels == wrong, (labels + 1) % 10, labels), 10)
  return {"teacher_logits": teacher, "student": Output(student)}


def test_labels_move_to_the_class_that_the_student_gets_wrong():
  setup, _, state = start("cpsc", **{"generator.prior": "need"})
  np.testing.assert_allclose(state.prior.shares, 0.1)
  step = jax.jit(
    lambda state, labels: setup.method.learned(state, Batch(None, labels), outputs_that_disagree_on(labels, 3))
  )
  history = []
  for key in jax.random.split(KEY, 150):
    _, labels = setup.method.noise.draw(key, 64, state.prior)
    state = step(state, labels)
    history.append(np.asarray(state.prior.shares))
  history = np.array(history)
  assert np.all(history.min(1) >= 0.05 - 1e-6), "no class is forgotten"
  np.testing.assert_allclose(history.sum(1), 1, rtol=1e-5)
  assert history[-1, 3] > 0.52 and np.delete(history[-1], 3).max() < 0.06
  _, labels = setup.method.noise.draw(KEY, 1000, state.prior)
  assert np.mean(np.asarray(labels) == 3) > 0.45


def test_a_sample_between_classes_counts_for_each():
  setup, _, state = start("cpsc", **{"generator.prior": "need"})
  targets = jnp.zeros((2, 10)).at[0, 2].set(0.75).at[0, 5].set(0.25).at[1, 8].set(1.0)
  labels = jnp.array([2, 8])
  batch = Batch(None, labels, targets)
  after = setup.method.learned(state, batch, outputs_that_disagree_on(labels, None)).prior.disagreement
  want = np.ones(10)
  want[[2, 5, 8]] = 0.99 ** np.array([0.75, 0.25, 1.0])
  np.testing.assert_allclose(after, want, rtol=1e-6)


def iterations(setup, teacher, state, number=2):
  return algorithm.compile_epoch(setup, number)(state, teacher)


def test_an_epoch_by_need_resumes_exactly_in_one_program(tmp_path):
  """With balanced labels and some between classes; what is in the state is what it began with, moved."""
  options = {"generator.prior": "need", "generator.labels": "balanced", "generator.between_share": 0.25}
  setup, teacher, state = start.__wrapped__("cpsc", **options)
  like = jax.tree.map(jnp.copy, state)
  epoch = algorithm.compile_epoch(setup, 2)
  first, _ = epoch(state, teacher)
  assert np.ptp(first.prior.shares) > 1e-4 and np.all(np.asarray(first.prior.disagreement) <= 1)
  writer = checkpoint.Checkpointer(tmp_path)
  writer.save(1, {"state": first}, {})
  writer.close()
  second, _ = epoch(first, teacher)
  restored = checkpoint.Checkpointer(tmp_path).restore({"state": like})[0]["state"]
  again, _ = epoch(restored, teacher)
  assert epoch._cache_size() == 1 and equal(on_host(second), on_host(again))


@pytest.mark.slow
def test_members_of_a_sweep_follow_their_own_students():
  setup, teacher, state = start("cpsc", **{"generator.prior": "need"})
  other = state.replace(key=jax.random.key(9))
  stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), state, other)
  epoch = algorithm.epoch(setup, 2)
  together, _ = jax.jit(jax.vmap(epoch, in_axes=(0, None)))(stacked, teacher)
  for place, alone in enumerate((state, other)):
    after, _ = jax.jit(epoch)(alone, teacher)
    np.testing.assert_allclose(together.prior.shares[place], after.prior.shares, atol=1e-4)
  assert not np.array_equal(*together.prior.shares)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["given", "need"])
@pytest.mark.parametrize("method", ["cpsc", "rgal", "deepinversion", "cmi", "fast"])
def test_every_method_that_has_labels_draws_them_so(method, kind):
  changes = {"generator.prior": kind, "generator.prior_shares": GIVEN if kind == "given" else ""}
  changes |= {"rgal": {"loss.generator.balance": 0.0}, "fast": {"episodes.warmup": 0}}.get(method, {})
  setup, teacher, state = start.__wrapped__(method, **changes)
  before = np.asarray(state.prior.shares)
  if kind == "need":  # not what it begins with, which nets that never agree would leave as it is
    state = state.with_prior(state.prior.replace(disagreement=jnp.full(10, 0.5)))
  state, _ = iterations(setup, teacher, state)
  assert np.array_equal(before, state.prior.shares) == (kind == "given")
  pool = setup.method.pool(state)
  if kind == "given" and pool is not None:
    assert not np.isin(np.asarray(pool.arrays["labels"])[: int(pool.count)], [1, 4]).any()


def test_a_limit_of_labels_cuts_the_shares():
  *_, state = start("cpsc", **{"generator.prior": "given", "generator.prior_shares": GIVEN, "generator.label_limit": 3})
  np.testing.assert_allclose(state.prior.shares, [5 / 8, 0, 3 / 8])


@pytest.mark.slow
def test_a_phase_of_new_classes_asks_for_old_ones_alone():
  """Four old classes of six: the real images of new classes in a batch do not count."""
  c = a_phase()
  c.generator.prior, c.loss.generator.even = "need", 0.0
  c = config.resolve(c, DIGITS, DEVICES)
  net = nets.classifier("wrn_10_1", all_tasks.of(c).known(c, DIGITS))
  card = {"mean": [0.0], "std": [1.0]}
  setup = all_tasks.of(c).with_real(c, experiment.build(c, DIGITS, net, card, DEVICES), 50, card)
  teacher = nets.init(net, KEY, jnp.zeros((2, 8, 8, 1)))
  images = (np.arange(50 * 64) % 251).reshape(50, 8, 8, 1).astype(np.uint8)
  split = datasets.Split(images, (4 + np.arange(50) % 6).astype(np.int32))
  state = experiment.initial_state(c, setup, KEY, (8, 8, 1), teacher)
  data = {"new": mesh.replicate(split, DEVICES), "kept": None}
  state, _ = algorithm.compile_epoch(setup, 2, real_data=True)(state, mesh.replicate(teacher, DEVICES), data)
  assert state.prior.shares.shape == (4,) and np.ptp(state.prior.disagreement) > 0


@pytest.mark.parametrize("known", [0, 4])
def test_given_shares_of_a_phase_are_those_of_its_old_classes(known):
  c = a_phase()
  c.incremental.known, c.loss.generator.even = known, 0.0
  c.generator.prior, c.generator.prior_shares = "given", GIVEN
  shares = config.prior_shares(c, DIGITS)
  want = np.array([5, 0, 3, 2, 0, 1, 1, 1, 1, 1][: known or 10])
  np.testing.assert_allclose(shares, want / want.sum())


@pytest.mark.slow
def test_a_quantised_student_has_needs_too():
  setup, teacher, state = start_quantised(quantised(generator__prior="need", generator__warmup_epochs=0))
  state, _ = iterations(setup, teacher, state)
  assert np.ptp(state.prior.shares) > 0


def test_control_arms_without_a_generator_have_no_prior():
  *_, state = start("cpsc", **{"generator.prior": "need", "arm": "gaussian_noise"})
  assert state.prior is None


# A long tail, from the teacher to the results.


@pytest.mark.slow
def test_a_run_on_a_long_tail(tmp_path, digits_dir, capsys):
  """The estimate is nearer to the truth than uniform shares, and the thirds' accuracies are NumPy's.

  The teacher says how long its tail was wherever it is used, and another tail in the same folder is refused.
  """
  flags = ["--config.dataset.imbalance=25", "--config.generator.prior=teacher", "--config.teacher.epochs=12"]
  flags += ["--config.teacher.batch_size=64", "--config.schedule.iterations=1"]
  assert main(command(tmp_path / "w", digits_dir, *flags)) == 0
  results = json.loads((tmp_path / "w" / "results.json").read_text())
  tail = results["long_tail"]
  assert tail["images_per_class"][0] == 133 and tail["images_per_class"][-1] == 5
  assert tail["classes"] == {"head": [0, 1, 2, 3], "middle": [4, 5, 6], "tail": [7, 8, 9]}

  test = datasets.find("digits", digits_dir).load_evaluation("test")
  x, labels = datasets.normalise(test.images, DIGITS.mean, DIGITS.std), np.asarray(test.labels)
  for which, told in (("teacher", tail["teacher"]), ("student", tail["student"]["last"])):
    found = saved.load(tmp_path / "w" / which)
    right = np.asarray(found.net.apply(found.variables, x, train=False).logits).argmax(-1) == labels
    for third, classes in tail["classes"].items():
      assert told[third] == pytest.approx(right[np.isin(labels, classes)].mean(), abs=1e-6)
  assert results["teacher"]["accuracy"] == pytest.approx(
    sum(tail["teacher"][third] * np.isin(labels, of).sum() for third, of in tail["classes"].items()) / 454, abs=1e-6
  )

  shares, truth = np.array(results["prior"]["shares"]), np.array(tail["images_per_class"])
  assert results["prior"]["kind"] == "teacher" and shares.sum() == pytest.approx(1)
  assert np.abs(shares - truth / truth.sum()).sum() < 0.75 * np.abs(0.1 - truth / truth.sum()).sum()
  page = (tmp_path / "w" / "report.html").read_text()
  assert "student, tail classes" in page and "share of labels" in page

  capsys.readouterr()
  assert main(command(tmp_path / "w", digits_dir, *flags, "--config.dataset.imbalance=20")) == 2
  assert "differs in dataset.imbalance" in capsys.readouterr().err
  given = f"--config.teacher.checkpoint={tmp_path / 'w' / 'teacher'}"
  assert main(command(tmp_path / "other", digits_dir, given)) == 0
  other = json.loads((tmp_path / "other" / "results.json").read_text())
  assert other["long_tail"]["images_per_class"] == tail["images_per_class"] and "prior" not in other


def test_tails_that_cannot_be_are_refused_before_any_work(tmp_path, digits_dir, capsys):
  for flag, said in (
    ("--config.dataset.imbalance=0.5", "config.dataset.imbalance is 0.5; it must be at least 1"),
    ("--config.dataset.imbalance=200", "leaves class 9 without a training image: the first class has 133"),
    ("--config.dataset.imbalance=30", "more than the "),
  ):
    batch = ["--config.teacher.batch_size=600"] if "30" in flag else []
    assert main(command(tmp_path / "w", digits_dir, flag, *batch)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
