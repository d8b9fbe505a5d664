"""The class-conditional batch norm of both generators."""

import torch
from torch import nn


class ConditionalNorm(nn.BatchNorm2d):
  """Batch norm whose scale and bias are rows of two tables, one row for each class."""

  def __init__(self, tables: int, width: int, epsilon: float, affine: bool = True):
    super().__init__(width, epsilon, affine=False)
    self.tables, self.scaled = tables, affine
    if affine:
      self.weights, self.biases = nn.Embedding(tables, width), nn.Embedding(tables, width)

  def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    x = super().forward(x)
    if not self.scaled:
      return x
    labels = labels if self.tables > 1 else torch.zeros_like(labels)
    return self.weights(labels)[:, :, None, None] * x + self.biases(labels)[:, :, None, None]
