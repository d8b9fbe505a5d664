"""VGG with batch norm (Simonyan & Zisserman, ICLR 2015), with torchvision's names."""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
  """Normalised images (N, K, H, W) -> logits (N, C)."""

  def __init__(self, num_classes: int, channels: int, convs: tuple[int, ...], hidden: int):
    super().__init__()
    layers, inside = [], channels
    for count, width in zip(convs, (64, 128, 256, 512, 512), strict=True):
      for _ in range(count):
        layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
        inside = width
      layers.append(nn.MaxPool2d(2))
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Sequential(
      *(nn.Linear(512 * 7 * 7, hidden), nn.ReLU(), nn.Dropout()),
      *(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout()),
      nn.Linear(hidden, num_classes),
    )

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.classifier(F.adaptive_avg_pool2d(self.features(x), 7).flatten(1))
