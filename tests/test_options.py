"""Options that the configs of other methods need, against PyTorch or their formulas."""

import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpsc_jax.configs import default
from flax.traverse_util import flatten_dict, unflatten_dict
from parity import assert_close
from test_algorithm import equal, make_setup
from test_methods import DIGITS, resolved, start

from cpsc_jax import algorithm, datasets, experiment, losses, nets, optim, streams
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import make_mesh
from cpsc_jax.nets.generators import Form
from cpsc_jax.nets.layers import CategoricalBatchNorm
from cpsc_jax.setup import Noise
from cpsc_jax.streams import Stream


def logits(seed, shape=(7, 5), scale=3.0):
  return scale * jax.random.normal(jax.random.key(seed), shape)


def test_mixture_divergence_equals_pytorch():
  """The form of DeepInversion's code: KL of clamped probabilities to their clamped mixture."""
  torch = pytest.importorskip("torch")
  from torch.nn import functional as F

  t, s = logits(0, scale=12.0), logits(1, scale=12.0)
  q, p = (torch.softmax(torch.tensor(np.asarray(x)) / 3.0, dim=1) for x in (t, s))
  m = torch.clamp((p + q) / 2, 0.01, 0.99)
  p, q = torch.clamp(p, 0.01, 0.99), torch.clamp(q, 0.01, 0.99)
  halves = [0.5 * F.kl_div(x.log(), m, reduction="batchmean") for x in (p, q)]
  assert float(jnp.mean(losses.mixture_divergence(t, s))) == pytest.approx(sum(halves).item(), rel=1e-5)
  assert float(jnp.mean(losses.mixture_divergence(t, t))) == pytest.approx(0.0, abs=1e-6)


def test_standardised_logits():
  x = np.asarray(losses.standardised(logits(0) + 4.0))
  np.testing.assert_allclose(x.mean(1), 0, atol=1e-6)
  np.testing.assert_allclose(x.std(1), 1, rtol=1e-5)
  assert np.isfinite(jax.grad(lambda x: jnp.sum(losses.standardised(x)))(jnp.ones((2, 3)))).all()


def test_the_norm_of_nothing_has_no_gradient():
  """As PyTorch's: 0 where a batch's statistics are exactly the stored ones."""
  moments = {"layer": {"mean": jnp.ones(3), "var": jnp.ones(3)}}

  def loss(mean):
    seen = {"layer": {"mean": mean, "var": jnp.ones(3)}}
    return losses.bn_statistics(losses.Statistics(seen, moments))

  assert np.array_equal(jax.grad(loss)(jnp.ones(3)), np.zeros(3))
  np.testing.assert_allclose(jax.grad(loss)(jnp.array([1.0, 4.0, 5.0])), [0, 0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_adam_with_decay_and_clipping_equals_pytorch(clip):
  torch = pytest.importorskip("torch")
  config = default.get_config()
  c = config.student
  with config.unlocked():
    c.optimiser, c.lr, c.weight_decay, c.clip = "adam", 0.01, 0.1, clip
    c.schedule, c.milestones, c.decay = "steps", (2, 3), 0.5  # in the second and the third epoch
  tx = optim.optimiser(c, 2, 4)
  rng = np.random.default_rng(0)
  start, grads = rng.normal(size=(3, 4)).astype("f"), rng.normal(size=(6, 3, 4)).astype("f")
  theirs = torch.nn.Parameter(torch.tensor(start))
  adam = torch.optim.Adam([theirs], lr=0.01, betas=(0.9, 0.999), weight_decay=0.1)
  schedule = torch.optim.lr_scheduler.MultiStepLR(adam, [1, 2], 0.5)
  params, state = {"w": jnp.asarray(start)}, tx.init({"w": jnp.asarray(start)})
  for number, grad in enumerate(grads):
    updates, state = tx.update({"w": jnp.asarray(grad)}, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    theirs.grad = torch.tensor(grad)
    if clip:
      torch.nn.utils.clip_grad_norm_([theirs], clip)
    adam.step()
    if number % 2:
      schedule.step()
    np.testing.assert_allclose(params["w"], theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_learning_rates_follow_the_root_of_the_batch(optimiser):
  """But for a generator that starts anew, with a batch of its own."""
  params, grads = {"w": jnp.zeros(2)}, {"w": jnp.ones(2)}

  def first_updates(batch_size, lr_batch_size):
    c = default.get_config()
    c.student.optimiser, c.student.warmup_epochs = optimiser, 0
    c.schedule.batch_size, c.schedule.lr_batch_size = batch_size, lr_batch_size
    chains = optim.student_optimiser(c, 5), optim.generator_optimiser(c, 5), optim.generator_optimiser(c, 5, 1)
    return [float(tx.update(grads, tx.init(params), params)[0]["w"][0]) for tx in chains]

  plain = first_updates(1024, 0)
  assert first_updates(256, 256) == plain and first_updates(256, 0) == plain
  factors = np.divide(first_updates(1024, 256), plain)
  np.testing.assert_allclose(factors, [2, 2, 1], rtol=1e-6)


def test_a_cosine_may_end_above_zero():
  rate = optim.warmup_cosine(0.2, 0, 100, 2e-4)
  assert float(rate(0)) == pytest.approx(0.2) and float(rate(100)) == pytest.approx(2e-4)
  assert float(rate(50)) == pytest.approx((0.2 + 2e-4) / 2)


@pytest.mark.parametrize("name", ["cifar", "dcgan"])
def test_a_sigmoid_makes_normalised_pixels(name):
  mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
  net = nets.generator(name, 1, 16, 3, 8, form=Form("sigmoid", 1e-5, "normal", mean, std))
  z, y = jax.random.normal(jax.random.key(0), (4, 6)), jnp.zeros(4, jnp.int32)
  variables = nets.init(net, jax.random.key(1), z, y)
  x, _ = nets.forward(net, variables, z, y, train=True)
  pixels = np.asarray(x) * std + np.asarray(mean)
  assert x.shape == (4, 16, 16, 3) and 0 <= pixels.min() < pixels.max() <= 1
  kernel, scale = variables["params"]["conv1"]["kernel"], variables["params"]["cbn0"]["scale"]
  assert float(jnp.std(kernel)) == pytest.approx(0.02, rel=0.1)
  assert float(jnp.mean(scale)) == pytest.approx(1.0, abs=0.02) and float(jnp.std(scale)) > 0
  published = nets.generator(name, 1, 16, 3, 8)
  assert jax.tree.structure(nets.init(published, jax.random.key(1), z, y)["params"]["conv1"]) == jax.tree.structure(
    variables["params"]["conv1"]
  )


def test_a_batch_is_jittered_as_one():
  x = jnp.arange(2 * 5 * 5, dtype=jnp.float32).reshape(2, 5, 5, 1)
  seen = set()
  for seed in range(40):
    got = np.asarray(datasets.jitter(jax.random.key(seed), x, 1, True))
    shifts = [
      (dy, dx, flip)
      for dy in (-1, 0, 1)
      for dx in (-1, 0, 1)
      for flip in (False, True)
      if np.array_equal(got, np.roll(x, (dy, dx), (1, 2))[:, :, :: -1 if flip else 1])
    ]
    assert len(shifts) == 1
    seen.add(shifts[0])
  assert len(seen) > 12


def test_balanced_labels():
  setup, _, _ = make_setup(generator__labels="balanced")
  _, y = setup.method.noise.draw(jax.random.key(0), 30)
  assert np.bincount(np.asarray(y), minlength=10).tolist() == [3] * 10
  _, again = setup.method.noise.draw(jax.random.key(1), 30)
  assert not np.array_equal(y, again)


def test_a_student_starts_the_same_whatever_is_put_around_it():
  """Neither a feature head nor projections change the initial weights of the net inside."""
  x, key = jnp.zeros((2, 8, 8, 3)), jax.random.key(3)
  net = nets.classifier("wrn_10_1", 10)
  plain = nets.init(net, key, x)
  around = nets.StageProjections(nets.FeatureHead(net, 128), (16, 32, 64))
  wrapped = nets.init(around, key, x)
  inner = {name: wrapped[name]["net"]["net"] for name in plain}
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(inner), strict=True):
    np.testing.assert_array_equal(a, b)
  assert jax.tree.structure(wrapped["params"]) == jax.tree.structure(
    jax.eval_shape(lambda: around.init(key, x, train=False))["params"]
  )


def test_pytorchs_initial_kernels():
  x, net = jnp.zeros((2, 8, 8, 3)), nets.classifier("resnet18", 10)
  kernels, published = (nets.init(net, jax.random.key(0), x, kernels=k)["params"] for k in ("kaiming", "torch"))
  kernel = np.asarray(published["layer4_0"]["conv2"]["kernel"] if "layer4_0" in published else _deepest(published))
  bound = (9 * 512) ** -0.5
  assert np.abs(kernel).max() <= bound and kernel.std() == pytest.approx(bound / 3**0.5, rel=0.02)
  assert jax.tree.structure(kernels) == jax.tree.structure(published)


def _deepest(params):
  """A kernel of 512 inputs."""
  return next(leaf for leaf in jax.tree.leaves(params) if leaf.ndim == 4 and leaf.shape[:3] == (3, 3, 512))


def test_a_student_inherits_layers_of_the_same_name_and_shape():
  setup, _, _ = make_setup(student="wrn_10_1", teacher="wrn_16_1")
  teacher = nets.init(nets.classifier("wrn_16_1", 10), jax.random.key(9), jnp.zeros((2, 8, 8, 3)))
  student = nets.init(setup.student.net, jax.random.key(1), jnp.zeros((2, 8, 8, 3)))
  merged, taken = nets.inherited(student, teacher)
  assert taken == nets.count_parameters(student["params"]), "all of a shorter net's layers are in the longer one"
  assert_close(merged["params"]["conv1"]["kernel"], teacher["params"]["conv1"]["kernel"], 0)
  assert jax.tree.structure(merged) == jax.tree.structure(student)
  other = nets.init(nets.classifier("vgg11", 10), jax.random.key(9), jnp.zeros((2, 8, 8, 3)))
  assert nets.inherited(student, other)[1] == 0
  head = nets.FeatureHead(nets.classifier("wrn_10_1", 10), 128)
  inside = nets.init(head, jax.random.key(1), jnp.zeros((2, 8, 8, 3)))
  merged, taken = nets.inherited(inside, teacher)
  assert taken == nets.count_parameters(student["params"])
  assert jax.tree.structure(merged) == jax.tree.structure(inside)


def test_a_narrower_student_inherits_a_part_of_the_network():
  """Of a net in which only every second channel does anything, half the width computes the same."""
  wide, narrow = nets.classifier("wrn_10_4", 10), nets.classifier("wrn_10_2", 10)
  images = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  variables = nets.init(wide, jax.random.key(1), images)
  student = nets.init(narrow, jax.random.key(2), images)
  flat = flatten_dict(variables)
  for path, leaf in flat.items():  # the stem and the first norm are equally wide in both
    if path[-1] == "kernel" and leaf.shape[-2] > 16:
      flat[path] = leaf.at[..., 1::2, :].set(0)
  variables = unflatten_dict(flat)
  merged, taken = nets.inherited(student, variables)
  assert taken == nets.count_parameters(student["params"])
  assert jax.tree.map(jnp.shape, merged) == jax.tree.map(jnp.shape, student)
  ours, theirs = (nets.forward(n, v, images, train=False)[0] for n, v in ((narrow, merged), (wide, variables)))
  assert_close(ours.logits, theirs.logits, 1e-5)
  assert nets.inherited(variables, student)[1] == student["params"]["conv1"]["kernel"].size + 2 * 16, (
    "a wider student takes what is equal, the stem and the norm behind it"
  )


def test_inheriting_nothing_is_said(capsys):
  setup, _, _ = make_setup()
  config = default.get_config()
  with config.unlocked():
    config.student.inherit = True
  other = nets.init(nets.classifier("vgg11", 10), jax.random.key(9), jnp.zeros((2, 8, 8, 3)))
  experiment.initial_state(config, setup, jax.random.key(0), (8, 8, 3), other)
  assert "parameters start as the teacher's: the two nets have no layer of the same name and kernel" in "".join(
    capsys.readouterr()
  )


# The generator's warm-up.


@pytest.mark.parametrize("method", ["cpsc", "fast"])
def test_the_generator_may_learn_alone_at_first(method):
  changes = {"generator.warmup_epochs": 1, "schedule.epochs": 2, "schedule.iterations": 2}
  if method == "fast":
    changes["episodes.warmup"] = 0
  setup, teacher, before = start(method, **changes)
  epoch = algorithm.compile_epoch(setup, 2)
  kept = jax.device_get(before)
  alone, losses = epoch(before, teacher)
  alone = jax.device_get(alone)
  assert not equal(alone.generator.params, kept.generator.params) and equal(alone.student.params, kept.student.params)
  assert jax.tree.all(jax.tree.map(lambda x: np.all(x == 0), losses["student"].terms))
  both, _ = epoch(jax.device_put(alone, jax.tree.map(lambda x: x.sharding, before)), teacher)
  assert not equal(both.student.params, alone.student.params)


def test_arms_without_a_generator_wait_as_long():
  c = resolved(
    "fast", **{"arm": "gaussian_noise", "schedule.epochs": 3, "episodes.warmup": 4, "schedule.iterations": 2}
  )
  net = nets.classifier(c.teacher.net, 10)
  setup = experiment.build(c, DIGITS, net, {"mean": DIGITS.mean, "std": DIGITS.std}, make_mesh())
  waits = [bool(setup.method.waits(types.SimpleNamespace(step=jnp.asarray(step)))) for step in range(6)]
  assert waits == [True] * 4 + [False] * 2


# Samples between classes, kept logits, the teacher's classifier.


@pytest.mark.parametrize("net", ["cifar", "dcgan"])
def test_a_share_of_the_classes_mixes_their_norms(net):
  """One-hot shares are the labels themselves; others lie on the line between two rows of every norm."""
  net = nets.generator(net, 4, 16, 1, 4)
  z, labels = jax.random.normal(jax.random.key(0), (6, 5)), jnp.array([0, 1, 2, 3, 0, 1])
  variables = nets.init(net, jax.random.key(1), z, labels)
  params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(2), a.shape), variables["params"])
  variables = {**variables, "params": params}
  want, _ = nets.forward(net, variables, z, labels, train=True)
  got, _ = nets.forward(net, variables, z, jax.nn.one_hot(labels, 4), train=True)
  assert_close(got, want, 1e-5)

  norm = CategoricalBatchNorm(num_classes=4)
  tables = {name: params["cbn0"][name] for name in ("scale", "bias")}
  x = jax.random.normal(jax.random.key(3), (6, 3, 3, tables["scale"].shape[-1]))
  shares = jnp.array([[0.25, 0.75, 0, 0]] * 6)
  mixed, _ = norm.apply({"params": tables}, x, shares, True, mutable=["batch_stats"])
  ends = [norm.apply({"params": tables}, x, jnp.full(6, i), True, mutable=["batch_stats"])[0] for i in (0, 1)]
  assert_close(mixed, 0.25 * ends[0] + 0.75 * ends[1], 1e-5)


@pytest.mark.parametrize("average", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
def test_a_share_of_the_students_samples_lies_between_classes(average):
  changes = {"generator.between_share": 0.25, "generator.between": 3, "generator.ema": average}
  setup, teacher, state = start("cpsc", **changes)
  if average:
    state = state.replace(memory={"average": state.generator.variables})
  _, batch = jax.jit(setup.method.source)(state, jax.random.key(4), None)
  targets, labels = np.asarray(batch.targets), np.asarray(batch.labels)
  assert targets.shape == (32, 10)
  np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
  between = targets.max(1) < 1 - 1e-6
  assert 6 <= between.sum() <= 8 and (np.count_nonzero(targets, axis=1) <= 3).all()
  assert np.array_equal(targets[~between].argmax(1), labels[~between])
  _, found = jax.jit(algorithm.student_step(setup, teacher))(state, jax.random.key(5))
  assert all(np.isfinite(value) for value in found.terms.values())


def test_points_between_classes():
  noise = Noise(4, 10, True, make_mesh(), between=3)
  y, weights = noise.draw_between(jax.random.key(0), 500)
  assert y.shape == weights.shape == (500, 3) and y.dtype == jnp.int32 and np.unique(y).size == 10
  np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
  assert np.all(np.diff(weights, axis=1) <= 0)


def test_cross_entropy_of_shares_equals_pytorch():
  torch = pytest.importorskip("torch")
  shares = jax.nn.softmax(logits(3))
  given = (torch.tensor(np.asarray(x)) for x in (logits(0), shares))
  theirs = torch.nn.functional.cross_entropy(*given, reduction="none")
  assert_close(losses.cross_entropy(logits(0), shares), theirs.numpy(), 1e-5)


KEPT = {"pool.logits": True, "student.crop_pad": 1, "loss.student.channel": 0.0, "loss.student.triplet": 0.0}


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "uint8"])
def test_kept_logits_are_the_teachers_on_the_kept_view(dtype):
  """Every image is stored as one crop of itself, and the student's step takes neither a crop nor the teacher."""
  setup, teacher, state = start("rgal", **KEPT, **{"pool.dtype": dtype})
  state = jax.jit(setup.method.begin)(state, jax.random.key(1))
  before = np.asarray(state.memory["best"]["images"])
  state = setup.method.keep(state, jax.random.key(2), algorithm.teach_with(setup, teacher))
  _, batch = jax.jit(setup.method.source)(state, jax.random.key(3), None)
  want = setup.teacher.apply(teacher, batch.images, train=False).logits
  np.testing.assert_allclose(batch.logits, want, rtol=2e-3, atol=2e-3)  # float16 holds eleven bits
  held = np.asarray(state.memory["pool"].arrays["images"][0], np.float32)
  assert held.shape == before.shape and not np.allclose(held, before, atol=0.1)

  nothing = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), teacher)
  step = jax.jit(algorithm.student_step(setup, nothing))
  key = jax.random.key(3)
  _, found = step(state, key)
  _, batch = setup.method.source(state, streams.key(key, Stream.SOURCE), None)
  update = jax.jit(lambda batch: algorithm.student_update(setup, teacher, state, batch, key)[1].losses.total)
  assert float(found.total) == pytest.approx(float(update(batch.replace(logits=None))), rel=5e-3)


def test_the_teachers_classifier_is_kept():
  """The student starts with it and ends with it, whatever weight decay does to the other layers."""
  changes = {"student.classifier": "teacher", "loss.student.features": 1.0, "student.crop_pad": 0}
  setup, teacher, _ = start("cpsc", **changes)
  c = resolved("cpsc", **changes)
  state = experiment.initial_state(c, setup, jax.random.key(0), DIGITS.image_shape, teacher)
  assert equal(state.student.params["fc"], teacher["params"]["fc"])
  after, found = jax.jit(algorithm.student_step(setup, teacher))(state, jax.random.key(1))
  assert equal(after.student.params["fc"], teacher["params"]["fc"])
  assert not equal(after.student.params["conv1"], state.student.params["conv1"])
  _, batch = setup.method.source(state, streams.key(jax.random.key(1), Stream.SOURCE), None)
  t = setup.teacher.apply(teacher, batch.images, train=False).pooled
  s, _ = nets.forward(setup.student.net, state.student.variables, batch.images, train=True)
  assert float(found.terms["features"]) == pytest.approx(float(np.mean((np.asarray(t) - s.pooled) ** 2)), rel=1e-4)


@pytest.mark.parametrize(
  "changes", [{"student.inherit": True}, pytest.param({"student.classifier": "teacher"}, marks=pytest.mark.slow)]
)
def test_what_a_student_takes_over_is_a_copy(changes):
  """An epoch consumes its state and leaves the teacher as it was."""
  setup, teacher, _ = start("cpsc", **changes)
  before = jax.device_get(teacher)
  state = experiment.initial_state(resolved("cpsc", **changes), setup, jax.random.key(0), DIGITS.image_shape, teacher)
  state, _ = algorithm.compile_epoch(setup, 1)(state, teacher)
  assert equal(jax.device_get(teacher), before) and not equal(state.student.params["conv1"], before["params"]["conv1"])


@pytest.mark.parametrize(
  ("method", "changes", "said"),
  [
    ("cpsc", {"generator.between_share": 1.0}, "config.generator.between_share is 1.0; it must be at least 0 and less"),
    ("cpsc", {"generator.between_share": 0.5, "generator.conditional": False}, "its norms carry no class"),
    ("cpsc", {"generator.between_share": 0.5, "pool.replay_share": 0.5}, "a replayed image has one class"),
    ("cpsc", {"generator.between_share": 0.5, "generator.between": 1}, "config.generator.between is 1; it must be at"),
    ("rgal", {"generator.between_share": 0.5}, "method 'rgal' has no generator whose norms carry the class"),
    ("cpsc", {"pool.logits": True}, "method 'cpsc' learns from fresh samples"),
    ("rgal", {"pool.logits": True}, "config.loss.student.channel needs more; set one of"),
    ("rgal", {**KEPT, "pool.fresh_share": 0.5}, "of one view of each image in the pool"),
    (
      "cpsc",
      {"student.classifier": "teacher", "student.net": "wrn_10_2"},
      "config.student.classifier is teacher, which",
    ),
    ("cpsc", {"loss.student.features": 2.0, "student.net": "wrn_10_2"}, "config.loss.student.features is 2.0, which"),
  ],
)
def test_options_that_do_not_go_together_are_refused(method, changes, said):
  with pytest.raises(Refusal, match=re.escape(said)):
    resolved(method, **changes)
