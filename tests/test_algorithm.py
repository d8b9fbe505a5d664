"""What must hold of the alternating game, whatever the figures."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from cpsc_jax.configs import default
from parity import assert_close, assert_trees_close, weighed

from cpsc_jax import algorithm, distill, nets, settings
from cpsc_jax.mesh import make_mesh, replicated

SHAPE = (8, 8, 3)
# LLVM's optimisation takes half of the time to compile, and steps this small run no slower without it.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def make_game(student="wrn_10_1", teacher="wrn_10_1", **quirks):
  config = default.get_config("smoke")
  config.schedule.batch_size = 12
  config.generator.width, config.generator.latent_dim = 4, 6
  config.generator.steps, config.student.steps = 2, 3
  config.student.net = student
  config.quirks.update(quirks)
  mesh = make_mesh()
  config = ml_collections.ConfigDict(settings.resolve(config, mesh).to_dict())
  game = distill.build_game(config, mesh, nets.classifier(teacher, 10), {"net": teacher, "num_classes": 10})
  game = dataclasses.replace(game, generator=nets.generator("cifar", 10, 8, 3, 4))
  teacher_variables = nets.init(game.teacher, jax.random.key(5), jnp.zeros((2, *SHAPE)))
  state = algorithm.initial_state(game, 0, SHAPE)
  return game, *jax.device_put((teacher_variables, state), replicated(mesh))


def equal(a, b):
  return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def one_generator_step(game, teacher, state):
  return jit(algorithm.generator_step(game, teacher))(state, jax.random.key(1))


def one_student_step(game, teacher, state):
  return jit(algorithm.student_step(game, teacher))(state, jax.random.key(1))


def test_alternate_is_the_papers_order():
  """n_g generator steps, then n_s student steps, each with a key of its own, the counter moved once."""

  @dataclasses.dataclass
  class Trace:
    key: jax.Array
    step: jax.Array
    calls: jax.Array

    def tick(self):
      return dataclasses.replace(self, step=self.step + 1)

  jax.tree_util.register_dataclass(Trace, ["key", "step", "calls"], [])
  mark = lambda who: (
    lambda s, key: (
      dataclasses.replace(s, calls=jnp.append(s.calls[1:], who)),
      jax.random.key_data(key)[-1],
    )
  )
  iteration = algorithm.alternate(mark(1), mark(2), 2, 3)
  state = Trace(jax.random.key(0), jnp.int32(0), jnp.zeros(5, int))
  state, keys = iteration(state, None)
  assert state.calls.tolist() == [1, 1, 2, 2, 2] and state.step == 1
  again, more = iteration(state, None)
  drawn = np.concatenate([keys["generator"], keys["student"], more["generator"], more["student"]])
  assert len(set(drawn.tolist())) == 10, "no key is used twice"
  assert np.array_equal(jax.random.key_data(again.key), jax.random.key_data(state.key))


def test_generator_step_moves_the_generator_alone():
  game, teacher, state = make_game()
  after, terms = one_generator_step(game, teacher, state)
  assert equal(after.student, state.student)
  assert not equal(after.generator.params, state.generator.params)
  assert not equal(after.generator.batch_stats, state.generator.batch_stats)
  assert set(terms) == {"adversarial", "ikd", "bn", "scl", "ce", "total"}


def test_student_step_moves_the_student_alone():
  game, teacher, state = make_game()
  after, terms = one_student_step(game, teacher, state)
  assert equal(after.generator, state.generator)
  assert not equal(after.student.params, state.student.params)
  assert not equal(after.student.batch_stats, state.student.batch_stats)
  assert set(terms) == {"kd", "l2", "ce", "total"}


def test_total_is_the_weighted_sum():
  game, teacher, state = make_game()
  for step, terms in ((one_generator_step, game.method.generator_terms), (one_student_step, game.method.student_terms)):
    _, values = step(game, teacher, state)
    want = sum(terms[name][0] * float(value) for name, value in values.items() if name != "total")
    assert float(values["total"]) == pytest.approx(want, rel=1e-5)


def test_terms_of_weight_zero_are_neither_computed_nor_logged():
  def explode(_):
    raise AssertionError

  terms = {"a": (2.0, lambda v: v), "b": (0.0, explode)}
  value, named = algorithm.weigh(terms, jnp.float32(3))
  assert float(value) == 6 and set(named) == {"a", "total"}


def test_epoch_is_one_program_and_deterministic():
  game, teacher, state = make_game()
  kept = jax.tree.map(np.asarray, teacher)
  epoch = algorithm.compile_epoch(game, iterations=2)
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  a, terms = epoch(copy(state), teacher)
  assert terms["generator"]["ce"].shape == (2, 2) and terms["student"]["kd"].shape == (2, 3)
  b, _ = epoch(copy(state), teacher)
  assert equal(a.student, b.student) and equal(a.generator, b.generator) and int(a.step) == 2
  epoch(a, teacher)
  assert epoch._cache_size() == 1, "the second epoch must not compile again"
  assert equal(teacher, kept), "the teacher is never written"


def test_two_short_epochs_equal_one_long():
  """Random numbers follow the iteration count, not the calls; so a resumed run draws what it would have drawn."""
  game, teacher, state = make_game()
  copy = lambda tree: jax.tree.map(jnp.copy, tree)
  long, _ = algorithm.compile_epoch(game, 2)(copy(state), teacher)
  short = algorithm.compile_epoch(game, 1)
  twice, _ = short(short(copy(state), teacher)[0], teacher)
  assert_trees_close(twice.student.variables, long.student.variables, 1e-4)


def test_labels_are_uniform_and_latents_normal():
  game, _, _ = make_game()
  game = dataclasses.replace(game, batch_size=20000)
  z, y = algorithm.draw(game, jax.random.key(0), game.batch_size)
  counts = np.bincount(y, minlength=10)
  assert counts.size == 10 and np.all(np.abs(counts - 2000) < 200)
  assert abs(float(z.mean())) < 0.02 and abs(float(z.std()) - 1) < 0.02


def test_quirk_fresh_adam():
  """A rebuilt Adam moves every parameter by lr * sign(gradient), step after step."""
  game, teacher, state = make_game(fresh_adam=True)
  first, _ = one_generator_step(game, teacher, state)
  second, _ = one_generator_step(game, teacher, first)
  moved = np.abs(second.generator.params["project"]["kernel"] - first.generator.params["project"]["kernel"])
  assert np.median(moved) == pytest.approx(1e-3, rel=1e-2)
  game, teacher, state = make_game()
  first, _ = one_generator_step(game, teacher, state)
  second, _ = one_generator_step(game, teacher, first)
  persistent = np.abs(second.generator.params["project"]["kernel"] - first.generator.params["project"]["kernel"])
  assert np.std(persistent) > 5 * np.std(moved[moved > 5e-4])


def test_quirk_latent_step_changes_nothing_that_is_kept():
  game, teacher, state = make_game(fresh_adam=True)
  quirky, *_ = make_game(fresh_adam=True, latent_step=True)
  z, y = algorithm.draw(game, jax.random.key(2), game.batch_size)
  plain, _ = jit(lambda s: algorithm.generator_update(game, teacher, s, z, y))(state)
  moved, aux = jit(lambda s: algorithm.generator_update(quirky, teacher, s, z, y))(state)
  assert_trees_close(moved.generator.batch_stats, plain.generator.batch_stats, 1e-6)
  assert np.median(np.abs(aux["latent"] - z)) == pytest.approx(1e-3, rel=1e-2)


def test_quirk_student_trains_in_generator_step():
  game, teacher, state = make_game(student_trains_in_generator_step=True)
  after, _ = one_generator_step(game, teacher, state)
  assert equal(after.student.params, state.student.params)
  assert not equal(after.student.batch_stats, state.student.batch_stats)


def test_quirk_generator_stats_in_student_step():
  game, teacher, state = make_game(generator_stats_in_student_step=True)
  after, _ = one_student_step(game, teacher, state)
  assert equal(after.generator.params, state.generator.params)
  assert not equal(after.generator.batch_stats, state.generator.batch_stats)


def test_quirk_double_softmax():
  game, teacher, state = make_game()
  quirky, *_ = make_game(double_softmax=True)
  plain, double = (one_student_step(g, teacher, state)[1]["ce"] for g in (game, quirky))
  assert not np.isclose(plain, double)
  assert np.log(9 + np.e) - 1 <= double <= np.log(9 + np.e), "a double softmax has a narrow range"


def test_feature_head_is_trained_unless_the_quirk_is_on():
  game, teacher, state = make_game(teacher="wrn_10_2")
  assert isinstance(game.student, nets.FeatureHead)
  after, terms = one_student_step(game, teacher, state)
  assert "head" in terms and not equal(after.student.params["head_0"], state.student.params["head_0"])
  game, teacher, state = make_game(teacher="wrn_10_2", untrained_head=True)
  after, terms = one_student_step(game, teacher, state)
  assert "head" not in terms
  assert equal(after.student.params["head_0"], state.student.params["head_0"]), "not even weight decay"
  assert equal(after.student.params["head_2"], state.student.params["head_2"])


def test_quirk_hundred_labels():
  config = default.get_config("smoke")
  config.dataset.name = "tiny_imagenet"
  mesh = make_mesh()
  card = {"net": "wrn_10_1", "num_classes": 200}
  for quirk, labels in ((False, 200), (True, 100)):
    config.quirks.hundred_labels = quirk
    game = distill.build_game(settings.resolve(config, mesh), mesh, nets.classifier("wrn_10_1", 200), card)
    assert game.num_labels == labels


def test_generator_gradient_flows_through_teacher_and_student():
  """Each term alone must reach the generator; the adversarial one through both nets."""
  game, teacher, state = make_game()
  z, y = algorithm.draw(game, jax.random.key(3), game.batch_size)

  @jit
  def gradient(weights):
    loss = algorithm.generator_loss(weighed(game, weights), teacher, state, y)
    return jax.grad(lambda params: loss({"params": params, "latent": z})[0])(state.generator.params)

  names = [name for name, (weight, _) in game.method.generator_terms.items() if weight]
  for name in names:
    grads = gradient({other: float(other == name) for other in names})
    assert float(jnp.abs(grads["conv3"]["kernel"]).max()) > 0, name


def test_iteration_equals_pytorch():
  """One generator step and one student step against autograd over PyTorch twins: both totals, all gradients."""
  torch = pytest.importorskip("torch")
  import torch_zoo as zoo
  from parity import shapes
  from torch.nn import functional as F

  from cpsc_jax import convert

  torch.manual_seed(0)
  game, _, _ = make_game()
  with jax.enable_x64(True):
    twins = {
      "teacher": zoo.randomise(zoo.WideResNet(10, 1, 10), 1).double().eval(),
      "student": zoo.randomise(zoo.WideResNet(10, 1, 10), 2).double(),
      "generator": zoo.randomise(zoo.CifarGenerator(6, 4, 8, 3, 10), 3).double(),
    }
    double = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
    image, latent, y = jnp.zeros((2, *SHAPE)), jnp.zeros((2, 6)), jnp.zeros(2, jnp.int32)
    ours = {
      "teacher": convert.classifier_from_torch(zoo.arrays(twins["teacher"]), shapes(game.teacher, image)),
      "student": convert.classifier_from_torch(zoo.arrays(twins["student"]), shapes(game.student, image)),
      "generator": convert.generator_from_torch(zoo.arrays(twins["generator"]), shapes(game.generator, latent, y)),
    }
    ours = {k: double(v) for k, v in ours.items()}
    state = algorithm.initial_state(game, 0, SHAPE)
    fill = lambda s, v: s.replace(params=v["params"], batch_stats=v["batch_stats"])
    state = state.replace(
      generator=fill(state.generator, ours["generator"]), student=fill(state.student, ours["student"])
    )
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
    weights = {name: weight for name, (weight, _) in game.method.generator_terms.items()}
    total = (
      -weights["adversarial"] * kl
      - weights["ikd"] * F.mse_loss(s, t.detach())
      + weights["bn"] * bn
      + weights["scl"] * scl
      + weights["ce"] * F.cross_entropy(t, y)
    )
    total.backward()
    labels = jnp.asarray(y.numpy())
    loss = algorithm.generator_loss(game, ours["teacher"], state, labels)
    moved = {"params": state.generator.params, "latent": jnp.asarray(z.numpy())}
    (value, _), grads = jit(jax.value_and_grad(loss, has_aux=True))(moved)
    assert float(value) == pytest.approx(total.item(), rel=1e-9)
    gradients = lambda module: {k: p.grad.numpy().copy() for k, p in module.named_parameters()}
    theirs = convert.generator_from_torch(
      {**zoo.arrays(twins["generator"]), **gradients(twins["generator"])},
      shapes(game.generator, jnp.zeros((12, 6)), labels),
    )
    assert_trees_close(grads["params"], theirs["params"], 1e-7, skip=("['conv1']['bias']", "['conv2']['bias']"))

    twins["student"].train().zero_grad()
    x = x.detach()
    t, s = twins["teacher"](x)[0].detach(), twins["student"](x)[0]
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    weights = {name: weight for name, (weight, _) in game.method.student_terms.items()}
    total = weights["kd"] * kl + weights["l2"] * F.mse_loss(s, t) + weights["ce"] * F.cross_entropy(s, y)
    total.backward()
    images = jnp.asarray(np.moveaxis(x.numpy(), 1, -1))
    loss = algorithm.student_loss(game, ours["teacher"], state.student, images, labels)
    (value, _), grads = jit(jax.value_and_grad(loss, has_aux=True))(state.student.params)
    assert float(value) == pytest.approx(total.item(), rel=1e-9)
    theirs = convert.classifier_from_torch(
      {**zoo.arrays(twins["student"]), **gradients(twins["student"])}, shapes(game.student, image)
    )
    assert_trees_close(grads, theirs["params"], 1e-7)
    optimiser = torch.optim.SGD(twins["student"].parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    before = state.student.params
    optimiser.step()
    after = convert.classifier_from_torch(zoo.arrays(twins["student"]), shapes(game.student, image))["params"]
    updates, _ = jit(game.student_tx.update)(grads, state.student.opt_state, before)
    lr = float(updates["fc"]["bias"][0] / (after["fc"]["bias"][0] - np.asarray(before["fc"]["bias"])[0]))
    moved = jax.tree.map(lambda p, u: p + u / lr, before, updates)
    assert_trees_close(moved, after, 1e-6)
    assert_close(lr, 0.1 / 7, 1e-6)  # the first of six warm-up steps
