"""Options that the configs of other methods need, against PyTorch or their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cpsc_jax.configs import default
from parity import assert_close
from test_algorithm import make_setup

from cpsc_jax import datasets, experiment, losses, nets, optim
from cpsc_jax.errors import Refusal
from cpsc_jax.nets.generators import Form


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
  wider = nets.init(nets.classifier("wrn_10_2", 10), jax.random.key(9), jnp.zeros((2, 8, 8, 3)))
  merged, taken = nets.inherited(student, wider)
  assert taken == student["params"]["conv1"]["kernel"].size + 2 * 16, "the stem and the norm behind it"
  other = nets.init(nets.classifier("vgg11", 10), jax.random.key(9), jnp.zeros((2, 8, 8, 3)))
  assert nets.inherited(student, other)[1] == 0
  head = nets.FeatureHead(nets.classifier("wrn_10_1", 10), 128)
  inside = nets.init(head, jax.random.key(1), jnp.zeros((2, 8, 8, 3)))
  merged, taken = nets.inherited(inside, teacher)
  assert taken == nets.count_parameters(student["params"])
  assert jax.tree.structure(merged) == jax.tree.structure(inside)


def test_inheriting_nothing_is_refused():
  setup, _, _ = make_setup()
  config = default.get_config()
  with config.unlocked():
    config.student.inherit = True
  other = nets.init(nets.classifier("vgg11", 10), jax.random.key(9), jnp.zeros((2, 8, 8, 3)))
  with pytest.raises(Refusal, match="no layer of the same name and shape"):
    experiment.initial_state(config, setup, jax.random.key(0), (8, 8, 3), other)
