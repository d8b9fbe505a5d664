"""The digits in five phases of two classes: class-incremental learning and its controls, over five seeds.

All rows of a seed begin with the same network of the first two classes, and have the same order of classes. Joint
training has the crops of that network, without which the others do better (docs/incremental.md).
"""

from benchmarks.plan import Row

PAIR, BASE = "Digits, five phases of two classes, WRN-16-1", "cpsc"
SEEDS = (30, 31, 32, 33, 34)


def arm(name: str, *flags: str) -> Row:
  return Row(name, "incremental_digits", tuple(f"--config.{flag}" for flag in flags), SEEDS, teacher="cpsc")


ROWS = (
  Row("cpsc", "incremental_digits", (), SEEDS),
  arm("no rehearsal", "arm=no_rehearsal"),
  arm("all classes together", "arm=joint", "student.crop_pad=1"),
  arm("real rehearsal, 20 images a class", "arm=real_rehearsal"),
  arm("distillation without samples (LwF)", "arm=lwf"),
  arm("untrained generator", "arm=untrained_generator"),
)
