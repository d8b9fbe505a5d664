"""MobileNetV2 (Sandler et al., CVPR 2018), with torchvision's names."""

import torch
from torch import nn


def activated(inside: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
  conv = nn.Conv2d(inside, width, kernel, stride, kernel // 2, groups=groups, bias=False)
  return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU6())


class InvertedResidual(nn.Module):
  """1x1 expansion, 3x3 depthwise, 1x1 without activation; the input is added where shapes allow."""

  def __init__(self, inside: int, width: int, stride: int, expansion: int):
    super().__init__()
    hidden = inside * expansion
    layers = [activated(inside, hidden, 1)] if expansion > 1 else []
    layers += [activated(hidden, hidden, 3, stride, hidden), nn.Conv2d(hidden, width, 1, bias=False)]
    self.conv = nn.Sequential(*layers, nn.BatchNorm2d(width))
    self.adds = stride == 1 and inside == width

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return x + self.conv(x) if self.adds else self.conv(x)


class Net(nn.Module):
  """Normalised images (N, K, H, W) -> logits (N, C)."""

  # expansion, channels, blocks, stride of the first block
  GROUPS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

  def __init__(self, num_classes: int, channels: int):
    super().__init__()
    layers, inside = [activated(channels, 32, 3, 2)], 32
    for expansion, width, count, stride in self.GROUPS:
      for i in range(count):
        layers.append(InvertedResidual(inside, width, 1 if i else stride, expansion))
        inside = width
    self.features = nn.Sequential(*layers, activated(inside, 1280, 1))
    self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.classifier(self.features(x).mean((2, 3)))
