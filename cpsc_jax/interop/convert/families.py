"""The families of PyTorch networks that the converter supports, recognised by the keys and shapes of a state dict."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from cpsc_jax.errors import Refusal
from cpsc_jax.interop.convert.mapping import ROWS, TRANSPOSED, Naming

MOST_BLOCKS = 200  # in a stage, as the deepest of these nets have; a file could otherwise make us build one for hours
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # as most public CIFAR code has it

RESIDUAL = (
  (r"(layer\d)_(\d+)/shortcut_conv", r"\1.\2.shortcut.0"),
  (r"(layer\d)_(\d+)/shortcut_bn", r"\1.\2.shortcut.1"),
  (r"(layer\d)_(\d+)/(\w+)", r"\1.\2.\3"),
)
ZOO = Naming(
  (
    (r"(block\d)_(\d+)/shortcut", r"\1.layer.\2.convShortcut"),  # wide ResNet
    (r"(block\d)_(\d+)/(\w+)", r"\1.layer.\2.\3"),
    (r"(block\d)_conv(\d+)", lambda m: f"{m[1]}.{3 * int(m[2])}"),  # VGG
    (r"(block\d)_bn(\d+)", lambda m: f"{m[1]}.{3 * int(m[2]) + 1}"),
    *RESIDUAL,
  )
)
LAYERED_WRN = Naming(
  (
    (r"block(\d)_(\d+)/shortcut", r"layer\1.layer.\2.convShortcut"),
    (r"block(\d)_(\d+)/(\w+)", r"layer\1.layer.\2.\3"),
    (r"fc", "linear"),
  )
)
TORCHVISION_RESNET = Naming(
  (
    (r"(layer\d)_(\d+)/shortcut_conv", r"\1.\2.downsample.0"),
    (r"(layer\d)_(\d+)/shortcut_bn", r"\1.\2.downsample.1"),
    (r"(layer\d)_(\d+)/(\w+)", r"\1.\2.\3"),
    (r"linear", "fc"),
  )
)
TORCHVISION_NUMBERED = Naming(((r"(features|classifier)_.*", lambda m: re.sub("[_/]", ".", m[0])),))
CIFAR_GENERATOR = Naming(
  (
    (r"project", "l1.0"),
    (r"cbn0", "conv_blocks0_0"),
    (r"cbn3", "conv_blocks3_2"),
    (r"conv(\d)", r"conv_blocks\1_0"),
    (r"cbn(\d)", r"conv_blocks\1_1"),
  ),
  {"project": ROWS},
)
DCGAN_GENERATOR = Naming(
  (
    (r"project", "project.1"),
    (r"cbn0", "conv_blocks0_0"),
    (r"conv(\d)", r"conv_blocks\1_0"),
    (r"cbn(\d)", r"conv_blocks\1_1"),
  ),
  {"project": ROWS, **{f"conv{i}": TRANSPOSED for i in range(1, 5)}},
)


class Family(NamedTuple):
  """A public PyTorch implementation of nets that `cpsc_jax.nets` has too.

  Attributes:
    title: shown to the user.
    nets: regular expression of the names of its nets in `cpsc_jax.nets`.
    naming: the keys of its state dicts.
    recognise: {key: shape} of a state dict -> the name of the net, or None.
    measure: {key: shape} -> {"num_classes", "channels"}, for a generator also "image_size", "latent_dim" and "width".
    normalisation: customary (mean, std) of its inputs; None: that of the data set.
    image_size: the customary size of its inputs in pixels; None: that of the data set.
  """

  title: str
  nets: str
  naming: Naming
  recognise: Callable[[dict[str, tuple[int, ...]]], str | None]
  measure: Callable[[dict[str, tuple[int, ...]]], dict[str, Any]]
  normalisation: tuple | None = None
  image_size: int | None = None


def of(name: str) -> Family:
  """The first family with a net called `name`, which is the one that `to_torch` writes.

  Raises:
    Refusal: no family has that net.
  """
  for family in FAMILIES.values():
    if re.fullmatch(family.nets, name):
      return family
  raise Refusal(f"no PyTorch family has a net '{name}'; the supported nets are {known_nets()}.")


def recognise(shapes: dict[str, tuple[int, ...]], name: str | None = None) -> tuple[Family, str]:
  """(family, net name) of a state dict given as {key: shape}; `name` restricts the search to families with that net.

  If `name` is given and no family recognises the state dict, the first family with that net is returned, so that the
  mapping can list what differs.

  Raises:
    Refusal: no family recognises it.
  """
  for family in FAMILIES.values():
    found = family.recognise(shapes)
    if found and (name is None or re.fullmatch(family.nets, name)):
      return family, name or found
  if name:
    return of(name), name
  some = ", ".join(str(key)[:100] for key in list(shapes)[:3])
  raise Refusal(
    f"no supported family has these keys ({some}, ...); use --arch NAME to list what differs from one of"
    f" {known_nets()}."
  )


def known_nets() -> str:
  """The names of all nets that have a PyTorch family, N for a number."""
  return ", ".join(dict.fromkeys(family.nets.replace(r"\d+", "N") for family in FAMILIES.values()))


def _count(shapes, prefix, suffix=""):
  """How many different numbers follow `prefix` in the keys that end with `suffix`.

  Raises:
    Refusal: more than MOST_BLOCKS.
  """
  keys = (key for key in shapes if key.startswith(prefix) and key.endswith(suffix))
  count = len({key.removeprefix(prefix).split(".")[0] for key in keys})
  if count > MOST_BLOCKS:
    raise Refusal(f"{count:,} blocks are named '{prefix}N', and no supported net has more than {MOST_BLOCKS}.")
  return count


def _size(shapes, key, axis=0):
  """A dimension of an array; 1 if there is none, so that the mapping can list what is missing."""
  return max(shapes[key][axis], 1) if len(shapes.get(key, ())) > axis else 1


def _ends(stem, head):
  """Measures a classifier by its first and last weights."""
  return lambda shapes: {"num_classes": _size(shapes, head), "channels": _size(shapes, stem, 1)}


FORM = {"conditional": True, "output": "tanh", "epsilon": 0.0, "init": "torch"}  # of the published code's generators


def _generator(first, width, image, wide, shrink):
  """Measures a generator by three of its weights.

  Its first feature map has `wide` times the channels of `width` and 1 / `shrink` of the image's height and width.
  """

  def measure(shapes):
    narrow = _size(shapes, width)
    side = max(math.isqrt(_size(shapes, first) // (wide * narrow)), 1)
    return {
      "num_classes": _size(shapes, "conv_blocks0_0.weights.weight"),
      "channels": _size(shapes, image),
      "image_size": shrink * side,
      "latent_dim": _size(shapes, first, 1),
      "width": narrow,
      **FORM,
    }

  return measure


def _wide(group, head):
  def recognise(shapes):
    first = f"{group}1.layer.0.conv1.weight"
    if first in shapes and head in shapes:
      depth = 6 * _count(shapes, f"{group}1.layer.") + 4
      return f"wrn_{depth}_{max(_size(shapes, first) // 16, 1)}"

  return recognise


def _residual(head, prefix):
  def recognise(shapes):
    if head in shapes and "layer4.0.conv1.weight" in shapes:
      blocks = tuple(_count(shapes, f"layer{stage}.") for stage in range(1, 5))
      kinds = {((2, 2, 2, 2), False): 18, ((3, 4, 6, 3), False): 34, ((3, 4, 6, 3), True): 50}
      depth = kinds.get((blocks, "layer1.0.conv3.weight" in shapes))
      return depth and f"{prefix}{depth}"

  return recognise


def _thin(stem, prefix):
  def recognise(shapes):
    three = "layer3.0.conv1.weight" in shapes and "layer4.0.conv1.weight" not in shapes
    if three and "linear.weight" in shapes and _size(shapes, "conv1.weight") == stem:
      return f"{prefix}{6 * _count(shapes, 'layer1.') + 2}"

  return recognise


def _zoo_vgg(shapes):
  counts = tuple(_count(shapes, f"block{stage}.", ".running_mean") for stage in range(5))
  name = {(1, 1, 2, 2, 2): "vgg11", (2, 2, 2, 2, 2): "vgg13", (2, 2, 3, 3, 3): "vgg16"}.get(counts)
  return name if "classifier.weight" in shapes else None


def _torchvision_vgg(shapes):
  depth = {8: 11, 10: 13, 13: 16, 16: 19}.get(_count(shapes, "features.", ".running_mean"))
  return f"imagenet_vgg{depth}" if depth and "classifier.6.weight" in shapes else None


def _has(key, name):
  return lambda shapes: name if key in shapes else None


FAMILIES = {
  "zoo_wrn": Family(
    "wide ResNet with groups block1 to block3",
    r"wrn_\d+_\d+",
    ZOO,
    _wide("block", "fc.weight"),
    _ends("conv1.weight", "fc.weight"),
  ),
  "layered_wrn": Family(
    "wide ResNet with groups layer1 to layer3",
    r"wrn_\d+_\d+",
    LAYERED_WRN,
    _wide("layer", "linear.weight"),
    _ends("conv1.weight", "linear.weight"),
    CIFAR,
    32,
  ),
  "zoo_resnet": Family(
    "ResNet for small images (layerN.M.shortcut, linear)",
    r"resnet(18|34|50)",
    ZOO,
    _residual("linear.weight", "resnet"),
    _ends("conv1.weight", "linear.weight"),
  ),
  "zoo_vgg": Family(
    "VGG for small images with batch norm (block0 to block4)",
    r"vgg(11|13|16)",
    ZOO,
    _zoo_vgg,
    _ends("block0.0.weight", "classifier.weight"),
  ),
  "cifar_resnet": Family(
    "CIFAR ResNet of depth 6n + 2 with parameter-free shortcuts",
    r"cifar_resnet\d+",
    ZOO,
    _thin(16, "cifar_resnet"),
    _ends("conv1.weight", "linear.weight"),
    IMAGENET,
    32,
  ),
  "small_resnet": Family(
    "small ResNet of depth 6n + 2 with a stem of 64 channels and 4x4 pooling",
    r"small_resnet\d+",
    ZOO,
    _thin(64, "small_resnet"),
    _ends("conv1.weight", "linear.weight"),
    CIFAR,
    32,
  ),
  "torchvision_resnet": Family(
    "torchvision's ResNet",
    r"imagenet_resnet(18|34|50)",
    TORCHVISION_RESNET,
    _residual("fc.weight", "imagenet_resnet"),
    _ends("conv1.weight", "fc.weight"),
    IMAGENET,
    224,
  ),
  "torchvision_vgg": Family(
    "torchvision's VGG with batch norm",
    r"imagenet_vgg(11|13|16|19)",
    TORCHVISION_NUMBERED,
    _torchvision_vgg,
    _ends("features.0.weight", "classifier.6.weight"),
    IMAGENET,
    224,
  ),
  "torchvision_mobilenet": Family(
    "torchvision's MobileNetV2",
    r"mobilenet_v2",
    TORCHVISION_NUMBERED,
    _has("features.1.conv.0.0.weight", "mobilenet_v2"),
    _ends("features.0.0.weight", "classifier.1.weight"),
    IMAGENET,
    224,
  ),
  "cifar_generator": Family(
    "generator D of CPSC-DFKD",
    r"cifar",
    CIFAR_GENERATOR,
    _has("l1.0.weight", "cifar"),
    _generator("l1.0.weight", "conv_blocks2_0.weight", "conv_blocks3_0.weight", wide=2, shrink=4),
  ),
  "dcgan_generator": Family(
    "generator C of CPSC-DFKD",
    r"dcgan",
    DCGAN_GENERATOR,
    _has("project.1.weight", "dcgan"),
    _generator("project.1.weight", "conv_blocks4_0.weight", "conv_blocks5_0.weight", wide=8, shrink=16),
  ),
}
