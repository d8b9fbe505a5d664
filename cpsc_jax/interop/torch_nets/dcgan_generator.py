"""Generator C of CPSC-DFKD: four transposed convolutions after Radford et al. (ICLR 2016), conditioned by its norms."""

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
    self.side, self.wide, self.sigmoid = image_size // 16, 8 * width, sigmoid
    self.project = nn.Sequential(nn.Identity(), nn.Linear(latent_dim, self.wide * self.side**2))
    self.conv_blocks0_0 = ConditionalNorm(tables, self.wide, epsilon or 1e-3)
    inside = self.wide
    for i, multiple in enumerate((4, 2, 1, 1), start=1):
      self.add_module(f"conv_blocks{i}_0", nn.ConvTranspose2d(inside, multiple * width, 4, 2, 1, bias=False))
      self.add_module(f"conv_blocks{i}_1", ConditionalNorm(tables, multiple * width, epsilon or 0.8))
      inside = multiple * width
    self.conv_blocks5_0 = nn.Conv2d(inside, channels, 3, 1, 1)

  def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    x = self.conv_blocks0_0(self.project(latent).view(-1, self.wide, self.side, self.side), labels)
    for i in range(1, 5):
      x = getattr(self, f"conv_blocks{i}_0")(x)
      x = F.leaky_relu(getattr(self, f"conv_blocks{i}_1")(x, labels), 0.2)
    x = self.conv_blocks5_0(x)
    return torch.sigmoid(x) if self.sigmoid else torch.tanh(x)
