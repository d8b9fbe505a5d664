"""20 classes of Tiny-ImageNet at 64 pixels on two CPU cores: a teacher trained here, then its students.

With the DCGAN generator, which is the published one for 64 pixels, and with that of `photos`.

Needs --config.dataset.data_dir=DIR and --config.dataset.name=NAME, photographs of 64 pixels prepared as a folder of
one's own (docs/data.md), with a training split.
"""

from benchmarks.plan import Row

PAIR = "20 classes of Tiny-ImageNet, WRN-16-1 -> WRN-10-1"
SHARED = (
  "teacher.net=wrn_16_1",
  "student.net=wrn_10_1",
  "teacher.epochs=20",
  "generator.net=dcgan",
  "precision=bfloat16",
  "evaluate.every=5",
  "schedule.epochs=10",
)


def row(name: str, *flags: str, teacher: str = "cpsc") -> Row:
  return Row(name, "photos", tuple(f"--config.{flag}" for flag in (*SHARED, *flags)), teacher=teacher)


ROWS = (
  row("cpsc", teacher=""),
  row("cpsc, untrained generator", "arm=untrained_generator"),
  row("real_kd", "arm=real_kd"),
  row("cpsc, the generator of photos", "generator.net=cifar"),
  row("cpsc, the generator of photos, untrained", "generator.net=cifar", "arm=untrained_generator"),
)
