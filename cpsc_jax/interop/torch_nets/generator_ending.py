"""What ends the module of a generator; the constants and `Net` stand before it."""

# ruff: noqa: F821


class Generator(Net):
  """Latents (N, latent_dim) and labels (N,) -> images (N, CHANNELS, IMAGE_SIZE, IMAGE_SIZE) in [0, 1]."""

  def __init__(self):
    super().__init__(channels=CHANNELS, image_size=IMAGE_SIZE, **ARGUMENTS)
    self.register_buffer("mean", torch.tensor(MEAN).view(-1, 1, 1), persistent=False)
    self.register_buffer("std", torch.tensor(STD).view(-1, 1, 1), persistent=False)

  def forward(self, latent: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    images = super().forward(latent, labels)
    return (images if self.sigmoid else images * self.std + self.mean).clamp(0, 1)


def load(weights: str | pathlib.Path = WEIGHTS) -> Generator:
  """The generator with the weights of a file, in evaluation mode, on the CPU."""
  net = Generator()
  net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
  return net.eval()
