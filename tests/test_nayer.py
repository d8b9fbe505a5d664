"""NAYER: noisy layers and an episode in float64 against PyTorch, lives of a generator, and embeddings of classes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, assert_trees_close
from spmd_worker import double
from test_fast import OPTIMISED, TorchAdam, blend, without_gradient
from test_methods import DIGITS, resolved, start

from cpsc_jax import algorithm, experiment, nets, streams
from cpsc_jax.errors import Refusal
from cpsc_jax.methods.nayer import class_lists
from cpsc_jax.streams import Stream

CHANGES = {
  "generator.steps": 3,
  "episodes.warmup": 2,
  "episodes.warmup_life": 2,
  "episodes.life": 2,
  "schedule.epochs": 9,
}


def noisy(num_classes=3, width=5, layers=2, embedding_dim=4, **options):
  inner = nets.generator("cifar", 1, 8, 1, 4, form=nets.Form("sigmoid", mean=(0.3,), std=(0.4,)))
  return nets.NoisyLayers(inner, num_classes, width, layers, embedding_dim, **options)


@pytest.mark.parametrize("number", [2, 6, 5, 8])
def test_noisy_layers_equal_pytorchs(number):
  """Each layer takes as many samples as there are classes; after the last comes the first again."""
  torch = pytest.importorskip("torch")
  with jax.enable_x64(True):
    net, labels = noisy(), jnp.arange(number) % 3
    variables = double(nets.init(net, jax.random.key(0), jnp.zeros((number, 0)), labels))
    rows = jax.random.normal(jax.random.key(1), (3, 4))
    variables["batch_stats"] = double(nets.with_embedding(variables["batch_stats"], rows))
    x, stats = nets.forward(net, variables, jnp.zeros((number, 0)), labels, train=True)
    assert_close(stats["embedding"], rows, 1e-7)

    norm = torch.nn.BatchNorm1d(4).double()
    embedded = norm(torch.tensor(np.asarray(variables["batch_stats"]["embedding"]))[torch.arange(number) % 3])
    params, parts = variables["params"], []
    for index in range(-(-number // 3)):
      kernel, bias = (torch.tensor(np.asarray(params["noisy"][name][index % 2])) for name in ("kernel", "bias"))
      parts.append(embedded[3 * index : 3 * index + 3] @ kernel + bias)
    z = jnp.asarray(torch.cat(parts).detach().numpy())
    inner = {"params": params["generator"], "batch_stats": variables["batch_stats"]["generator"]}
    want, _ = nets.forward(net.generator, inner, z, labels, train=True)
  assert_close(x, want, 1e-12)
  assert_close(stats["norm"]["mean"], norm.running_mean.numpy(), 1e-6)


@pytest.mark.slow
def test_an_episode_equals_pytorch():
  """All parameters but the fixed embedding move by an Adam of the episode; the running statistics follow."""
  with jax.enable_x64(True):
    setup, teacher, state = start.__wrapped__("nayer", **CHANGES)
    teacher, state = double(teacher), double(state)
    c, generator = resolved("nayer", **CHANGES), setup.generator.net
    step = jax.jit(algorithm.epoch(setup, 1), compiler_options=OPTIMISED)
    weights, moments = setup.weights["generator"], None

    def loss(params, stats, student, y, key, moments, episode):
      images, _ = nets.forward(
        generator, {"params": params, "batch_stats": stats}, jnp.zeros((len(y), 0)), y, train=True
      )
      x = setup.generator.augment(streams.key(key, Stream.AUGMENTATION), images)
      t = nets.forward_observed(setup.teacher, teacher, x)
      s, _ = nets.forward(setup.student.net, student, x, train=False)
      log_t, log_s = jax.nn.log_softmax(t.logits), jax.nn.log_softmax(s.logits)
      agreed = t.logits.argmax(-1) == s.logits.argmax(-1)
      kl = jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1) * agreed)
      seen = {"/".join(layer): {n: m[n] for n in ("mean", "var")} for layer, m in t.statistics.seen.items()}
      stored = {"/".join(layer): m for layer, m in t.statistics.stored.items()}
      compared = blend(0.9, seen, moments) if moments else seen
      bn = sum(jnp.linalg.norm(compared[layer][n] - stored[layer][n]) for layer in seen for n in ("mean", "var"))
      value = weights["bn"] * bn - weights["ce"] * jnp.mean(log_t[jnp.arange(len(y)), y])
      return value - weights["adversarial"] * kl * (episode >= 2), (value, images, seen)

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=6, compiler_options=OPTIMISED)
    for episode in range(3):
      key = streams.nth(state.key, Stream.ITERATIONS, state.step)
      begun = setup.method.begin(state, streams.key(key, Stream.BEGIN))
      new = episode in (0, 2)  # lives: of the warm-up, then of the training
      kernels = (s.generator.params["generator"]["conv1"]["kernel"] for s in (begun, state))
      assert np.array_equal(*kernels) != new
      assert not np.array_equal(begun.generator.params["noisy"]["kernel"], state.generator.params["noisy"]["kernel"])
      y, adam = (
        begun.memory["labels"],
        TorchAdam(begun.generator.params, c.generator.lr, c.generator.b1, c.generator.b2),
      )
      least, best = np.inf, None
      for k in streams.keys(key, Stream.GENERATOR_STEPS, c.generator.steps):
        (total, (_, images, seen)), grads = gradient(
          adam.tree, state.generator.batch_stats, state.student.variables, y, k, moments, episode
        )
        if float(total) < least:
          least, best = float(total), images
        adam.step(grads)
      moments = seen if moments is None else blend(0.9, seen, moments)
      student = jax.device_get(state.student.params)
      state, _ = step(state, teacher)
      inner = without_gradient(state.generator.params["generator"]), without_gradient(adam.tree["generator"])
      for ours, theirs in zip(inner[:1], inner[1:], strict=True):
        drop = {"project"}  # its bias stands before a batch norm
        assert_trees_close(
          {k: v for k, v in ours.items() if k not in drop}, {k: v for k, v in theirs.items() if k not in drop}, 1e-6
        )
      assert_trees_close(state.generator.params["noisy"]["kernel"], adam.tree["noisy"]["kernel"], 1e-6)
      assert_trees_close(state.memory["moments"], moments, 1e-7)
      assert_close(state.memory["best"]["images"], best, 1e-6)
      moved = any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (student, state.student.params)), strict=True))
      assert moved == (episode >= 2), "no student update in the warm-up"


def test_labels_are_whole_lists_of_classes():
  y = np.asarray(class_lists(jax.random.key(0), 25, 10))
  assert list(y[:20]) == [*range(10)] * 2 and set(y[20:]) <= set(range(10))
  others = {tuple(np.asarray(class_lists(jax.random.key(i), 25, 10))[20:]) for i in range(5)}
  assert len(others) == 5


@pytest.mark.parametrize("kind", ["classifier", "one_hot", "learned", "file"])
def test_embeddings(kind, tmp_path):
  path = tmp_path / "rows.npy"
  given = np.random.default_rng(0).normal(size=(10, 7))
  np.save(path, given)
  setup, teacher, _ = start.__wrapped__("nayer", **{"generator.embedding": str(path) if kind == "file" else kind})
  c = resolved("nayer", **{"generator.embedding": str(path) if kind == "file" else kind})
  state = experiment.initial_state(c, setup, jax.random.key(0), DIGITS.image_shape, teacher)
  stats, params = state.generator.batch_stats, state.generator.params
  if kind == "learned":
    assert params["embedding"].shape == (10, 64) and "embedding" not in stats
    return
  if kind == "classifier":
    rows = np.asarray(teacher["params"]["fc"]["kernel"]).T
    given = (rows - rows.mean(1, keepdims=True)) / rows.std(1, keepdims=True)
  assert "embedding" not in params
  assert_close(stats["embedding"], np.eye(10) if kind == "one_hot" else given, 1e-6)
  after = jax.jit(setup.method.begin)(state, jax.random.key(1))
  assert_close(after.generator.batch_stats["embedding"], stats["embedding"], 0)


def test_embeddings_that_do_not_fit_are_refused(tmp_path):
  path = tmp_path / "rows.npy"
  for rows, said in (
    (np.zeros((9, 4)), r"shape \(9, 4\)"),
    (np.zeros(10), r"shape \(10,\)"),
    (np.full((10, 4), np.nan), "not all finite"),
    (np.zeros((10, 4), int), "not all finite"),
  ):
    np.save(path, rows)
    with pytest.raises(Refusal, match=said):
      resolved("nayer", **{"generator.embedding": str(path)})
  path.write_bytes(b"no array")
  for kind, said in (
    (str(path), "cannot be read"),
    ("clip", "cannot be read.*must be one of classifier"),
    ("", "is empty"),
  ):
    with pytest.raises(Refusal, match=said):
      resolved("nayer", **{"generator.embedding": kind})
  with pytest.raises(Refusal, match="method 'nayer' alone's"):
    resolved("fast", **{"generator.embedding": "one_hot"})
  for key in ("life", "warmup_life"):
    with pytest.raises(Refusal, match=f"config.episodes.{key} is 0; it must be at least 1"):
      resolved("nayer", **{f"episodes.{key}": 0})


class Twice(nn.Module):
  """A net whose logits are another layer's than its features'."""

  net: nn.Module

  def __call__(self, x, train):
    return self.net(x, train=train).replace(features=jnp.zeros((x.shape[0], 5)))


def test_a_classifier_that_cannot_be_found_is_refused():
  setup, _, _ = start("nayer")
  with pytest.raises(Refusal, match=r"no layers of Twice have a kernel \(5, 10\) from features to logits"):
    nets.classifier_path(Twice(setup.teacher), DIGITS.image_shape)
