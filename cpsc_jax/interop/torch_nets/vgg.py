"""VGG with batch norm (Simonyan & Zisserman, ICLR 2015) as data-free distillation uses it on small images."""

import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
  """Normalised images (N, K, H, W) -> logits (N, C)."""

  def __init__(self, num_classes: int, channels: int, convs: tuple[int, ...]):
    super().__init__()
    inside = channels
    for stage, (count, width) in enumerate(zip(convs, (64, 128, 256, 512, 512), strict=True)):
      layers = []
      for _ in range(count):
        layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
        inside = width
      self.add_module(f"block{stage}", nn.Sequential(*layers))
    self.classifier = nn.Linear(512, num_classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    height = x.shape[2]
    for stage, block in enumerate((self.block0, self.block1, self.block2, self.block3, self.block4)):
      x = block(x)
      if stage < 3 or (stage == 3 and height == 64):
        x = F.max_pool2d(x, 2)
    return self.classifier(x.mean((2, 3)))
