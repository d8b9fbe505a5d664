"""The digits in five phases of two classes: class-incremental learning and its controls, over five seeds.

All rows of a seed begin with the same network of the first two classes, and have the same order of classes. Joint
training has the crops of that network, without which the others do better (docs/incremental.md).
"""

from benchmarks.plan import Row

PAIR, BASE = "Digits, five phases of two classes, WRN-16-1", "cpsc"
SEEDS = (30, 31, 32, 33, 34)


def arms(config: str, seeds: tuple[int, ...], joint: tuple[str, ...], *shared: str) -> tuple[Row, ...]:
  """CPSC-DFKD and its controls, of a config with the flags `shared`; joint training has those of `joint`, too."""

  def arm(name: str, *flags: str) -> Row:
    given = tuple(f"--config.{flag}" for flag in (*shared, *flags))
    return Row(name, config, given, seeds, teacher=BASE if flags else "")

  return (
    arm(BASE),
    arm("no rehearsal", "arm=no_rehearsal"),
    arm("all classes together", "arm=joint", *joint),
    arm("real rehearsal, 20 images a class", "arm=real_rehearsal"),
    arm("distillation without samples (LwF)", "arm=lwf"),
    arm("untrained generator", "arm=untrained_generator"),
  )


ROWS = arms("incremental_digits", SEEDS, ("student.crop_pad=1",))
