"""The networks by name, and how they are called."""

import collections
import difflib
import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from clu import parameter_overview
from flax.traverse_util import flatten_dict, unflatten_dict

from cpsc_jax import streams
from cpsc_jax.errors import Refusal
from cpsc_jax.nets import resnet, vgg
from cpsc_jax.nets.adapted import Adapted, adapt, takes_flag
from cpsc_jax.nets.batch_norm import in_parts
from cpsc_jax.nets.generators import (
  PLAIN,
  CifarGenerator,
  DCGANGenerator,
  Form,
  NoisyLayers,
  Pixels,
  with_embedding,
)
from cpsc_jax.nets.layers import (
  HEAD,
  Dtype,
  FeatureHead,
  RelationMaps,
  ReLU,
  StageProjections,
  observe_batch_norm,
  outputs,
  torch_uniform,
)
from cpsc_jax.nets.mobilenet import MobileNetV2
from cpsc_jax.nets.quantised import FLOAT, Quantised, is_int8, quantise, ranges_without_data
from cpsc_jax.nets.quantised import words as quantised_words
from cpsc_jax.nets.thin_resnet import CifarResNet, SmallResNet
from cpsc_jax.nets.wide_resnet import WideResNet
from cpsc_jax.state import Output, Statistics, Tree
from cpsc_jax.streams import Stream

# name -> (num_classes, dtype=None) -> a module whose apply(variables, x (N, H, W, K), train=...) gives an `Output`.
# Scripts may add rows of their own.
NETS: dict[str, Callable[..., nn.Module]] = {
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

DEEPEST, WIDEST = 1204, 100  # of nets that are named by a number: ones beyond would take hours to build

GENERATORS = {"cifar": CifarGenerator, "dcgan": DCGANGenerator, "pixels": Pixels}


def classifier(name: str, num_classes: int, dtype: Dtype = None) -> nn.Module:
  """The classifier called `name`: a row of NETS, wrn_D_K (D = 6n + 4), or cifar_resnetD or small_resnetD (D = 6n + 2).

  With a `dtype` of 16 bits, convolutions compute in it; parameters, batch statistics and logits stay float32.

  Raises:
    Refusal: the name is none of these.
  """
  wide = re.fullmatch(r"wrn_([0-9]{1,9})_([0-9]{1,9})", name)
  if wide:
    depth, widen = map(int, wide.groups())
    if not 10 <= depth <= DEEPEST or (depth - 4) % 6 or not 1 <= widen <= WIDEST:
      raise Refusal(
        f"no net '{name}': the depth of a wide ResNet is 6n + 4 (10, 16, 22, 28, 40, ..., up to {DEEPEST}), its width 1"
        f" to {WIDEST}."
      )
    return WideResNet(depth, widen, num_classes, dtype)
  thin = re.fullmatch(r"(cifar|small)_resnet([0-9]{1,9})", name)
  if thin:
    depth = int(thin[2])
    if not 8 <= depth <= DEEPEST or (depth - 2) % 6:
      raise Refusal(
        f"no net '{name}': the depth of such a ResNet is 6n + 2 (8, 14, 20, 26, 32, 44, 56, 110, ..., up to 1202)."
      )
    return THIN[thin[1]](depth, num_classes, dtype)
  if name not in NETS:
    others = "wrn_D_K, cifar_resnetD, small_resnetD"
    raise Refusal(f"no net '{name}'; choose one of {', '.join(NETS)}, {others}{suggestion(name, NETS)}.")
  return NETS[name](num_classes, dtype)


def generator(
  name: str,
  num_classes: int,
  image_size: int,
  channels: int,
  width: int,
  dtype: Dtype = None,
  form: Form = PLAIN,
) -> nn.Module:
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
  return kind(num_classes, image_size, channels, width, dtype, form)


def suggestion(name: str, names: Iterable[str]) -> str:
  close = difflib.get_close_matches(name, names, 1)
  return f" (did you mean '{close[0]}'?)" if close else ""


def forward(
  net: nn.Module,
  variables: Tree,
  *inputs: jax.Array,
  train: bool,
  key: jax.Array | None = None,
  norm_parts: int = 1,
) -> tuple[Any, Tree]:
  """Applies a net and returns (its output, its batch statistics afterwards).

  In training mode the batch's own statistics normalise and the running ones move; in evaluation mode nothing moves.
  `key` is the net's random stream "dropout"; nets without dropout need none. `norm_parts` is `batch_norm.in_parts`.
  """
  rngs = None if key is None else {"dropout": key}
  if not train:
    return net.apply(variables, *inputs, train=False, rngs=rngs), variables.get("batch_stats", {})
  with in_parts(norm_parts):
    output, moved = net.apply(variables, *inputs, train=True, rngs=rngs, mutable=["batch_stats"])
  return output, moved.get("batch_stats", {})


def forward_observed(net: nn.Module, variables: Tree, x: jax.Array) -> Output:
  """The output of a frozen classifier in evaluation mode, with `statistics` filled in.

  They are the moments that its batch norm layers see, {module path: {"mean", "var"}}, unless the net publishes
  statistics of its own; None where there are neither. Without batch norm the variables need no "batch_stats".
  """
  output, seen = observe_batch_norm(lambda: net.apply(variables, x, train=False))
  if output.statistics is not None or not seen:
    return output
  return output.replace(statistics=Statistics(seen, {path: _at(variables["batch_stats"], path) for path in seen}))


def init(net: nn.Module, key: jax.Array, *inputs: jax.Array, kernels: str = "kaiming") -> dict[str, Tree]:
  """Fresh variables {"params", "batch_stats"}; one compiled program, so that large nets start quickly.

  What a feature head or stage projections are put around starts as it would by itself. With `kernels` "torch" all
  convolutions start from PyTorch's default, U(-1, 1) / sqrt(fan in), in place of what the net has for them.
  """
  if isinstance(net, FeatureHead | StageProjections | RelationMaps):
    inner = init(net.net, key, *inputs, kernels=kernels)
    outer = _fresh(net, streams.key(key, Stream.HEAD_INIT), *inputs)
    return {name: {**outer[name], **({"net": inner[name]} if inner[name] else {})} for name in outer}
  variables = _fresh(net, key, *inputs)
  if kernels == "torch":
    variables["params"] = _torch_kernels(variables["params"], streams.key(key, Stream.KERNELS_INIT))
  return variables


def _fresh(net, key, *inputs):
  # By itself it runs once, and on CPUs most of its time would go into LLVM's optimisation.
  once = jax.default_backend() == "cpu" and not any(isinstance(x, jax.core.Tracer) for x in (key, *inputs))
  options = {"xla_backend_optimization_level": 0} if once else None
  try:
    begin = _init_of(net)
  except TypeError:  # a user's net with fields that cannot be hashed
    begin = partial(net.init, train=True)
  variables = jax.jit(begin, compiler_options=options)(_init_rngs(key), *inputs)
  return {"params": variables.get("params", {}), "batch_stats": variables.get("batch_stats", {})}


@lru_cache(maxsize=64)
def _init_of(net: nn.Module) -> Callable[..., Tree]:
  """The same function for equal nets, by which JAX knows that it is compiled."""
  return partial(net.init, train=True)


def inherited(variables: Tree, teacher: Tree) -> tuple[Tree, int]:
  """(variables that start as the teacher's layers of the same path, how many of their parameters do).

  A layer is what has parameters of its own; it is taken with its batch statistics or not at all. Where the teacher's is
  wider, evenly spaced channels of it are taken, the same ones wherever two layers meet, so that they are a part of the
  teacher (uniform element selection, Xu et al., ICLR 2024). What a feature head or stage projections are put around
  counts under its own names.
  """

  def layers(flat: dict[tuple[str, ...], jax.Array]) -> dict[tuple[str, ...], dict[tuple[str, str], tuple[str, ...]]]:
    """{path of a layer: {(collection, name): its key in `flat`}}, below what is put around a net."""
    found = collections.defaultdict(dict)
    for key in flat:
      collection, *path, name = key
      found[tuple(itertools.dropwhile(lambda part: part == "net", path))][collection, name] = key
    return found

  ours, theirs, taken = flatten_dict(variables), flatten_dict(teacher), 0
  given = layers(theirs)
  for path, layer in layers(ours).items():
    source = given.get(path, {})
    if layer.keys() == source.keys() and all(_contains(theirs[source[n]], ours[layer[n]]) for n in layer):
      taken += sum(ours[key].size for (collection, _), key in layer.items() if collection == "params")
      ours |= {key: _evenly(theirs[source[name]], ours[key].shape) for name, key in layer.items()}
  return {**variables, **unflatten_dict(ours)}, taken


def _contains(wide: jax.Array, narrow: jax.Array) -> bool:
  """Whether an array differs from another at most in having more channels: of its last two axes, in and out."""
  same = wide.dtype == narrow.dtype and wide.shape[:-2] == narrow.shape[:-2] and wide.ndim == narrow.ndim
  return same and all(more >= fewer for more, fewer in zip(wide.shape, narrow.shape, strict=True))


def _evenly(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The part of an array that has this shape, evenly spaced along each axis."""
  for axis, (have, want) in enumerate(zip(array.shape, shape, strict=True)):
    if have != want:
      array = jnp.take(array, jnp.arange(want) * have // want, axis)
  return array


def _torch_kernels(params, key):
  def redraw(path, leaf):
    if leaf.ndim != 4:
      return leaf
    own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
    return torch_uniform(math.prod(leaf.shape[:3]))(own, leaf.shape, leaf.dtype)

  return jax.tree_util.tree_map_with_path(redraw, params)


def output_shapes(net: nn.Module, image_shape: tuple[int, ...]) -> Output:
  """The `Output` for two images (H, W, K), as shapes; nothing is computed."""
  output, _ = jax.eval_shape(partial(net.init_with_output, train=False), *_abstract_inputs(image_shape))
  return output


def feature_width(net: nn.Module, image_shape: tuple[int, ...]) -> int:
  """D of the net's features (N, D) on images (H, W, K); nothing is computed."""
  return output_shapes(net, image_shape).features.shape[-1]


def classifier_path(net: nn.Module, image_shape: tuple[int, ...]) -> tuple[str, ...]:
  """Where among the parameters the linear layer stands that makes logits of features.

  Raises:
    Refusal: no layer or more than one has a kernel of that shape.
  """
  output, variables = jax.eval_shape(partial(net.init_with_output, train=False), *_abstract_inputs(image_shape))
  shape = output.features.shape[-1], output.logits.shape[-1]
  flat = flatten_dict(variables["params"])
  found = [path[:-1] for path, leaf in flat.items() if path[-1] == "kernel" and leaf.shape == shape]
  if len(found) != 1:
    raise Refusal(
      f"{len(found) or 'no'} layers of {type(net).__name__} have a kernel {shape} from features to logits, so that its"
      " classifier cannot be found; choose another config.generator.embedding or config.student.classifier."
    )
  return found[0]


def classifier_layer(net: nn.Module, variables: Tree, image_shape: tuple[int, ...]) -> Tree:
  """The parameters of a net's classifier (see `classifier_path`): "kernel" (D, C), and "bias" if it has one."""
  return _at(variables["params"], classifier_path(net, image_shape))


def with_classifier(params: Tree, path: tuple[str, ...], layer: Tree) -> Tree:
  """A net's parameters with `layer` as its classifier, which stands at `path`."""
  name, *rest = path
  return {**params, name: with_classifier(params[name], tuple(rest), layer) if rest else layer}


def observed_shapes(net: nn.Module, image_shape: tuple[int, ...]) -> Output:
  """What `forward_observed` gives for two images (H, W, K), as shapes; nothing is computed."""

  def observed(rngs, x):
    return forward_observed(net, net.init(rngs, x, train=False), x)

  return jax.eval_shape(observed, *_abstract_inputs(image_shape))


def has_statistics(net: nn.Module, image_shape: tuple[int, ...]) -> bool:
  """Whether `forward_observed` gives statistics for images (H, W, K); nothing is computed."""
  return observed_shapes(net, image_shape).statistics is not None


def count_parameters(params: Tree) -> int:
  return int(parameter_overview.count_parameters(params))


def deployed(net: nn.Module, variables: Tree) -> tuple[nn.Module, Tree]:
  """(net, variables) of the classifier itself, computing in float32: what is reported, saved and exported.

  Feature head and projections are taken off. A net with a field `dtype` of 16 bits gets None there, so that it computes
  in the precision of its parameters, float32.
  """
  while isinstance(net, FeatureHead | StageProjections | RelationMaps):
    net, variables = net.net, {collection: tree["net"] if tree else {} for collection, tree in variables.items()}
  return _in_full_precision(net), variables


def is_head(path: Sequence[Any]) -> bool:
  """Whether the parameter at `path` belongs to a feature head rather than to the net under it.

  `path` is one of jax.tree_util.tree_map_with_path over the params of a net, or a tuple of names.
  """
  return bool(path) and getattr(path[0], "key", path[0]) in HEAD


def _in_full_precision(net):
  if isinstance(net, Adapted | Quantised):
    return net.clone(wrapped_module=_in_full_precision(net.wrapped_module))
  dtype = getattr(net, "dtype", None)
  return net.clone(dtype=None) if dtype is not None and jnp.dtype(dtype).itemsize < 4 else net


def _init_rngs(key):
  return {"params": key, "dropout": streams.key(key, streams.Stream.DROPOUT)}


def _abstract_inputs(image_shape):
  return _init_rngs(jax.random.key(0)), jnp.zeros((2, *image_shape))


def _at(tree, path):
  for name in path:
    tree = tree[name]
  return tree


__all__ = [
  "FLOAT",
  "GENERATORS",
  "NETS",
  "FeatureHead",
  "Form",
  "NoisyLayers",
  "Quantised",
  "ReLU",
  "RelationMaps",
  "StageProjections",
  "adapt",
  "classifier",
  "classifier_layer",
  "classifier_path",
  "count_parameters",
  "deployed",
  "feature_width",
  "forward",
  "forward_observed",
  "generator",
  "has_statistics",
  "inherited",
  "init",
  "is_head",
  "is_int8",
  "observed_shapes",
  "output_shapes",
  "outputs",
  "quantise",
  "quantised_words",
  "ranges_without_data",
  "suggestion",
  "takes_flag",
  "with_classifier",
  "with_embedding",
]
