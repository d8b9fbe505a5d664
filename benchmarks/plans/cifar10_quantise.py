"""CIFAR-10: a network of few bits, fine-tuned without data, and its controls.

Needs --config.teacher.checkpoint=DIR, the converted ResNet-20 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR = "CIFAR-10, ResNet-20 at few bits"
LEAST_ERROR = "quantise.ranges=mse"


def row(bits: int, *flags: str, seeds: tuple[int, ...] = (0,), name: str = "") -> Row:
  given = (f"quantise.weights={bits}", f"quantise.activations={bits}", *flags)
  return Row(f"W{bits}A{bits}{name}", "quantise_cifar10", tuple(f"--config.{flag}" for flag in given), seeds)


ROWS = (
  row(4, seeds=(0, 1, 2)),
  row(5),
  row(8),
  row(4, "arm=real_kd", name=", real images"),
  row(4, "arm=gaussian_noise", name=", Gaussian noise"),
  row(4, "arm=untrained_generator", name=", untrained generator"),
  row(3),
  *(row(bits, LEAST_ERROR, name=", ranges of least error") for bits in (4, 3)),
)
PUBLISHED = (
  ("GDFQ, W4A4 (Xu et al., ECCV 2020)", "0.9011", "0.9389"),
  ("Qimera, W4A4 (Choi et al., NeurIPS 2021)", "0.9126", "0.9389"),
  ("AdaDFQ, W4A4 (Qian et al., CVPR 2023)", "0.9231", "0.9389"),
  ("GDFQ, W5A5", "0.9338", "0.9389"),
  ("GDFQ, W3A3", "0.7511", "0.9389"),
)
