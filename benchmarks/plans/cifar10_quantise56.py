"""CIFAR-10: a deeper network of few bits, fine-tuned without data by the settings of the smaller one.

Needs --config.teacher.checkpoint=DIR, the converted ResNet-56 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR = "CIFAR-10, ResNet-56 at few bits"


def row(bits: int) -> Row:
  flags = (f"quantise.weights={bits}", f"quantise.activations={bits}")
  return Row(f"W{bits}A{bits}", "quantise_cifar10", tuple(f"--config.{flag}" for flag in flags))


ROWS = (row(4), row(5), row(8), row(3))
