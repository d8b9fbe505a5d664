"""What ends the module of a quantised classifier; the constants and `Net` stand before it."""

# ruff: noqa: F821

import threading

import torch
from torch import nn


class Rounding(nn.Module):
  """What ReLUs give, rounded to levels; the n-th of a forward pass has scale[n] and zero_point[n]."""

  def __init__(self, number: int, bits: int):
    super().__init__()
    self.register_buffer("scale", torch.ones(number))
    self.register_buffer("zero_point", torch.zeros(number, dtype=torch.int32))
    self.highest = 2**bits - 1

  def forward(self, number: int, x: torch.Tensor) -> torch.Tensor:
    scale, zero = self.scale[number], self.zero_point[number]
    return (torch.clamp(torch.round(x / scale) + zero, 0, self.highest) - zero) * scale


_now = threading.local()  # which ReLU a forward pass has come to, and its rounding


def rounded(function, x: torch.Tensor) -> torch.Tensor:
  number, _now.number = _now.number, _now.number + 1
  return _now.rounding(number, function(x))


class Rounded(nn.Module):
  def __init__(self, function):
    super().__init__()
    self.function = function

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return rounded(self.function, x)


class Classifier(Net):
  """Images (N, CHANNELS, IMAGE_SIZE, IMAGE_SIZE), uint8 or floats in [0, 1] -> logits (N, NUM_CLASSES).

  Computes in float on the levels of the quantised network. The level of a weight of output channel k is the whole
  number weight[k] / weight_scale[k] + weight_zero_point[k].
  """

  def __init__(self):
    super().__init__(num_classes=NUM_CLASSES, channels=CHANNELS, **ARGUMENTS)
    self.register_buffer("mean", torch.tensor(MEAN).view(-1, 1, 1), persistent=False)
    self.register_buffer("std", torch.tensor(STD).view(-1, 1, 1), persistent=False)
    self.activations = Rounding(*ACTIVATIONS) if ACTIVATIONS else None
    for name in WEIGHT_BITS:
      layer = self.get_submodule(name)
      layer.register_buffer("weight_scale", torch.ones(layer.weight.shape[0]))
      layer.register_buffer("weight_zero_point", torch.zeros(layer.weight.shape[0], dtype=torch.int32))

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    pixels = images / 255 if images.dtype == torch.uint8 else images
    _now.number, _now.rounding = 0, self.activations
    return super().forward((pixels - self.mean) / self.std)


def load(weights: str | pathlib.Path = WEIGHTS) -> Classifier:
  """The classifier with the weights of a file, in evaluation mode, on the CPU."""
  net = Classifier()
  net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
  return net.eval()
