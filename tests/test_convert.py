"""The converter's naming and arithmetic: every family against a PyTorch twin, and round trips bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import assert_close, assert_trees_close, jitted_forward, nhwc, shapes

from cpsc_jax import nets
from cpsc_jax.errors import Refusal
from cpsc_jax.interop import convert
from cpsc_jax.interop.convert import families, mapping
from cpsc_jax.interop.convert.mapping import Naming
from cpsc_jax.nets.mobilenet import InvertedResidual
from cpsc_jax.nets.vgg import adaptive_average

torch = pytest.importorskip("torch", reason="the PyTorch twins need torch: pip install -e '.[test]'")
import torch_zoo as zoo  # noqa: E402

# family -> net name, twin, image size of the test
KNOWN = {  # compared with their twins in test_nets.py
  "zoo_wrn": ("wrn_16_2", lambda: zoo.WideResNet(16, 2, 7), 16),
  "layered_wrn": ("wrn_10_1", lambda: zoo.WideResNet(10, 1, 7), 16),
  "zoo_resnet": ("resnet18", lambda: zoo.ResNet((2, 2, 2, 2), 7), 16),
  "zoo_vgg": ("vgg11", lambda: zoo.VGG((1, 1, 2, 2, 2), 7), 16),
}
NEW = {
  "cifar_resnet": ("cifar_resnet14", lambda: zoo.ThinResNet(14, 7, free=True), 16),
  "small_resnet": ("small_resnet14", lambda: zoo.ThinResNet(14, 7, free=False), 32),
  "torchvision_resnet": ("imagenet_resnet18", lambda: zoo.ImageNetResNet((2, 2, 2, 2), 7), 48),
  "torchvision_vgg": ("imagenet_vgg11", lambda: zoo.ImageNetVGG((1, 1, 2, 2, 2), 7, hidden=48), 32),
  "torchvision_mobilenet": ("mobilenet_v2", lambda: zoo.MobileNetV2(7), 48),
}
CLASSIFIERS = KNOWN | NEW
GENERATORS = {
  "cifar_generator": ("cifar", lambda: zoo.CifarGenerator(12, 4, 32, 3, 5), 32),
  "dcgan_generator": ("dcgan", lambda: zoo.DCGANGenerator(12, 4, 64, 3, 5), 64),
}


def small(name, num_classes=7):
  """The net called `name`, the linear layers of ImageNet's VGG as narrow as its twin's."""
  net = nets.classifier(name, num_classes)
  return net.clone(hidden=48) if name.startswith("imagenet_vgg") else net


def random_variables(net, *inputs):
  """Random float32 variables of a net, so that any reordering changes them."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.uniform(0.2, 1.2, s.shape).astype(np.float32), shapes(net, *inputs))


def test_every_family_is_tested():
  assert CLASSIFIERS.keys() | GENERATORS.keys() == families.FAMILIES.keys()


@pytest.mark.parametrize("family", NEW)
def test_net_equals_pytorch(family):
  """Logits, features and running statistics in both modes, in float64."""
  name, twin, size = NEW[family]
  torch.manual_seed(0)
  twin, net = zoo.randomise(twin()).double(), small(name)
  x = torch.randn(4, 3, size, size).double()
  with jax.enable_x64(True):
    ours = jnp.asarray(nhwc(x.numpy()))
    like = shapes(net, ours)
    assert nets.count_parameters(like["params"]) == sum(p.numel() for p in twin.parameters())
    variables = jax.tree.map(jnp.asarray, convert.from_torch(family, zoo.arrays(twin), like))
    for train in (False, True):
      twin.train(train)
      with torch.no_grad():
        logits, features = twin(x)
      out, stats = jitted_forward(net, train)(variables, ours)
      assert_close(out.logits, logits.numpy(), 1e-10, f"logits, train={train}")
      assert_close(out.features, features.numpy(), 1e-10, f"features, train={train}")
      np.testing.assert_allclose(np.linalg.norm(out.features, axis=1), 1, rtol=1e-6)
    assert_trees_close(stats, convert.from_torch(family, zoo.arrays(twin), like)["batch_stats"], 1e-10)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_gradients_equal_pytorchs(stride):
  """Those of a whole block of MobileNetV2 in training mode, which has a grouped convolution."""
  torch.manual_seed(0)
  twin, block = zoo.randomise(zoo.Inverted(6, 6, stride, 4)).double(), InvertedResidual(4, 6, stride)
  naming = Naming(((r"conv_.*", lambda m: m[0].replace("_", ".")),))
  x = torch.randn(4, 6, 8, 8).double().requires_grad_()
  y = twin(x)
  weight = torch.randn_like(y)
  (y * weight).sum().backward()
  with jax.enable_x64(True):
    ours, r = jnp.asarray(nhwc(x.detach().numpy())), nhwc(weight.numpy())
    like = shapes(block, ours)
    variables = mapping.from_torch(naming, zoo.arrays(twin), like)

    @jax.jit
    def gradients(params, x):
      def value(params, x):
        return jnp.sum(nets.forward(block, {**variables, "params": params}, x, train=True)[0] * r)

      return jax.grad(value, argnums=(0, 1))(params, x)

    grads, dx = gradients(variables["params"], ours)
    assert_close(dx, nhwc(x.grad.numpy()), 1e-10, "dx")
    theirs = zoo.arrays(twin) | {key: p.grad.numpy() for key, p in twin.named_parameters()}
    assert_trees_close(grads, mapping.from_torch(naming, theirs, like)["params"], 1e-10)


@pytest.mark.parametrize("family", CLASSIFIERS | GENERATORS)
def test_round_trip_is_bit_identical(family):
  """JAX -> PyTorch (strict loading) -> JAX."""
  name, twin, size = (CLASSIFIERS | GENERATORS)[family]
  if family in GENERATORS:
    net, inputs = nets.generator(name, 5, size, 3, 4), (jnp.zeros((2, 12)), jnp.zeros((2,), jnp.int32))
  else:
    net, inputs = small(name), (jnp.zeros((2, size, size, 3)),)
  variables, twin = random_variables(net, *inputs), twin()
  state = convert.to_torch(family, variables)
  recognised = families.recognise({key: array.shape for key, array in state.items()})
  assert recognised == (families.FAMILIES[family], name)
  assert all(array.flags.c_contiguous for array in state.values())
  assert state.keys() == (zoo.layered if family == "layered_wrn" else dict)(zoo.arrays(twin)).keys()
  if family in CLASSIFIERS:
    plain = zoo.layered(state) if family == "layered_wrn" else state
    twin.load_state_dict({key: torch.from_numpy(array) for key, array in plain.items()}, strict=True)
    state = zoo.arrays(twin)
    state = zoo.layered(state) if family == "layered_wrn" else state
  back = convert.from_torch(family, state, shapes(net, *inputs))
  jax.tree.map(np.testing.assert_array_equal, back, variables)


DEPTHS = {
  "wrn_": ("10_1", "16_4", "40_2"),
  "resnet": (18, 34, 50),
  "vgg": (11, 13, 16),
  "cifar_resnet": (8, 20, 32, 44, 56, 110),
  "small_resnet": (8, 14, 20, 26, 32),
  "imagenet_resnet": (18, 34, 50),
  "imagenet_vgg": (11, 13, 16, 19),
}


@pytest.mark.parametrize("name", [f"{kind}{depth}" for kind, depths in DEPTHS.items() for depth in depths])
def test_every_depth_is_recognised_and_round_trips(name):
  net, x = small(name, 9), jnp.zeros((2, 32, 32, 3))
  state = convert.to_torch(name, random_variables(net, x))
  found = {key: array.shape for key, array in state.items()}
  family, named = families.recognise(found)
  assert named == name and family.measure(found) == {"num_classes": 9, "channels": 3}
  again = convert.to_torch(name, convert.from_torch(name, state, shapes(net, x)))
  assert again.keys() == state.keys()
  assert all(again[key].tobytes() == state[key].tobytes() for key in state)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "vgg11_bn", "vgg16_bn", "mobilenet_v2"])
def test_names_are_torchvisions(name):
  models = pytest.importorskip("torchvision", reason="compares with torchvision itself").models
  with torch.device("meta"):
    theirs = {key: tuple(value.shape) for key, value in getattr(models, name)(num_classes=7).state_dict().items()}
  ours = name if name == "mobilenet_v2" else f"imagenet_{name.removesuffix('_bn')}"
  net = nets.classifier(ours, 7)
  like = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), shapes(net, jnp.zeros((2, 224, 224, 3))))
  assert {key: array.shape for key, array in convert.to_torch(ours, like).items()} == theirs


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 10, 14])
def test_adaptive_average_equals_pytorch(size):
  x = torch.randn(2, 3, size, size + 1)
  want = torch.nn.functional.adaptive_avg_pool2d(x, 7).numpy()
  assert_close(adaptive_average(jnp.asarray(nhwc(x.numpy())), 7), nhwc(want), 1e-6)


@pytest.mark.parametrize(("name", "size"), [("small_resnet8", 8), ("imagenet_vgg11", 16)])
def test_too_small_images_are_refused(name, size):
  with pytest.raises(Refusal, match="pixels"):
    shapes(nets.classifier(name, 3), jnp.zeros((2, size, size, 3)))


@pytest.mark.parametrize("name", ["cifar_resnet21", "small_resnet2", "imagenet_resnet19"])
def test_impossible_depths_are_refused(name):
  with pytest.raises(Refusal, match="6n|did you mean 'imagenet_resnet18'"):
    nets.classifier(name, 10)


def test_no_such_family():
  with pytest.raises(Refusal, match="no PyTorch family has a net 'alexnet'"):
    convert.to_torch("alexnet", {})
