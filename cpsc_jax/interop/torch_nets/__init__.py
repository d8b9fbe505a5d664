"""PyTorch modules of the networks that have a PyTorch family, written beside exported weights.

Each file but this one is source text: `source` puts one after a head of constants and before an ending. What comes out
needs PyTorch and nothing of this package. The files are modules of their own only to be checked as such.
"""

import pathlib
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from cpsc_jax import nets, saved
from cpsc_jax.errors import Refusal
from cpsc_jax.interop import torch_quantised
from cpsc_jax.nets.generators import CifarGenerator, DCGANGenerator
from cpsc_jax.nets.mobilenet import MobileNetV2
from cpsc_jax.nets.resnet import Bottleneck, ResNet
from cpsc_jax.nets.thin_resnet import CifarResNet, SmallResNet
from cpsc_jax.nets.vgg import VGG, ImageNetVGG
from cpsc_jax.nets.wide_resnet import WideResNet

# Module -> (files, the arguments of their `Net` beside those that every net has).
_SOURCES: dict[type, tuple[tuple[str, ...], Callable[[saved.SavedNet], dict[str, Any]]]] = {
  WideResNet: (("wide_resnet",), lambda net: {"depth": net.net.depth, "widen": net.net.widen}),
  ResNet: (
    ("resnet",),
    lambda net: {
      "blocks": net.net.blocks,
      "bottleneck": net.net.block is Bottleneck,
      "imagenet": net.net.imagenet,
    },
  ),
  CifarResNet: (("thin_resnet",), lambda net: _thin(net) | {"free": True}),
  SmallResNet: (("thin_resnet",), lambda net: _thin(net) | {"free": False}),
  VGG: (("vgg",), lambda net: {"convs": net.net.convs}),
  ImageNetVGG: (("imagenet_vgg",), lambda net: {"convs": net.net.convs, "hidden": net.net.hidden}),
  MobileNetV2: (("mobilenet",), lambda net: {}),
  CifarGenerator: (("conditional_norm", "cifar_generator"), lambda net: _generator(net)),
  DCGANGenerator: (("conditional_norm", "dcgan_generator"), lambda net: _generator(net)),
}

_HEAD = '''"""{title} with {parameters:,} parameters as a PyTorch module.

    net = load()
    {call}

{takes} Nothing but PyTorch is needed.
"""

import pathlib

import torch
from torch import nn
from torch.nn import functional as F

WEIGHTS = pathlib.Path(__file__).with_name({weights!r})
DIGEST = {digest!r}  # of the weights as they were exported
NUM_CLASSES, CHANNELS, IMAGE_SIZE = {num_classes}, {channels}, {image_size}
MEAN, STD = {mean!r}, {std!r}  # per channel, of pixels in [0, 1]
CLASS_NAMES = {class_names!r}
ARGUMENTS = {arguments!r}
'''


def beside(weights: str | pathlib.Path) -> pathlib.Path:
  """Where the module for a file of weights is written: student.pth -> student_net.py, a name that can be imported."""
  path = pathlib.Path(weights)
  name = re.sub(r"\W", "_", path.stem, flags=re.ASCII)
  return path.with_name(f"{'_' if name[:1].isdigit() else ''}{name}_net.py")


def source(net: saved.SavedNet, weights: str) -> str:
  """The text of a Python module whose `load()` is the net with the weights of the file `weights` beside it.

  Raises:
    Refusal: no such module is known for the net.
  """
  bare = net.net.wrapped_module if isinstance(net.net, nets.Quantised) else net.net
  if type(bare) not in _SOURCES:
    raise Refusal(f"no PyTorch module is known for {net.card['net']}; choose another --format, such as onnx.")
  files, arguments = _SOURCES[type(bare)]
  card = net.card
  facts = {key: card[key] for key in ("digest", "num_classes", "channels", "image_size")}
  head = _HEAD.format(
    title=f"The {card['net']} generator" if net.is_generator else card["net"],
    parameters=nets.count_parameters(net.variables["params"]),
    call="images = net(latent, labels)" if net.is_generator else "logits = net(images)",
    takes=_takes(net),
    weights=weights,
    mean=tuple(card["mean"]),
    std=tuple(card["std"]),
    class_names=tuple(saved.class_names(card)),
    arguments=arguments(net._replace(net=bare)),
    **facts,
  )
  if bare is not net.net:
    head = head.replace("import pathlib\n", "import pathlib\nimport threading\n")
    facts = torch_quantised.facts(net)
    head += "".join(f"{name} = {value!r}\n" for name, value in facts.items())
    body = "\n\n".join(map(_body, files))
    body = torch_quantised.with_rounding(body) if facts["ACTIVATIONS"] else body
    return "\n\n".join([head, body, _body("quantised_ending")])
  ending = "generator_ending" if net.is_generator else "classifier_ending"
  return "\n\n".join([head, *map(_body, (*files, ending))])


def lines(net: saved.SavedNet, weights: str | pathlib.Path) -> list[str]:
  """Three lines of Python that load the module and the weights and call the net once, from any folder."""
  path, card = beside(weights).absolute(), net.card
  images = f"torch.zeros(1, {card['channels']}, {card['image_size']}, {card['image_size']}, dtype=torch.uint8)"
  inputs = f"torch.randn(1, {card.get('latent_dim')}), torch.tensor([0])" if net.is_generator else images
  return [
    f"import sys, torch; sys.path.insert(0, {str(path.parent)!r})",
    f"from {path.stem} import load",
    f"{'images' if net.is_generator else 'logits'} = load()({inputs})",
  ]


def _thin(net):
  return {"image_size": net.card["image_size"], "depth": net.net.depth}


def _generator(net):
  form = net.net.form
  facts = {"width": net.net.width, "latent_dim": net.card["latent_dim"], "tables": net.net.num_classes}
  return facts | {"epsilon": form.epsilon, "sigmoid": form.output == "sigmoid"}


def _takes(net):
  shape = f"{net.card['channels']}, {net.card['image_size']}, {net.card['image_size']}"
  if net.is_generator:
    return f"Images are (N, {shape}) in [0, 1]; latents (N, {net.card['latent_dim']}) are standard normal."
  return f"Images are (N, {shape}), uint8 or floats in [0, 1]; the net normalises them."


def _body(file):
  """The classes and functions of a file, without its docstring and imports."""
  text = resources.files(__name__).joinpath(f"{file}.py").read_text()
  return text.split("\n\n\n", 1)[1]
