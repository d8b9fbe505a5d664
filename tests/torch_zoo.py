"""Plain PyTorch versions of the networks, written from their published definitions, to test against."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


class WideBlock(nn.Module):
  def __init__(self, inside, outside, stride):
    super().__init__()
    self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(outside)
    self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
    self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
    if inside != outside:
      self.convShortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

  def forward(self, x):
    o = F.relu(self.bn1(x))
    side = self.convShortcut(o) if hasattr(self, "convShortcut") else x
    return side + self.conv2(F.relu(self.bn2(self.conv1(o))))


class WideGroup(nn.Module):
  def __init__(self, count, inside, outside, stride):
    super().__init__()
    self.layer = nn.Sequential(
      *(WideBlock(outside if i else inside, outside, 1 if i else stride) for i in range(count))
    )

  def forward(self, x):
    return self.layer(x)


class WideResNet(nn.Module):
  def __init__(self, depth, widen, classes):
    super().__init__()
    n, w = (depth - 4) // 6, [16, 16 * widen, 32 * widen, 64 * widen]
    self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
    self.block1, self.block2, self.block3 = (WideGroup(n, w[i], w[i + 1], 1 if i == 0 else 2) for i in range(3))
    self.bn1, self.fc = nn.BatchNorm2d(w[3]), nn.Linear(w[3], classes)

  def forward(self, x):
    x = self.block3(self.block2(self.block1(self.conv1(x))))
    f = F.relu(self.bn1(x)).mean((2, 3))
    return self.fc(f), F.normalize(f)


class Residual(nn.Module):
  def __init__(self, inside, width, stride, bottleneck):
    super().__init__()
    out = width * 4 if bottleneck else width
    sizes = (
      [(inside, width, 1), (width, width, 3), (width, out, 1)] if bottleneck else [(inside, width, 3), (width, out, 3)]
    )
    strided = 1 if bottleneck else 0
    for i, (a, b, k) in enumerate(sizes):
      setattr(self, f"conv{i + 1}", nn.Conv2d(a, b, k, stride if i == strided else 1, k // 2, bias=False))
      setattr(self, f"bn{i + 1}", nn.BatchNorm2d(b))
    self.count = len(sizes)
    self.shortcut = nn.Sequential()
    if stride != 1 or inside != out:
      self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1, stride, bias=False), nn.BatchNorm2d(out))

  def forward(self, x):
    h = x
    for i in range(1, self.count + 1):
      h = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(h))
      h = F.relu(h) if i < self.count else h
    return F.relu(h + self.shortcut(x))


class ResNet(nn.Module):
  def __init__(self, counts, classes, bottleneck=False):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64)
    inside = 64
    for stage, count in enumerate(counts):
      blocks = []
      for i in range(count):
        blocks.append(Residual(inside, 64 * 2**stage, 2 if stage and not i else 1, bottleneck))
        inside = 64 * 2**stage * (4 if bottleneck else 1)
      setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
    self.linear = nn.Linear(inside, classes)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    for stage in range(1, 5):
      x = getattr(self, f"layer{stage}")(x)
    f = x.mean((2, 3))
    return self.linear(f), F.normalize(f)


class VGG(nn.Module):
  def __init__(self, counts, classes):
    super().__init__()
    inside = 3
    for stage, (count, width) in enumerate(zip(counts, (64, 128, 256, 512, 512), strict=True)):
      layers = []
      for i in range(count):
        layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.BatchNorm2d(width)] + [nn.ReLU()] * (i < count - 1)
        inside = width
      setattr(self, f"block{stage}", nn.Sequential(*layers))
    self.classifier = nn.Linear(512, classes)

  def forward(self, x):
    height = x.shape[2]
    for stage in range(5):
      x = F.relu(getattr(self, f"block{stage}")(x))
      if stage < 3 or (stage == 3 and height == 64):
        x = F.max_pool2d(x, 2)
    f = x.mean((2, 3))
    return self.classifier(f), F.normalize(f)


class ThinBlock(nn.Module):
  def __init__(self, inside, width, stride, free):
    super().__init__()
    self.conv1, self.bn1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
    self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
    self.free, self.extra = free, (width - inside) // 2
    self.shortcut = nn.Sequential()
    if not free and (stride != 1 or inside != width):
      self.shortcut = nn.Sequential(nn.Conv2d(inside, width, 1, stride, bias=False), nn.BatchNorm2d(width))

  def forward(self, x):
    h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
    if self.free and self.extra:
      empty = x.new_zeros(x.shape[0], self.extra, *h.shape[2:])
      x = torch.cat([empty, x[:, :, ::2, ::2], empty], 1)
    y = h + self.shortcut(x)
    return F.relu(y) if self.free else y


class ThinResNet(nn.Module):
  """The 6n + 2 CIFAR network with free shortcuts, or (not free) the one with a wide stem and 4x4 pooling."""

  def __init__(self, depth, classes, free):
    super().__init__()
    self.free, inside = free, 16 if free else 64
    self.conv1, self.bn1 = nn.Conv2d(3, inside, 3, 1, 1, bias=False), nn.BatchNorm2d(inside)
    for stage, width in enumerate((16, 32, 64), start=1):
      blocks = []
      for i in range((depth - 2) // 6):
        blocks.append(ThinBlock(inside, width, 2 if stage > 1 and not i else 1, free))
        inside = width
      setattr(self, f"layer{stage}", nn.Sequential(*blocks))
    self.linear = nn.Linear(64 if free else 256, classes)

  def forward(self, x):
    x = F.relu(self.bn1(self.conv1(x)))
    for stage in range(1, 4):
      x = F.relu(getattr(self, f"layer{stage}")(x))
    f = x.mean((2, 3)) if self.free else F.avg_pool2d(x, 4).flatten(1)
    return self.linear(f), F.normalize(f)


class ImageNetResNet(ResNet):
  """torchvision's names and stem around the same blocks."""

  def __init__(self, counts, classes, bottleneck=False):
    super().__init__(counts, classes, bottleneck)
    self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    self.fc = self.linear
    del self.linear
    for child in self.modules():
      if isinstance(child, Residual):
        if len(child.shortcut):
          child.downsample = child.shortcut
        del child.shortcut
        child.forward = partial(ImageNetResNet.block, child)

  @staticmethod
  def block(child, x):
    h = x
    for i in range(1, child.count + 1):
      h = getattr(child, f"bn{i}")(getattr(child, f"conv{i}")(h))
      h = F.relu(h) if i < child.count else h
    return F.relu(h + (child.downsample(x) if hasattr(child, "downsample") else x))

  def forward(self, x):
    x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
    for stage in range(1, 5):
      x = getattr(self, f"layer{stage}")(x)
    f = x.mean((2, 3))
    return self.fc(f), F.normalize(f)


class ImageNetVGG(nn.Module):
  def __init__(self, counts, classes, hidden=4096):
    super().__init__()
    layers, inside = [], 3
    for count, width in zip(counts, (64, 128, 256, 512, 512), strict=True):
      for _ in range(count):
        layers += [nn.Conv2d(inside, width, 3, 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
        inside = width
      layers.append(nn.MaxPool2d(2))
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Sequential(
      nn.Linear(512 * 49, hidden), nn.ReLU(), nn.Identity(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Identity()
    )
    self.classifier.append(nn.Linear(hidden, classes))

  def forward(self, x):
    x = F.adaptive_avg_pool2d(self.features(x), 7).flatten(1)
    f = self.classifier[:6](x)
    return self.classifier[6](f), F.normalize(f)


class Inverted(nn.Module):
  def __init__(self, inside, width, stride, expansion):
    super().__init__()
    hidden, layers = inside * expansion, []
    if expansion > 1:
      layers.append(nn.Sequential(nn.Conv2d(inside, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()))
    depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
    layers.append(nn.Sequential(depthwise, nn.BatchNorm2d(hidden), nn.ReLU6()))
    self.conv = nn.Sequential(*layers, nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))
    self.adds = stride == 1 and inside == width

  def forward(self, x):
    return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
  def __init__(self, classes):
    super().__init__()
    layers, inside = [nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())], 32
    for expansion, width, count, stride in (
      *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
      *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
    ):
      for i in range(count):
        layers.append(Inverted(inside, width, 1 if i else stride, expansion))
        inside = width
    layers.append(nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()))
    self.features = nn.Sequential(*layers)
    self.classifier = nn.Sequential(nn.Identity(), nn.Linear(1280, classes))

  def forward(self, x):
    f = self.features(x).mean((2, 3))
    return self.classifier(f), F.normalize(f)


class ConditionalNorm(nn.BatchNorm2d):
  def __init__(self, classes, width, eps=1e-3):
    super().__init__(width, eps, affine=False)
    self.weights, self.biases = nn.Embedding(classes, width), nn.Embedding(classes, width)

  def forward(self, x, y):
    return self.weights(y)[:, :, None, None] * super().forward(x) + self.biases(y)[:, :, None, None]


class CifarGenerator(nn.Module):
  def __init__(self, nz, width, size, channels, classes):
    super().__init__()
    self.size, self.wide = size, 2 * width
    self.l1 = nn.Sequential(nn.Linear(nz, self.wide * (size // 4) ** 2))
    self.conv_blocks0_0 = ConditionalNorm(classes, self.wide)
    self.conv_blocks1_0 = nn.Conv2d(self.wide, self.wide, 3, 1, 1)
    self.conv_blocks1_1 = ConditionalNorm(classes, self.wide)
    self.conv_blocks2_0 = nn.Conv2d(self.wide, width, 3, 1, 1)
    self.conv_blocks2_1 = ConditionalNorm(classes, width)
    self.conv_blocks3_0 = nn.Conv2d(width, channels, 3, 1, 1)
    self.conv_blocks3_2 = ConditionalNorm(classes, channels)

  def forward(self, z, y):
    x = self.conv_blocks0_0(self.l1(z).view(-1, self.wide, self.size // 4, self.size // 4), y)
    x = F.leaky_relu(self.conv_blocks1_1(self.conv_blocks1_0(F.interpolate(x, scale_factor=2)), y), 0.2)
    x = F.leaky_relu(self.conv_blocks2_1(self.conv_blocks2_0(F.interpolate(x, scale_factor=2)), y), 0.2)
    return self.conv_blocks3_2(torch.tanh(self.conv_blocks3_0(x)), y)


class DCGANGenerator(nn.Module):
  def __init__(self, nz, width, size, channels, classes):
    super().__init__()
    self.size, self.wide = size, 8 * width
    self.project = nn.Sequential(nn.Identity(), nn.Linear(nz, self.wide * (size // 16) ** 2))
    self.conv_blocks0_0 = ConditionalNorm(classes, self.wide)
    inside = self.wide
    for i, multiple in enumerate((4, 2, 1, 1), start=1):
      setattr(self, f"conv_blocks{i}_0", nn.ConvTranspose2d(inside, multiple * width, 4, 2, 1, bias=False))
      setattr(self, f"conv_blocks{i}_1", ConditionalNorm(classes, multiple * width, 0.8))
      inside = multiple * width
    self.conv_blocks5_0 = nn.Conv2d(inside, channels, 3, 1, 1)

  def forward(self, z, y):
    x = self.conv_blocks0_0(self.project(z).view(-1, self.wide, self.size // 16, self.size // 16), y)
    for i in range(1, 5):
      x = F.leaky_relu(getattr(self, f"conv_blocks{i}_1")(getattr(self, f"conv_blocks{i}_0")(x), y), 0.2)
    return torch.tanh(self.conv_blocks5_0(x))


def randomise(module, seed=0):
  """Random affine parameters, embeddings and running statistics in place of their initial zeros and ones."""
  generator = torch.Generator().manual_seed(seed)

  def draw(shape, low, high):
    return torch.rand(shape, generator=generator) * (high - low) + low

  with torch.no_grad():
    for child in module.modules():
      if isinstance(child, nn.BatchNorm2d):
        child.running_mean.copy_(draw(child.running_mean.shape, -0.3, 0.3))
        child.running_var.copy_(draw(child.running_var.shape, 0.5, 1.5))
        if child.affine:
          child.weight.copy_(draw(child.weight.shape, 0.5, 1.5))
          child.bias.copy_(draw(child.bias.shape, -0.3, 0.3))
      if isinstance(child, nn.Embedding):
        child.weight.copy_(draw(child.weight.shape, 0.2, 1.5))
  return module


def arrays(module):
  """The state dict as NumPy arrays."""
  return {k: v.detach().numpy().copy() for k, v in module.state_dict().items()}


def layered(state):
  """A wide ResNet's state dict with groups named layer1 to layer3, and back."""
  there = (("block", "layer"), ("fc.", "linear."))
  back = tuple((b, a) for a, b in there)
  for old, new in back if "linear.weight" in state else there:
    state = {(new + key.removeprefix(old) if key.startswith(old) else key): value for key, value in state.items()}
  return state
