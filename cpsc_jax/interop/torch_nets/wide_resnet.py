"""Wide residual network WRN-d-k (Zagoruyko & Komodakis, BMVC 2016), pre-activation."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
  def __init__(self, inside: int, width: int, stride: int):
    super().__init__()
    self.bn1 = nn.BatchNorm2d(inside)
    self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
    self.convShortcut = None if inside == width else nn.Conv2d(inside, width, 1, stride, bias=False)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    activated = F.relu(self.bn1(x))
    shortcut = x if self.convShortcut is None else self.convShortcut(activated)
    return shortcut + self.conv2(F.relu(self.bn2(self.conv1(activated))))


class Group(nn.Module):
  def __init__(self, count: int, inside: int, width: int, stride: int):
    super().__init__()
    self.layer = nn.Sequential(*(Block(width if i else inside, width, 1 if i else stride) for i in range(count)))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.layer(x)


class Net(nn.Module):
  """Normalised images (N, K, H, W) -> logits (N, C)."""

  def __init__(self, num_classes: int, channels: int, depth: int, widen: int):
    super().__init__()
    count, widths = (depth - 4) // 6, (16, 16 * widen, 32 * widen, 64 * widen)
    self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
    self.block1 = Group(count, widths[0], widths[1], 1)
    self.block2 = Group(count, widths[1], widths[2], 2)
    self.block3 = Group(count, widths[2], widths[3], 2)
    self.bn1 = nn.BatchNorm2d(widths[3])
    self.fc = nn.Linear(widths[3], num_classes)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = self.block3(self.block2(self.block1(self.conv1(x))))
    return self.fc(F.relu(self.bn1(x)).mean((2, 3)))
