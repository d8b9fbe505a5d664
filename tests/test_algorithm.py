"""What must hold of the algorithm, whatever the figures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from cpsc_jax.configs import default
from parity import assert_close, assert_trees_close, with_weights

from cpsc_jax import algorithm, datasets, experiment, initial, nets
from cpsc_jax.config import resolve
from cpsc_jax.mesh import make_mesh, replicated
from cpsc_jax.setup import LATENTS, Method, Player, Setup, Term
from cpsc_jax.state import Batch, Losses

SHAPE = (8, 8, 3)
CARD = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
KEY = jax.random.key(1)


@functools.cache
def make_setup(student="wrn_10_1", teacher="wrn_10_1", **changes):
  """(setup, teacher variables, state); changes are of the config, with __ for a dot."""
  with jax.enable_x64(False):  # what is kept must not depend on who asks first
    config = default.get_config("smoke")
    config.schedule.batch_size = 12
    config.generator.width, config.generator.latent_dim = 4, 6
    config.generator.steps, config.student.steps = 2, 3
    config.student.net = student
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    mesh, spec = make_mesh(), datasets.DATASETS["cifar10"]
    config = ml_collections.ConfigDict(resolve(config, spec, mesh).to_dict())
    spec = dataclasses.replace(spec, image_size=8)
    setup = experiment.build(config, spec, nets.classifier(teacher, 10), CARD, mesh)
    teacher_variables = nets.init(setup.teacher, jax.random.key(5), jnp.zeros((2, *SHAPE)))
    state = initial.state(setup, jax.random.key(0), SHAPE)
    return setup, *jax.device_put((teacher_variables, state), replicated(mesh))


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def copied(tree):
  return jax.tree.map(jnp.copy, tree)


def one_generator_step(setup, teacher, state):
  return jax.jit(algorithm.generator_step(setup, teacher))(state, KEY)


def one_student_step(setup, teacher, state):
  return jax.jit(algorithm.student_step(setup, teacher))(state, KEY)


def test_an_iteration_is_the_papers_order():
  """begin, n_g generator updates, keep, n_s student updates, each with a key of its own; the counter moves once."""

  @functools.partial(jax.tree_util.register_dataclass, data_fields=["key", "step", "calls"], meta_fields=[])
  @dataclasses.dataclass
  class Trace:
    key: jax.Array
    step: jax.Array
    calls: jax.Array

    def tick(self):
      return dataclasses.replace(self, step=self.step + 1)

  def note(state, who):
    return dataclasses.replace(state, calls=jnp.append(state.calls[1:], who))

  def step(who):
    def run(state, key):
      return note(state, who), jax.random.key_data(key)[-1]

    return run

  method = Method({}, {}, source=None, begin=lambda state, key: note(state, 1), keep=lambda state, *_: note(state, 3))
  player = functools.partial(Player, net=None, optimiser=None)
  setup = Setup(player(steps=3), method, None, {}, generator=player(steps=2))
  iteration = algorithm.iteration(setup, step(2), step(4))
  state = Trace(jax.random.key(0), jnp.int32(0), jnp.zeros(7, int))
  state, keys = iteration(state, None)
  assert state.calls.tolist() == [1, 2, 2, 3, 4, 4, 4] and state.step == 1
  again, more = iteration(state, None)
  drawn = np.concatenate([keys["generator"], keys["student"], more["generator"], more["student"]])
  assert len(set(drawn.tolist())) == 10, "no key is used twice"
  assert np.array_equal(jax.random.key_data(again.key), jax.random.key_data(state.key))


def test_generator_step_moves_the_generator_alone():
  setup, teacher, state = make_setup()
  after, terms = one_generator_step(setup, teacher, state)
  assert equal(after.student, state.student)
  assert not equal(after.generator.params, state.generator.params)
  assert not equal(after.generator.batch_stats, state.generator.batch_stats)
  assert isinstance(terms, Losses) and set(terms.terms) == {"adversarial", "ikd", "bn", "scl", "ce"}


def test_student_step_moves_the_student_alone():
  setup, teacher, state = make_setup()
  after, terms = one_student_step(setup, teacher, state)
  assert equal(after.generator, state.generator)
  assert not equal(after.student.params, state.student.params)
  assert not equal(after.student.batch_stats, state.student.batch_stats)
  assert isinstance(terms, Losses) and set(terms.terms) == {"kd", "l2", "ce"}


def test_total_is_the_weighted_sum():
  setup, teacher, state = make_setup()
  for step, player in ((one_generator_step, "generator"), (one_student_step, "student")):
    _, losses = step(setup, teacher, state)
    want = sum(setup.weights[player][name] * float(value) for name, value in losses.terms.items())
    assert float(losses.total) == pytest.approx(want, rel=1e-5)


def test_the_step_takes_the_mean_of_what_is_per_sample():
  terms = {"each": Term(lambda v: v), "coupled": Term(lambda v: jnp.max(v), couples_batch=True)}
  losses = algorithm.weighted_sum(terms, {"each": 2.0, "coupled": 3.0}, jnp.array([1.0, 2.0, 6.0]))
  assert float(losses.terms["each"]) == 3 and float(losses.terms["coupled"]) == 6 and float(losses.total) == 24


def test_terms_of_weight_zero_are_neither_computed_nor_logged():
  setup, teacher, state = make_setup(loss__generator__scl=0.0, loss__student__ce=0.0)
  assert set(setup.method.generator_terms) == {"adversarial", "ikd", "bn", "ce"} == set(state.hyper.generator.terms)
  assert set(one_student_step(setup, teacher, state)[1].terms) == {"kd", "l2"}


def test_epoch_is_one_program_and_deterministic():
  setup, teacher, state = make_setup()
  kept = jax.tree.map(np.asarray, teacher)
  epoch = algorithm.compile_epoch(setup, iterations=2)
  a, losses = epoch(copied(state), teacher)
  assert losses["generator"].terms["ce"].shape == (2, 2) and losses["student"].total.shape == (2, 3)
  b, _ = epoch(copied(state), teacher)
  assert equal(a.student, b.student) and equal(a.generator, b.generator) and int(a.step) == 2
  epoch(a, teacher)
  assert epoch._cache_size() == 1, "the second epoch must not compile again"
  assert equal(teacher, kept), "the teacher is never written"


def test_two_short_epochs_equal_one_long():
  """Random numbers follow the iteration count, not the calls; so a resumed run draws what it would have drawn."""
  setup, teacher, state = make_setup()
  long, _ = algorithm.compile_epoch(setup, 2)(copied(state), teacher)
  short = algorithm.compile_epoch(setup, 1)
  twice, _ = short(short(copied(state), teacher)[0], teacher)
  assert_trees_close(twice.student.variables, long.student.variables, 1e-4)


def test_labels_are_uniform_and_latents_normal():
  setup, _, _ = make_setup()
  z, y = setup.method.noise.draw(jax.random.key(0), 20000)
  counts = np.bincount(y, minlength=10)
  assert counts.size == 10 and np.all(np.abs(counts - 2000) < 200)
  assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


def test_restarted_adam():
  """A rebuilt Adam moves every parameter by lr * sign(gradient), step after step."""

  def movement(setup, teacher, state):
    first, _ = one_generator_step(setup, teacher, state)
    second, _ = one_generator_step(setup, teacher, first)
    return np.abs(second.generator.params["project"]["kernel"] - first.generator.params["project"]["kernel"])

  moved = movement(*make_setup(generator__optimiser="restarted_adam"))
  assert np.median(moved) == pytest.approx(1e-3, rel=1e-2)
  assert np.std(movement(*make_setup())) > 5 * np.std(moved[moved > 5e-4])


def test_student_in_training_mode_in_generator_steps():
  setup, teacher, state = make_setup(generator__student_mode="train")
  after, _ = one_generator_step(setup, teacher, state)
  assert equal(after.student.params, state.student.params)
  assert not equal(after.student.batch_stats, state.student.batch_stats)


def test_generator_statistics_in_student_steps():
  setup, teacher, state = make_setup(generator__stats_in_student_steps=True)
  after, _ = one_student_step(setup, teacher, state)
  assert equal(after.generator.params, state.generator.params)
  assert not equal(after.generator.batch_stats, state.generator.batch_stats)


def test_double_softmax():
  plain, double = (
    one_student_step(*make_setup(**changes))[1].terms["ce"] for changes in ({}, {"loss__double_softmax": True})
  )
  assert not np.isclose(plain, double)
  assert np.log(9 + np.e) - 1 <= double <= np.log(9 + np.e), "a double softmax has a narrow range"


@pytest.mark.slow
def test_feature_head_is_trained_unless_it_is_frozen():
  setup, teacher, state = make_setup(teacher="wrn_10_2")
  assert isinstance(setup.student.net, nets.FeatureHead)
  after, losses = one_student_step(setup, teacher, state)
  assert "head" in losses.terms and not equal(after.student.params["head_0"], state.student.params["head_0"])
  setup, teacher, state = make_setup(teacher="wrn_10_2", student__head="frozen")
  after, losses = one_student_step(setup, teacher, state)
  assert "head" not in losses.terms
  assert equal(after.student.params["head_0"], state.student.params["head_0"]), "not even weight decay"
  assert equal(after.student.params["head_2"], state.student.params["head_2"])


def test_label_limit():
  config, mesh, spec = default.get_config("smoke"), make_mesh(), datasets.DATASETS["tiny_imagenet"]
  config.dataset.name = "tiny_imagenet"
  for limit, labels in ((0, 200), (100, 100), (300, 200)):
    config.generator.label_limit = limit
    setup = experiment.build(resolve(config, spec, mesh), spec, nets.classifier("wrn_10_1", 200), CARD, mesh)
    assert setup.method.noise.num_labels == labels


def test_generator_gradient_flows_through_teacher_and_student():
  """Each term alone must reach the generator; the adversarial one through both nets."""
  setup, teacher, state = make_setup()
  z, y = setup.method.noise.draw(jax.random.key(3), 12)
  stats = {"generator": state.generator.batch_stats, "student": state.student.batch_stats}

  @jax.jit
  def gradient(weights):
    loss = algorithm.generator_loss(setup, teacher, with_weights(state, weights))
    return jax.grad(lambda params: loss({"generator": params}, stats, (z, y), None, KEY)[0])(state.generator.params)

  for name in setup.weights["generator"]:
    grads = gradient({other: float(other == name) for other in setup.weights["generator"]})
    assert float(jnp.abs(grads["conv3"]["kernel"]).max()) > 0, name


def test_a_learning_rate_factor_scales_the_step():
  setup, teacher, state = make_setup()
  hyper = state.hyper.replace(student=state.hyper.student.replace(lr=jnp.float32(0.5)))
  whole, half = (one_student_step(setup, teacher, s)[0] for s in (state, state.replace(hyper=hyper)))
  difference = jax.tree.map(lambda a, b: np.asarray(a - b), whole.student.params, state.student.params)
  halved = jax.tree.map(lambda a, b: 2 * np.asarray(a - b), half.student.params, state.student.params)
  assert_trees_close(halved, difference, 1e-3)  # differences of float32 parameters


def test_iteration_equals_pytorch():
  """One generator step and one student step against autograd over PyTorch twins: both totals, all gradients."""
  torch = pytest.importorskip("torch")
  import torch_zoo as zoo
  from parity import shapes
  from torch.nn import functional as F

  from cpsc_jax.interop import convert

  torch.manual_seed(0)
  setup, _, _ = make_setup()
  with jax.enable_x64(True):
    twins = {
      "teacher": zoo.randomise(zoo.WideResNet(10, 1, 10), 1).double().eval(),
      "student": zoo.randomise(zoo.WideResNet(10, 1, 10), 2).double(),
      "generator": zoo.randomise(zoo.CifarGenerator(6, 4, 8, 3, 10), 3).double(),
    }
    image, latent, y = jnp.zeros((2, *SHAPE)), jnp.zeros((2, 6)), jnp.zeros(2, jnp.int32)
    ours = {
      "teacher": convert.classifier_from_torch(zoo.arrays(twins["teacher"]), shapes(setup.teacher, image)),
      "student": convert.classifier_from_torch(zoo.arrays(twins["student"]), shapes(setup.student.net, image)),
      "generator": convert.generator_from_torch(zoo.arrays(twins["generator"]), shapes(setup.generator.net, latent, y)),
    }
    ours = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), ours)
    state = initial.state(setup, jax.random.key(0), SHAPE)
    filled = {name: getattr(state, name).replace(**ours[name]) for name in ("generator", "student")}
    state = state.replace(**filled)
    z, y = torch.randn(12, 6).double(), torch.randint(0, 10, (12,))

    twins["student"].eval()  # the default: the student is in evaluation mode in generator steps
    seen = []
    hooks = [
      m.register_forward_pre_hook(lambda m, x: seen.append((m, x[0])))
      for m in twins["teacher"].modules()
      if isinstance(m, torch.nn.BatchNorm2d)
    ]
    x = twins["generator"](z, y)
    t, ft = twins["teacher"](x)
    s, fs = twins["student"](x)
    for hook in hooks:
      hook.remove()
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    bn = sum(
      (v.mean((0, 2, 3)) - m.running_mean).norm() + (v.var((0, 2, 3), unbiased=False) - m.running_var).norm()
      for m, v in seen
    )
    rows, twice = torch.cat([fs, ft]), torch.cat([y, y])
    similarity = (rows @ rows.T / 0.07).masked_fill(torch.eye(24, dtype=torch.bool), float("-inf"))
    log_p = similarity.log_softmax(1)
    positive = (twice[:, None] == twice[None]) & ~torch.eye(24, dtype=torch.bool)
    scl = -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    weights = setup.weights["generator"]
    total = (
      -weights["adversarial"] * kl
      - weights["ikd"] * F.mse_loss(s, t.detach())
      + weights["bn"] * bn
      + weights["scl"] * scl
      + weights["ce"] * F.cross_entropy(t, y)
    )
    total.backward()
    labels = jnp.asarray(y.numpy())
    loss = algorithm.generator_loss(setup, ours["teacher"], state)
    moved = {"generator": state.generator.params, LATENTS: jnp.asarray(z.numpy())}
    stats = {"generator": state.generator.batch_stats, "student": state.student.batch_stats}
    batch = moved[LATENTS], labels
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=3)(
      moved, stats, batch, None, KEY
    )
    assert float(value) == pytest.approx(total.item(), rel=1e-9)

    def gradients(module):
      return {k: p.grad.numpy().copy() for k, p in module.named_parameters()}

    theirs = convert.generator_from_torch(
      {**zoo.arrays(twins["generator"]), **gradients(twins["generator"])},
      shapes(setup.generator.net, jnp.zeros((12, 6)), labels),
    )
    assert_trees_close(grads["generator"], theirs["params"], 1e-7, skip=("['conv1']['bias']", "['conv2']['bias']"))

    twins["student"].train().zero_grad()
    x = x.detach()
    t, s = twins["teacher"](x)[0].detach(), twins["student"](x)[0]
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    weights = setup.weights["student"]
    total = weights["kd"] * kl + weights["l2"] * F.mse_loss(s, t) + weights["ce"] * F.cross_entropy(s, y)
    total.backward()
    images = jnp.asarray(np.moveaxis(x.numpy(), 1, -1))
    loss = algorithm.student_loss(setup, state.hyper.student)
    taught = setup.teacher.apply(ours["teacher"], images, train=False)
    arguments = state.student.params, state.student.batch_stats, Batch(images, labels), taught, KEY
    (value, _), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(*arguments)
    assert float(value) == pytest.approx(total.item(), rel=1e-9)
    theirs = convert.classifier_from_torch(
      {**zoo.arrays(twins["student"]), **gradients(twins["student"])}, shapes(setup.student.net, image)
    )
    assert_trees_close(grads, theirs["params"], 1e-7)
    optimiser = torch.optim.SGD(twins["student"].parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    before = state.student.params
    optimiser.step()
    after = convert.classifier_from_torch(zoo.arrays(twins["student"]), shapes(setup.student.net, image))["params"]
    updates, _ = jax.jit(setup.student.optimiser.update)(grads, state.student.opt_state, before)
    lr = float(updates["fc"]["bias"][0] / (after["fc"]["bias"][0] - np.asarray(before["fc"]["bias"])[0]))
    moved = jax.tree.map(lambda p, u: p + u / lr, before, updates)
    assert_trees_close(moved, after, 1e-6)
    assert_close(lr, 0.1 / 7, 1e-6)  # the first of six warm-up steps
