"""The networks by name, and the three ways they are called."""

import difflib
import re
from functools import partial

import jax
import jax.numpy as jnp
from clu import parameter_overview

from cpsc_jax.errors import Refusal
from cpsc_jax.nets import resnet, vgg
from cpsc_jax.nets.generators import CifarGenerator, DCGANGenerator, Pixels
from cpsc_jax.nets.layers import Critic, FeatureHead, StageProjections, observe_batch_norm, outputs
from cpsc_jax.nets.mobilenet import MobileNetV2
from cpsc_jax.nets.thin_resnet import CifarResNet, SmallResNet
from cpsc_jax.nets.wide_resnet import WideResNet

# name -> (num_classes, dtype=None) -> a module whose apply(variables, x (N, H, W, K), train=...) gives an `Output`.
# Scripts may add their own (README.md).
NETS = {
  "resnet18": resnet.resnet18,
  "resnet34": resnet.resnet34,
  "resnet50": resnet.resnet50,
  "vgg11": vgg.vgg11,
  "vgg13": vgg.vgg13,
  "vgg16": vgg.vgg16,
  "imagenet_resnet18": partial(resnet.resnet18, imagenet=True),
  "imagenet_resnet34": partial(resnet.resnet34, imagenet=True),
  "imagenet_resnet50": partial(resnet.resnet50, imagenet=True),
  "imagenet_vgg11": vgg.imagenet_vgg11,
  "imagenet_vgg13": vgg.imagenet_vgg13,
  "imagenet_vgg16": vgg.imagenet_vgg16,
  "imagenet_vgg19": vgg.imagenet_vgg19,
  "mobilenet_v2": MobileNetV2,
}

THIN = {"cifar": CifarResNet, "small": SmallResNet}

GENERATORS = {"cifar": CifarGenerator, "dcgan": DCGANGenerator, "pixels": Pixels}


def classifier(name, num_classes, dtype=None):
  """The classifier called `name`: a row of NETS, wrn_D_K (D = 6n + 4), or cifar_resnetD or small_resnetD (D = 6n + 2).

  Raises:
    Refusal: the name is none of these.
  """
  wide = re.fullmatch(r"wrn_(\d+)_(\d+)", name)
  if wide:
    depth, widen = map(int, wide.groups())
    if depth < 10 or (depth - 4) % 6 or widen < 1:
      raise Refusal(f"no net '{name}': the depth of a wide ResNet is 6n + 4 (10, 16, 22, 28, 40, ...), its width >= 1.")
    return WideResNet(depth, widen, num_classes, dtype)
  thin = re.fullmatch(r"(cifar|small)_resnet(\d+)", name)
  if thin:
    depth = int(thin[2])
    if depth < 8 or (depth - 2) % 6:
      raise Refusal(f"no net '{name}': the depth of such a ResNet is 6n + 2 (8, 14, 20, 26, 32, 44, 56, 110, ...).")
    return THIN[thin[1]](depth, num_classes, dtype)
  if name not in NETS:
    others = "wrn_D_K, cifar_resnetD, small_resnetD"
    raise Refusal(f"no net '{name}'; choose one of {', '.join(NETS)}, {others}{suggestion(name, NETS)}.")
  return NETS[name](num_classes, dtype)


def generator(name, num_classes, image_size, channels, width, dtype=None):
  """The generator called `name` for square images.

  Raises:
    Refusal: unknown name, or an image size that the generator's upsampling does not divide.
  """
  if name not in GENERATORS:
    raise Refusal(f"no generator '{name}'; choose one of {', '.join(GENERATORS)}{suggestion(name, GENERATORS)}.")
  kind = GENERATORS[name]
  if image_size % kind.divisor:
    fitting = [n for n, g in GENERATORS.items() if g is not Pixels and image_size % g.divisor == 0]
    raise Refusal(
      f"generator '{name}' needs an image size divisible by {kind.divisor}, not {image_size}"
      + (f"; '{fitting[0]}' fits." if fitting else ".")
    )
  return kind(num_classes, image_size, channels, width, dtype)


def suggestion(name, names):
  close = difflib.get_close_matches(name, names, 1)
  return f" (did you mean '{close[0]}'?)" if close else ""


def forward(net, variables, *inputs, train):
  """Applies a net and returns (its output, its batch statistics afterwards).

  In training mode the batch's own statistics normalise and the running ones move; in evaluation mode nothing moves.
  """
  if not train:
    return net.apply(variables, *inputs, train=False), variables.get("batch_stats", {})
  output, moved = net.apply(variables, *inputs, train=True, mutable=["batch_stats"])
  return output, moved.get("batch_stats", {})


def forward_observed(net, variables, x):
  """A frozen net in evaluation mode: (output, moments, running), as `losses.bn_statistics` takes them.

  Without batch norm both are empty, and the variables need no "batch_stats".
  """
  output, moments = observe_batch_norm(lambda: net.apply(variables, x, train=False))
  return output, moments, {path: _at(variables["batch_stats"], path) for path in moments}


def init(net, key, *inputs):
  """Fresh variables {"params", "batch_stats"}; one compiled program, so that large nets start quickly."""
  variables = jax.jit(lambda k: net.init(k, *inputs, train=True))(key)
  return {"params": variables.get("params", {}), "batch_stats": variables.get("batch_stats", {})}


def output_shapes(net, image_shape):
  """The `Output` of two images of that shape, as shapes; nothing is computed."""
  output = lambda key, x: net.init_with_output(key, x, train=False)[0]
  return jax.eval_shape(output, jax.random.key(0), jnp.zeros((2, *image_shape)))


def feature_width(net, image_shape):
  """D of the net's features (N, D) on images of that shape; nothing is computed."""
  return output_shapes(net, image_shape).features.shape[-1]


def has_batch_norm(net, image_shape):
  """Whether `forward_observed` would observe anything on images of that shape; nothing is computed."""
  seen = lambda key, x: observe_batch_norm(lambda: net.init_with_output(key, x, train=False))[1]
  return bool(jax.eval_shape(seen, jax.random.key(0), jnp.zeros((2, *image_shape))))


def count_parameters(params):
  return int(parameter_overview.count_parameters(params))


def without_head(net, variables):
  """(net, variables) of the classifier alone: what is deployed has no feature head and no projections."""
  while isinstance(net, FeatureHead | StageProjections):
    net, variables = net.net, {collection: tree["net"] if tree else {} for collection, tree in variables.items()}
  return net, variables


def _at(tree, path):
  for name in path:
    tree = tree[name]
  return tree


__all__ = [
  "NETS",
  "Critic",
  "FeatureHead",
  "StageProjections",
  "classifier",
  "count_parameters",
  "feature_width",
  "forward",
  "forward_observed",
  "generator",
  "has_batch_norm",
  "init",
  "output_shapes",
  "outputs",
  "without_head",
]
