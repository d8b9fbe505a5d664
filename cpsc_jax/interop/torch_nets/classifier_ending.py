"""What ends the module of a classifier; the constants and `Net` stand before it."""

# ruff: noqa: F821


class Classifier(Net):
  """Images (N, CHANNELS, IMAGE_SIZE, IMAGE_SIZE), uint8 or floats in [0, 1] -> logits (N, NUM_CLASSES)."""

  def __init__(self):
    super().__init__(num_classes=NUM_CLASSES, channels=CHANNELS, **ARGUMENTS)
    self.register_buffer("mean", torch.tensor(MEAN).view(-1, 1, 1), persistent=False)
    self.register_buffer("std", torch.tensor(STD).view(-1, 1, 1), persistent=False)

  def forward(self, images: torch.Tensor) -> torch.Tensor:
    pixels = images / 255 if images.dtype == torch.uint8 else images
    return super().forward((pixels - self.mean) / self.std)


def load(weights: str | pathlib.Path = WEIGHTS) -> Classifier:
  """The classifier with the weights of a file, in evaluation mode, on the CPU."""
  net = Classifier()
  net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
  return net.eval()
