"""Every network against an independent PyTorch version, by way of the weight converter, and how nets are called."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, assert_trees_close, cast, jitted_forward, nhwc, shapes

import cpsc_jax
from cpsc_jax import checkpoint, nets
from cpsc_jax.errors import Refusal
from cpsc_jax.interop import convert
from cpsc_jax.nets import adapted
from cpsc_jax.nets.convolution import SAVED
from cpsc_jax.state import Output, Statistics

torch = pytest.importorskip("torch", reason="the PyTorch twins need torch: pip install -e '.[test]'")
import torch_zoo as zoo  # noqa: E402

# name, twin, image size, parameters as published or counted by the twin
CLASSIFIERS = {
  "wrn_10_1": lambda: zoo.WideResNet(10, 1, 10),
  "wrn_16_1": lambda: zoo.WideResNet(16, 1, 10),
  "wrn_16_2": lambda: zoo.WideResNet(16, 2, 10),
  "wrn_40_2": lambda: zoo.WideResNet(40, 2, 10),
  "resnet18": lambda: zoo.ResNet((2, 2, 2, 2), 10),
  "resnet34": lambda: zoo.ResNet((3, 4, 6, 3), 10),
  "resnet50": lambda: zoo.ResNet((3, 4, 6, 3), 10, bottleneck=True),
  "vgg11": lambda: zoo.VGG((1, 1, 2, 2, 2), 10),
  "vgg13": lambda: zoo.VGG((2, 2, 2, 2, 2), 10),
  "vgg16": lambda: zoo.VGG((2, 2, 3, 3, 3), 10),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_equals_pytorch(name):
  torch.manual_seed(0)
  twin, net = zoo.randomise(CLASSIFIERS[name]()), nets.classifier(name, 10)
  x = torch.randn(3, 3, 16, 16)
  ours = jnp.asarray(nhwc(x.numpy()))
  like = shapes(net, ours)
  variables = cast(convert.classifier_from_torch(zoo.arrays(twin), like), jnp.float32)
  assert nets.count_parameters(like["params"]) == sum(p.numel() for p in twin.parameters())
  for train in (False, True):
    twin.train(train)
    with torch.no_grad():
      logits, features = twin(x)
    out, stats = jitted_forward(net, train)(variables, ours)
    # On 1x1 maps with 3 samples batch norm divides by tiny variances; rounding grows with depth.
    limit = 1e-3 if train else 2e-5
    assert_close(out.logits, logits.numpy(), limit, f"logits, train={train}")
    assert_close(out.features, features.numpy(), limit, f"features, train={train}")
  theirs = convert.classifier_from_torch(zoo.arrays(twin), like)["batch_stats"]
  assert_trees_close(stats, theirs, 1e-3)


GENERATORS = [
  ("cifar", zoo.CifarGenerator, 8, 1),
  ("cifar", zoo.CifarGenerator, 32, 3),
  ("dcgan", zoo.DCGANGenerator, 64, 3),
]


@pytest.mark.parametrize(("name", "twin", "size", "channels"), GENERATORS)
def test_generator_equals_pytorch(name, twin, size, channels):
  torch.manual_seed(0)
  twin = zoo.randomise(twin(12, 4, size, channels, 5))
  net = nets.generator(name, 5, size, channels, 4)
  z, y = torch.randn(6, 12), torch.tensor([0, 1, 4, 2, 3, 1])
  inputs = jnp.asarray(z.numpy()), jnp.asarray(y.numpy())
  variables = cast(convert.generator_from_torch(zoo.arrays(twin), shapes(net, *inputs)), jnp.float32)
  for train in (False, True):
    twin.train(train)
    with torch.no_grad():
      want = twin(z, y).numpy()
    x, _ = jitted_forward(net, train)(variables, *inputs)
    assert x.shape == (6, size, size, channels)
    assert_close(x, nhwc(want), 1e-5, f"train={train}")


@pytest.mark.parametrize(("name", "size"), [("cifar", 8), ("cifar", 28), ("cifar", 96), ("dcgan", 16), ("dcgan", 224)])
def test_generator_sizes(name, size):
  net = nets.generator(name, 3, size, 3, 2)
  z, y = jnp.zeros((2, 4)), jnp.zeros((2,), jnp.int32)
  assert jax.eval_shape(lambda k: net.init_with_output(k, z, y, train=True)[0], jax.random.key(0)).shape == (
    2,
    size,
    size,
    3,
  )


@pytest.mark.parametrize("name", ["wrn_16_1", "resnet18", "vgg11"])
@pytest.mark.parametrize("size", [8, 32, 64])
def test_outputs_by_name(name, size):
  net = nets.classifier(name, 7)
  out = jax.eval_shape(
    lambda k: net.init_with_output(k, jnp.zeros((2, size, size, 3)), train=False)[0], jax.random.key(0)
  )
  assert out.logits.shape == (2, 7)
  assert len(out.stages) == {"wrn_16_1": 3, "resnet18": 4, "vgg11": 5}[name]
  assert all(stage.ndim == 4 for stage in out.stages)
  assert out.features.shape == out.pooled.shape == (2, out.stages[-1].shape[-1])
  assert out.head_features is None and out.projected is None and out.statistics is None


def test_features_have_unit_length():
  net = nets.FeatureHead(nets.classifier("wrn_10_1", 3), 48)
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  out, _ = jitted_forward(net, False)(nets.init(net, jax.random.key(1), x), x)
  assert out.features.shape == (4, 48)
  np.testing.assert_allclose(np.linalg.norm(out.features, axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(out.features, out.head_features)


def test_head_features_train_the_head_alone():
  net = nets.FeatureHead(nets.classifier("wrn_10_1", 3), 48)
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
  variables = nets.init(net, jax.random.key(1), x)

  def loss(params):
    return jnp.sum(net.apply({**variables, "params": params}, x, train=False).head_features[:, 0])

  grads = jax.jit(jax.grad(loss))(variables["params"])
  assert not any(np.any(g) for g in jax.tree.leaves(grads["net"]))
  assert all(np.any(g) for g in jax.tree.leaves(grads["head_2"]))


def test_precision_reaches_the_convolutions():
  net = nets.classifier("wrn_10_1", 3, jnp.dtype("bfloat16"))
  x = jnp.ones((2, 8, 8, 3))
  text = jax.jit(lambda x: net.init_with_output(jax.random.key(0), x, train=False)[0].logits).lower(x).as_text()
  assert "bf16" in text
  out = net.init_with_output(jax.random.key(0), x, train=False)[0]
  assert out.logits.dtype == out.features.dtype == jnp.float32


IMAGES, LATENTS = (jnp.zeros((2, 8, 8, 3)),), (jnp.zeros((2, 4)), jnp.zeros((2,), jnp.int32))
WIDE_RESNET, GENERATOR = nets.classifier("wrn_10_1", 3, jnp.bfloat16), nets.generator("cifar", 3, 8, 3, 2, jnp.bfloat16)


@pytest.mark.parametrize(
  ("net", "inputs"),
  [
    (WIDE_RESNET, IMAGES),
    (nets.FeatureHead(WIDE_RESNET, 24), IMAGES),
    (nets.StageProjections(WIDE_RESNET, (4, 5, 6)), IMAGES),
    (GENERATOR, LATENTS),
  ],
  ids=["wrn_10_1", "head", "projections", "cifar"],
)
@pytest.mark.parametrize("train", [False, True])
def test_half_precision_keeps_parameters_statistics_and_outputs_in_float32(net, inputs, train):
  variables = jax.eval_shape(lambda: nets.init(net, jax.random.key(0), *inputs))
  out, stats = jax.eval_shape(lambda v, *inputs: nets.forward(net, v, *inputs, train=train), variables, *inputs)
  if isinstance(out, Output):
    assert out.stages[0].dtype == jnp.bfloat16, "it computes in half precision"
    out = out.replace(stages=())
  assert len(jax.tree.leaves(stats)) >= 6
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((variables, stats, out)))


@pytest.mark.parametrize(
  ("name", "word"),
  [
    ("resnet81", "resnet18"),
    ("wrn_17_1", "6n + 4"),
    ("wrn_4_1", "6n + 4"),
    ("wrn_16_0", "width"),
    ("wrn_1210_1", "up to 1204"),
    ("cifar_resnet1208", "up to 1202"),
    ("", "choose"),
  ],
)
def test_unknown_nets_are_refused(name, word):
  with pytest.raises(Refusal, match=word.replace("+", r"\+")):
    nets.classifier(name, 10)


def test_unknown_generators_are_refused():
  with pytest.raises(Refusal, match="divisible by 16"):
    nets.generator("dcgan", 10, 8, 1, 4)
  with pytest.raises(Refusal, match="did you mean 'dcgan'"):
    nets.generator("dcgam", 10, 64, 3, 4)


def test_conversion_names_every_misfit():
  twin, net = zoo.WideResNet(10, 1, 10), nets.classifier("wrn_10_1", 12)
  state = zoo.arrays(twin)
  state["surplus"] = state.pop("bn1.weight")
  with pytest.raises(Refusal, match=r"missing: bn1.weight; unexpected: surplus; wrong shape: .*fc.bias.*fc.weight"):
    convert.classifier_from_torch(state, shapes(net, jnp.zeros((2, 8, 8, 3))))


# How nets are called.


class Plain(nn.Module):
  """A user's module: plain logits, Flax's own batch norm, dropout before the last layer."""

  num_classes: int
  dtype: Any = None

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Conv(8, (3, 3), dtype=self.dtype, name="conv")(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
    x = nn.relu(nn.Dense(16, dtype=self.dtype, name="hidden")(jnp.mean(x, (1, 2))))
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(self.num_classes, dtype=self.dtype, name="last")(x)


class InSetup(nn.Module):
  """Another: layers made in `setup`, no batch norm, `train` by keyword only."""

  def setup(self):
    self.flat = nn.Dense(5)
    self.last = nn.Dense(3)

  def __call__(self, x, *, train=False):
    return self.last(nn.tanh(self.flat(x.reshape(x.shape[0], -1))))


class Tokens(nn.Module):
  """A net whose stages are tokens (N, T, K), and which publishes its own statistics if it is to."""

  publishes: bool = False

  @nn.compact
  def __call__(self, x, train: bool):
    tokens = nn.Dense(6, name="embed")(x.reshape(x.shape[0], -1, x.shape[-1]))
    second = nn.LayerNorm(name="norm")(tokens)
    mean = {"mean": jnp.mean(second, (0, 1)), "var": jnp.var(second, (0, 1))}
    own = Statistics({"norm": mean}, {"norm": mean}) if self.publishes else None
    return nets.outputs(second, (tokens, second), 3, "linear").replace(statistics=own)


def images(size=8):
  return jax.random.normal(jax.random.key(0), (4, size, size, 3))


def test_statistics_are_the_moments_of_batch_norm():
  net, x = nets.classifier("wrn_10_1", 3), images()
  variables = nets.init(net, jax.random.key(1), x)
  out = jax.jit(lambda v, x: nets.forward_observed(net, v, x))(variables, x)
  assert_trees_close(out.replace(statistics=None), jitted_forward(net, False)(variables, x)[0], 1e-6)
  assert out.statistics.seen.keys() == out.statistics.stored.keys() and len(out.statistics.seen) == 7
  for path, stored in out.statistics.stored.items():
    here = variables["batch_stats"]
    for name in path:
      here = here[name]
    np.testing.assert_array_equal(stored["mean"], here["mean"])
    assert out.statistics.seen[path]["var"].shape == here["var"].shape
  assert nets.has_statistics(net, (8, 8, 3))


def test_a_net_may_publish_statistics_of_its_own():
  for publishes in (True, False):
    net, x = Tokens(publishes), images()
    statistics = nets.forward_observed(net, nets.init(net, jax.random.key(1), x), x).statistics
    assert list(statistics.seen) == ["norm"] if publishes else statistics is None
    assert nets.has_statistics(net, (8, 8, 3)) == publishes


def test_stages_of_tokens_are_projected():
  net, x = nets.StageProjections(Tokens(), (4, 5)), images()
  variables = nets.init(net, jax.random.key(1), x)
  out, _ = nets.forward(net, variables, x, train=False)
  assert [p.shape for p in out.projected] == [(4, 4), (4, 5)]
  layer = variables["params"]["stage_1"]
  want = np.mean(out.stages[1], 1) @ layer["kernel"] + layer["bias"]
  assert_close(out.projected[1], want, 1e-5)
  assert_close(out.pooled, np.mean(out.stages[1], 1), 1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_deployed_is_the_classifier_itself_in_float32(wrapped):
  """Its variables are the trained ones, and its outputs those of the net computed in float32 from the start."""
  inner, x = nets.classifier("wrn_10_1", 3, jnp.bfloat16), images()
  net = nets.StageProjections(nets.FeatureHead(inner, 24), (4, 5, 6)) if wrapped else inner
  variables = nets.init(net, jax.random.key(1), x)
  deployed, theirs = nets.deployed(net, variables)
  assert deployed == nets.classifier("wrn_10_1", 3)
  below = {name: tree["net"]["net"] if wrapped else tree for name, tree in variables.items()}
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, theirs, below))
  assert nets.deployed(net, {})[0] == deployed and nets.deployed(deployed, theirs)[0] == deployed
  stages = nets.forward(deployed, theirs, x, train=False)[0].stages
  assert all(stage.dtype == jnp.float32 for stage in stages)


def test_deployed_keeps_a_float32_net_as_it_is():
  net = Plain(3, jnp.float32)
  assert nets.deployed(net, {})[0] is net
  assert nets.deployed(Plain(3, jnp.float16), {})[0] == Plain(3)
  assert nets.deployed(nets.adapt(Plain(3, jnp.bfloat16), (8, 8, 3)), {})[0] == nets.adapt(Plain(3), (8, 8, 3))


def test_is_head():
  net = nets.FeatureHead(nets.classifier("wrn_10_1", 3), 24)
  params = jax.eval_shape(lambda: nets.init(net, jax.random.key(0), images()))["params"]
  found = jax.tree_util.tree_map_with_path(lambda path, _: nets.is_head(path), params)
  assert all(jax.tree.leaves([found["head_0"], found["head_2"]])) and not any(jax.tree.leaves(found["net"]))
  assert nets.is_head(("head_2", "bias")) and not nets.is_head(("net", "head_2")) and not nets.is_head(())


@pytest.mark.parametrize(
  ("module", "width", "observed"), [(Plain(3), 16, True), (InSetup(), 5, False)], ids=["compact", "setup"]
)
def test_plain_logits_are_adapted(module, width, observed):
  """The wrapper takes the module's own variables, alone and below a feature head."""
  x, keys = images(), {"params": jax.random.key(1), "dropout": jax.random.key(2)}
  variables = module.init(keys, x, train=True)
  net = nets.adapt(module, (8, 8, 3))
  out = net.apply(variables, x, train=False)
  np.testing.assert_array_equal(out.logits, module.apply(variables, x, train=False))
  last = variables["params"]["last"]
  assert_close(out.pooled @ last["kernel"] + last["bias"], out.logits, 1e-6)
  np.testing.assert_allclose(np.linalg.norm(out.features, axis=1), 1, rtol=1e-5)
  assert out.features.shape == out.pooled.shape == (4, width) and out.stages == ()
  assert nets.feature_width(net, (8, 8, 3)) == width and nets.has_statistics(net, (8, 8, 3)) == observed
  fresh, own = (nets.init(m, keys["params"], x) for m in (net, module))
  assert jax.tree.all(jax.tree.map(jnp.array_equal, fresh, own))
  trained, moved = net.apply(variables, x, train=True, rngs={"dropout": keys["dropout"]}, mutable=["batch_stats"])
  want, theirs = module.apply(variables, x, train=True, rngs={"dropout": keys["dropout"]}, mutable=["batch_stats"])
  np.testing.assert_array_equal(trained.logits, want)
  assert jax.tree.all(jax.tree.map(jnp.array_equal, moved, theirs))
  seen = nets.forward_observed(net, variables, x).statistics
  assert list(seen.seen) == [("norm",)] if observed else seen is None
  head = nets.FeatureHead(net, 7)
  below = nets.init(head, jax.random.key(1), x)
  assert jax.tree.map(jnp.shape, below["params"]["net"]) == jax.tree.map(jnp.shape, variables["params"])
  assert nets.forward(head, below, x, train=False)[0].features.shape == (4, 7)
  assert nets.deployed(head, below)[0] == net


def test_modules_that_return_outputs_are_left_as_they_are():
  for net in (nets.classifier("wrn_10_1", 3), Tokens(), nets.adapt(Plain(3), (8, 8, 3))):
    assert nets.adapt(net, (8, 8, 3)) is net


class WithoutDense(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return jnp.mean(nn.Conv(3, (1, 1))(x), (1, 2))


class Pairs(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(3)(jnp.mean(x, (1, 2))), x


class Maps(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nn.Dense(3)(x)


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (WithoutDense(), "features of WithoutDense cannot be found: it must end in a flax.linen.Dense"),
    (Pairs(), "Pairs returned tuple; expected logits"),
    (Maps(), r"Maps returned an array of shape \(2, 8, 8, 3\); expected logits"),
    (print, "expected a flax.linen.Module"),
  ],
)
def test_modules_that_cannot_be_adapted_are_refused(module, message):
  with pytest.raises(Refusal, match=message):
    nets.adapt(module, (8, 8, 3))


def named(name):
  """A module whose argument that says whether it is trained has this name; with None it has none."""
  trained = "False" if name is None else f"{'not ' * (name in adapted.EVALUATES)}{name}"
  space = {"nn": nn, "__name__": __name__}
  text = f"""class Mine(nn.Module):
  @nn.compact
  def __call__(self, x{", " * bool(name)}{name or ""}):
    x = nn.BatchNorm(use_running_average=not ({trained}))(nn.Conv(4, (3, 3))(x))
    return nn.Dense(3)(nn.relu(x).mean((1, 2)))"""
  exec(text, space)
  return space["Mine"]()


@pytest.mark.parametrize("name", [None, "", *adapted.TRAINS, *adapted.EVALUATES])
def test_the_argument_that_says_whether_it_is_trained_has_many_names(name):
  module, x = KeywordOnly() if name == "" else named(name), images()
  net = nets.adapt(module, (8, 8, 3))
  variables = nets.init(net, jax.random.key(0), x)
  tested, same = nets.forward(net, variables, x, train=False)
  trained, moved = nets.forward(net, variables, x, train=True)
  assert tested.logits.shape == (4, 3) and tested.features.shape == (4, 4)
  assert nets.takes_flag(net) == (name is not None)
  assert (checkpoint.digest(moved) != checkpoint.digest(same)) == (name is not None)
  assert bool(jnp.any(trained.logits != tested.logits)) == (name is not None)


class KeywordOnly(nn.Module):
  @nn.compact
  def __call__(self, x, *, training: bool = False, size: int = 4):
    x = nn.BatchNorm(use_running_average=not training)(nn.Conv(size, (3, 3))(x))
    return nn.Dense(3)(nn.relu(x).mean((1, 2)))


class Tempered(nn.Module):
  @nn.compact
  def __call__(self, x, training, temperature):
    logits = nn.Dense(3)(x.mean((1, 2)))
    return {"logits": logits / temperature, "features": x}


class Dictionary(nn.Module):
  @nn.compact
  def __call__(self, x, deterministic=True):
    return {"logits": nn.Dense(3)(x.mean((1, 2)))}


@pytest.mark.parametrize("module", [Pairs(), Dictionary(), WithoutDense(), Tempered()])
def test_the_lines_of_a_refusal_adapt_a_module(module):
  """They are carried out as they are shown, and take the variables of the module itself."""
  shown, space = None, {type(module).__name__: type(module), "cpsc_jax": cpsc_jax}
  for _ in range(2):  # an argument more, and then what it returns
    try:
      nets.adapt(module, (8, 8, 3))
      break
    except Refusal as refusal:
      first, *shown = str(refusal).splitlines()
      assert len(shown) == 3 and "A subclass adapts it" in first
      exec("\n".join(shown).replace("temperature=...", "temperature=2.0"), space)
      module = space[f"My{type(module).__name__}"]()
      space[type(module).__name__] = type(module)
  net, x = nets.adapt(module, (8, 8, 3)), images()
  variables = nets.init(net, jax.random.key(0), x)
  assert set(variables["params"]) <= {"Dense_0", "Conv_0"}
  assert nets.forward(net, variables, x, train=False)[0].logits.shape == (4, 3)


def test_a_dropout_key_reaches_the_net():
  net, x = nets.adapt(Plain(3), (8, 8, 3)), images()
  variables = nets.init(net, jax.random.key(0), x)

  def logits(key, train=True):
    return np.asarray(nets.forward(net, variables, x, train=train, key=key)[0].logits)

  one, again, other = logits(jax.random.key(1)), logits(jax.random.key(1)), logits(jax.random.key(2))
  np.testing.assert_array_equal(one, again)
  assert np.any(one != other)
  np.testing.assert_array_equal(logits(None, train=False), logits(jax.random.key(1), train=False))
  with pytest.raises(Exception, match="dropout"):
    logits(None)


@pytest.mark.parametrize(
  ("net", "inputs", "convolutions"),
  [
    (nets.classifier("wrn_10_1", 3), IMAGES, 9),
    (nets.generator("dcgan", 3, 16, 3, 2), LATENTS, 5),
  ],
  ids=["wrn_10_1", "dcgan"],
)
def test_rematerialisation_keeps_convolutions(net, inputs, convolutions):
  """Under the policy that saves SAVED the gradient has no convolution more than without, and the same values."""
  variables = nets.init(net, jax.random.key(0), *inputs)
  inputs = tuple(jax.random.normal(jax.random.key(1), x.shape) if x.ndim > 1 else x for x in inputs)
  save_convolutions = jax.checkpoint_policies.save_only_these_names(SAVED)

  def loss(params):
    out, _ = nets.forward(net, {**variables, "params": params}, *inputs, train=True)
    return jnp.mean(jnp.square(getattr(out, "logits", out)))

  def gradient(function):
    return jax.jit(jax.value_and_grad(function))

  def native_convolutions(function):
    text = gradient(function).trace(variables["params"]).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("stablehlo.convolution(")

  plain = native_convolutions(loss)
  assert native_convolutions(jax.checkpoint(loss, policy=save_convolutions)) == plain
  assert native_convolutions(jax.checkpoint(loss)) > plain, "without the policy they are recomputed"
  names = str(jax.make_jaxpr(loss)(variables["params"])).count(f"name={SAVED}")
  assert names == convolutions
  value, grads = gradient(loss)(variables["params"])
  again, same = gradient(jax.checkpoint(loss, policy=save_convolutions))(variables["params"])
  assert_close(again, value, 1e-6)
  assert_trees_close(same, grads, 1e-5)
