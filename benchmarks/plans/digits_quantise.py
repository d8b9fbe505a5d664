"""The digits: a network of few bits, fine-tuned without data, and its controls; five seeds, the same teachers."""

from benchmarks.plan import Row

PAIR, BASE = "Digits, WRN-16-1 at few bits", "W3A3"
SEEDS = (20, 21, 22, 23, 24)


def row(bits: int, *flags: str, name: str = "") -> Row:
  given = (f"quantise.weights={bits}", f"quantise.activations={bits}", *flags)
  return Row(f"W{bits}A{bits}{name}", "quantise_digits", tuple(f"--config.{flag}" for flag in given), SEEDS, "W8A8")


ROWS = (
  Row("W8A8", "quantise_digits", ("--config.quantise.weights=8", "--config.quantise.activations=8"), SEEDS),
  row(4),
  row(3),
  row(3, "arm=gaussian_noise", name=", Gaussian noise"),
  row(3, "arm=untrained_generator", name=", untrained generator"),
  row(3, "arm=real_kd", name=", real images"),
)
