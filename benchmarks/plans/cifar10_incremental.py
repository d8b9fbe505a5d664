"""CIFAR-10 in five phases of two classes on two CPU cores: class-incremental learning and its controls.

All rows begin with the same network of the first two classes and have the same order of classes. Joint training has
the crops and the learning rate of that network. Needs --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR, BASE = "CIFAR-10, five phases of two classes, WRN-16-1", "cpsc"


def arm(name: str, *flags: str) -> Row:
  given = ("precision=bfloat16", *flags)
  return Row(
    name, "incremental_cifar10:cpu", tuple(f"--config.{flag}" for flag in given), teacher="cpsc" if flags else ""
  )


ROWS = (
  arm("cpsc"),
  arm("no rehearsal", "arm=no_rehearsal"),
  arm("all classes together", "arm=joint", "student.crop_pad=4", "student.lr=0.1"),
  arm("real rehearsal, 20 images a class", "arm=real_rehearsal"),
  arm("distillation without samples (LwF)", "arm=lwf"),
  arm("untrained generator", "arm=untrained_generator"),
)
