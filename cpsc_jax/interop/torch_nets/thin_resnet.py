"""Residual networks of 16, 32 and 64 channels for small images, of depth 6n + 2: two families."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
  """Two 3x3 convolutions and a shortcut: free (every second pixel, new channels are zeros) or projected."""

  def __init__(self, inside: int, width: int, stride: int, free: bool):
    super().__init__()
    self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    self.stride, self.free, self.side, self.shortcut = stride, free, (width - inside) // 2, None
    if not free and (stride != 1 or inside != width):
      self.shortcut = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    if self.free:
      x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.side, self.side))
    elif self.shortcut is not None:
      x = self.shortcut(x)
    return F.relu(h + x) if self.free else h + x


class Net(nn.Module):
  """Normalised images (N, K, H, W) -> logits (N, C).

  With free shortcuts it is the CIFAR network of He et al. (CVPR 2016). Else it has a stem of 64 channels, one ReLU at
  the end of a stage and 4x4 averages of the last map as features.
  """

  def __init__(self, num_classes: int, channels: int, image_size: int, depth: int, free: bool):
    super().__init__()
    self.free, inside = free, 16 if free else 64
    self.conv1 = nn.Conv2d(channels, inside, 3, 1, 1, bias=False)
    self.bn1 = nn.BatchNorm2d(inside)
    side = image_size
    for stage, width in enumerate((16, 32, 64), start=1):
      blocks = []
      for i in range((depth - 2) // 6):
        stride = 2 if stage > 1 and not i else 1
        side = (side - 1) // stride + 1
        blocks.append(Block(inside, width, stride, free))
        inside = width
      self.add_module(f"layer{stage}", nn.Sequential(*blocks))
    self.linear = nn.Linear(64 if free else 64 * (side // 4) ** 2, num_classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.bn1(self.conv1(x)))
    for stage in (self.layer1, self.layer2, self.layer3):
      x = stage(x) if self.free else F.relu(stage(x))
    return self.linear(x.mean((2, 3)) if self.free else F.avg_pool2d(x, 4).flatten(1))
