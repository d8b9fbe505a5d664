"""FastDFKD: episodes in float64 against PyTorch's optimisers and NumPy, and what its warm-up leaves out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, assert_trees_close
from spmd_worker import double
from test_methods import kept_by, resolved, start

from cpsc_jax import algorithm, nets, record, streams
from cpsc_jax.errors import Refusal
from cpsc_jax.nets.generators import redrawn
from cpsc_jax.setup import LATENTS
from cpsc_jax.streams import Stream

EPISODES = 3
OPTIMISED = {"xla_backend_optimization_level": 3}  # for XLA's own convolutions, which are those in float64
CHANGES = {
  "generator.steps": 3,
  "episodes.warmup": 2,
  "loss.generator.adversarial": 0.7,
  "schedule.epochs": 10,
}


class TorchAdam:
  """PyTorch's Adam over the leaves of a tree, given gradients."""

  def __init__(self, tree, lr, b1, b2):
    torch = pytest.importorskip("torch")
    leaves, self.structure = jax.tree.flatten(tree)
    self.leaves = [torch.tensor(np.asarray(leaf)) for leaf in leaves]
    self.optimiser = torch.optim.Adam(self.leaves, lr=lr, betas=(b1, b2))
    self.torch = torch

  @property
  def tree(self):
    return jax.tree.unflatten(self.structure, [jnp.asarray(leaf.numpy().copy()) for leaf in self.leaves])

  def step(self, gradient):
    for leaf, g in zip(self.leaves, jax.tree.leaves(gradient), strict=True):
      leaf.grad = self.torch.tensor(np.asarray(g))
    self.optimiser.step()


def without_gradient(params):
  """Without the biases before a batch norm: their gradient is zero, and rounding decides what Adam makes of it."""
  return {name: {"kernel": p["kernel"]} if name in ("conv1", "conv2") else p for name, p in params.items()}


def blend(momentum, new, old):
  return {
    layer: {n: (1 - momentum) * new[layer][n] + momentum * old[layer][n] for n in ("mean", "var")} for layer in new
  }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["maml", "reptile"])
def test_episodes_equal_pytorch(form):
  """The generator, its copy, the latents and the statistics, over episodes that share the outer Adam."""
  with jax.enable_x64(True):
    setup, teacher, state = start.__wrapped__("fast", **CHANGES, **{"episodes.form": form})
    teacher, state = double(teacher), double(state)
    c = CONFIG(form)
    theta = TorchAdam(state.generator.params, c.generator.steps * c.generator.lr, c.generator.b1, c.generator.b2)
    moments, step = None, jax.jit(algorithm.epoch(setup, 1), compiler_options=OPTIMISED)
    gradient = jax.jit(jax.grad(loss_of(setup, teacher), has_aux=True), compiler_options=OPTIMISED)
    for episode in range(EPISODES):
      key = streams.nth(state.key, Stream.ITERATIONS, state.step)
      begun = setup.method.begin(state, streams.key(key, Stream.BEGIN))
      z, y = begun.trained[LATENTS].params, begun.memory["labels"]
      copy = TorchAdam(theta.tree, c.generator.lr, c.generator.b1, c.generator.b2)
      latents = TorchAdam(z, c.episodes.latent_lr, c.generator.b1, c.generator.b2)
      assert_trees_close(without_gradient(begun.generator.params), without_gradient(theta.tree), 1e-7)
      total, least, best = None, np.inf, None
      for k in streams.keys(key, Stream.GENERATOR_STEPS, c.generator.steps):
        params = {"generator": copy.tree, LATENTS: latents.tree}
        got, (value, images, seen) = gradient(params, begun, y, k, moments_in(state, moments), episode)
        total = got["generator"] if total is None else jax.tree.map(jnp.add, total, got["generator"])
        if float(value) < least:
          least, best = float(value), images
        copy.step(got["generator"])
        latents.step(got[LATENTS])
      if form == "reptile":
        total = jax.tree.map(lambda old, new: 67.0 * (old - new), theta.tree, copy.tree)
      theta.step(total)
      moments = seen if moments is None else blend(c.episodes.bn_momentum, seen, moments)

      before = jax.device_get(state.student.params)
      state, losses = step(state, teacher)
      assert_trees_close(without_gradient(state.generator.params), without_gradient(theta.tree), 1e-7)
      assert_trees_close(state.memory["moments"], moments, 1e-8)
      assert_close(state.memory["best"]["images"], best, 1e-7)
      learned = any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, state.student.params)), strict=True))
      assert learned == (episode >= 2), "no student update in the warm-up"
      if episode + 1 < 2:
        assert np.all(np.asarray(losses["generator"].terms["adversarial"]) == 0)


@functools.cache
def CONFIG(form):
  return resolved("fast", **CHANGES, **{"episodes.form": form})


def moments_in(state, moments):
  zeros = jax.tree.map(jnp.zeros_like, state.memory["moments"])
  return zeros if moments is None else moments


def loss_of(setup, teacher):
  """(params, state, labels, key, moments, episode) -> L written out from the teacher's and the student's outputs."""
  weights = setup.weights["generator"]

  def loss(params, state, y, key, moments, episode):
    variables = {"params": params["generator"], "batch_stats": state.generator.batch_stats}
    images, _ = nets.forward(setup.generator.net, variables, params[LATENTS], y, train=True)
    x = setup.generator.augment(streams.key(key, Stream.AUGMENTATION), images)
    t = nets.forward_observed(setup.teacher, teacher, x)
    s, _ = nets.forward(setup.student.net, state.student.variables, x, train=False)
    log_t, log_s = jax.nn.log_softmax(t.logits), jax.nn.log_softmax(s.logits)
    agreed = t.logits.argmax(-1) == s.logits.argmax(-1)
    kl = jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1) * agreed)
    ce = -jnp.mean(log_t[jnp.arange(len(y)), y])
    seen = {"/".join(layer): {n: m[n] for n in ("mean", "var")} for layer, m in t.statistics.seen.items()}
    stored = {"/".join(layer): m for layer, m in t.statistics.stored.items()}
    compared = jax.tree.map(lambda a, b: jnp.where(episode > 0, a, b), blend(0.9, seen, moments), seen)
    bn = sum(jnp.linalg.norm(compared[layer][n] - stored[layer][n]) for layer in seen for n in ("mean", "var"))
    adversarial = jnp.where(episode + 1 >= CHANGES["episodes.warmup"], -kl, 0.0)
    value = weights["bn"] * bn + weights["ce"] * ce + weights["adversarial"] * adversarial
    return value, (value, images, seen)

  return loss


def test_the_first_layer_is_drawn_anew_once():
  setup, _, state = start.__wrapped__("fast", **{"episodes.redraw_at": 2})
  begin = jax.jit(setup.method.begin)
  before = state.generator.params
  state = begin(state, jax.random.key(1))
  assert_trees_close(state.generator.params, before, 0)
  state = begin(kept_by(setup, state), jax.random.key(2))
  scale = np.asarray(state.generator.params["cbn0"]["scale"])
  assert np.abs(scale).max() < 0.2 and np.all(np.asarray(state.generator.params["project"]["bias"]) == 0)
  again = redrawn(before, jax.random.key(0))
  assert jax.tree.structure(again) == jax.tree.structure(before)
  assert_trees_close(again["conv1"], before["conv1"], 0)


def test_samples_of_the_warm_up_are_not_the_students():
  setup, _, _ = start.__wrapped__("fast", **CHANGES)
  c = CONFIG("maml")
  drawn, waiting = record._samples_drawn(c, setup), c.episodes.warmup
  each = c.schedule.batch_size * c.student.steps
  assert drawn["student"] == (c.schedule.epochs * c.schedule.iterations - waiting) * each
  assert drawn["generator"] == c.schedule.epochs * c.schedule.iterations * c.pool.batch_size * c.generator.steps


@pytest.mark.parametrize(
  ("key", "value"), [("schedule", "cosine"), ("milestones", (3,)), ("clip", 1.0), ("optimiser", "restarted_adam")]
)
def test_what_would_be_ignored_is_refused(key, value):
  with pytest.raises(Refusal, match=f"config.generator.{key} is .* by Adam at a constant rate and without clipping"):
    resolved("fast", **{f"generator.{key}": value})
