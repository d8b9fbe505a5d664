"""ResNet-18/34/50 (He et al., CVPR 2016), for small images or, with torchvision's names, for ImageNet."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
  """Two 3x3 convolutions or a bottleneck, with a shortcut that is projected where shapes change."""

  def __init__(self, inside: int, width: int, stride: int, bottleneck: bool, shortcut: str):
    super().__init__()
    out = 4 * width if bottleneck else width
    first, last = (1, 3) if bottleneck else (3, 3)
    self.conv1 = nn.Conv2d(inside, width, first, 1 if bottleneck else stride, first // 2, bias=False)
    self.bn1 = nn.BatchNorm2d(width)
    self.conv2 = nn.Conv2d(width, width, last, stride if bottleneck else 1, 1, bias=False)
    self.bn2 = nn.BatchNorm2d(width)
    self.bottleneck, self.projection = bottleneck, None
    if bottleneck:
      self.conv3 = nn.Conv2d(width, out, 1, bias=False)
      self.bn3 = nn.BatchNorm2d(out)
    if stride != 1 or inside != out:
      self.projection = shortcut
      self.add_module(shortcut, nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out)))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    if self.bottleneck:
      h = self.bn3(self.conv3(F.relu(h)))
    return F.relu(h + (getattr(self, self.projection)(x) if self.projection else x))


class Net(nn.Module):
  """Normalised images (N, K, H, W) -> logits (N, C)."""

  def __init__(self, num_classes: int, channels: int, blocks: tuple[int, ...], bottleneck: bool, imagenet: bool):
    super().__init__()
    self.imagenet, self.head = imagenet, "fc" if imagenet else "linear"
    kernel, stride = (7, 2) if imagenet else (3, 1)
    self.conv1 = nn.Conv2d(channels, 64, kernel, stride, kernel // 2, bias=False)
    self.bn1 = nn.BatchNorm2d(64)
    inside, shortcut = 64, "downsample" if imagenet else "shortcut"
    for stage, count in enumerate(blocks):
      width, layers = 64 * 2**stage, []
      for i in range(count):
        layers.append(Block(inside, width, 2 if stage and not i else 1, bottleneck, shortcut))
        inside = 4 * width if bottleneck else width
      self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
    self.add_module(self.head, nn.Linear(inside, num_classes))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = F.relu(self.bn1(self.conv1(x)))
    x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
    x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
    return getattr(self, self.head)(x.mean((2, 3)))
