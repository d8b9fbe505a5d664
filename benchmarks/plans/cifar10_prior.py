"""Teachers on a long tail of CIFAR-10: from which distribution labels are drawn, over three seeds, on two CPU cores.

The first class has 5,000 training images, the last one 50. All rows of a seed have the same teacher, and nothing of it
is inherited, so that a student knows of a class what the samples show; the test images have all classes equally often.
Needs --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR, BASE = "CIFAR-10, a long tail, WRN-16-1 -> WRN-10-1", "uniform"
SEEDS = (20, 21, 22)
FLAGS = (
  "dataset.imbalance=100",
  "student.inherit=False",
  "precision=bfloat16",
  "evaluate.every=8",
  "teacher.epochs=40",
  "teacher.batch_size=64",
)
COUNTS = "5000,2997,1796,1077,645,387,232,139,83,50"  # training images of each class


def row(name: str, *flags: str, teacher: str = BASE) -> Row:
  return Row(name, "cifar10:cpu", tuple(f"--config.{flag}" for flag in (*FLAGS, *flags)), SEEDS, teacher)


ROWS = (
  row(BASE, teacher=""),
  row("given, the true shares", "generator.prior=given", f"generator.prior_shares={COUNTS}"),
  row("teacher", "generator.prior=teacher"),
  row("need", "generator.prior=need"),
  row("uniform, untrained generator", "arm=untrained_generator"),
  row("real images of the long tail", "arm=real_kd"),
)
