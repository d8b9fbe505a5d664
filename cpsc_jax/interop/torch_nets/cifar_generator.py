"""Generator D of CPSC-DFKD: two nearest-neighbour upsamplings with 3x3 convolutions, conditioned by its batch norms."""

import torch
from torch import nn
from torch.nn import functional as F

# ruff: noqa: F821


class Net(nn.Module):
  """Latents (N, latent_dim) and labels (N,) -> images (N, K, H, H): pixels by a sigmoid, or normalised by tanh."""

  def __init__(
    self, channels: int, image_size: int, width: int, latent_dim: int, tables: int, epsilon: float, sigmoid: bool
  ):
    super().__init__()
    self.side, self.wide, self.sigmoid = image_size // 4, 2 * width, sigmoid
    epsilon = epsilon or 1e-3
    self.l1 = nn.Sequential(nn.Linear(latent_dim, self.wide * self.side**2))
    self.conv_blocks0_0 = ConditionalNorm(tables, self.wide, epsilon)
    self.conv_blocks1_0 = nn.Conv2d(self.wide, self.wide, 3, 1, 1)
    self.conv_blocks1_1 = ConditionalNorm(tables, self.wide, epsilon)
    self.conv_blocks2_0 = nn.Conv2d(self.wide, width, 3, 1, 1)
    self.conv_blocks2_1 = ConditionalNorm(tables, width, epsilon)
    self.conv_blocks3_0 = nn.Conv2d(width, channels, 3, 1, 1)
    if not sigmoid:
      self.conv_blocks3_2 = ConditionalNorm(tables, channels, epsilon, affine=tables > 1)

  def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    x = self.conv_blocks0_0(self.l1(latent).view(-1, self.wide, self.side, self.side), labels)
    x = self.conv_blocks1_0(F.interpolate(x, scale_factor=2))
    x = F.leaky_relu(self.conv_blocks1_1(x, labels), 0.2)
    x = self.conv_blocks2_0(F.interpolate(x, scale_factor=2))
    x = self.conv_blocks3_0(F.leaky_relu(self.conv_blocks2_1(x, labels), 0.2))
    return torch.sigmoid(x) if self.sigmoid else self.conv_blocks3_2(torch.tanh(x), labels)
