"""Every network against an independent PyTorch version, by way of the weight converter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, assert_trees_close, cast, jitted_forward, nhwc, shapes

from cpsc_jax import convert, nets
from cpsc_jax.errors import Refusal

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
  assert out.features.shape == (2, out.stages[-1].shape[-1])
  assert out.head_features is None


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
  loss = lambda params: jnp.sum(net.apply({**variables, "params": params}, x, train=False).head_features[:, 0])
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


@pytest.mark.parametrize(
  ("name", "word"),
  [("resnet81", "resnet18"), ("wrn_17_1", "6n + 4"), ("wrn_4_1", "6n + 4"), ("wrn_16_0", "width"), ("", "choose")],
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
  with pytest.raises(
    Refusal, match=r"missing: bn1.weight; unexpected: surplus; of another shape: .*fc.bias.*fc.weight"
  ):
    convert.classifier_from_torch(state, shapes(net, jnp.zeros((2, 8, 8, 3))))
