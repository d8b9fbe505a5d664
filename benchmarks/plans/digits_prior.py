"""Teachers on a long tail of the digits: from which distribution labels are drawn, over three seeds.

The first class has 133 training images, the last one 5. All rows of a seed have the same teacher, and nothing of it is
inherited, so that a student knows of a class what the samples show. What is learned of rare classes is in the columns
head, middle and tail; the test images have all classes equally often.
"""

from benchmarks.plan import Row

PAIR, BASE = "Digits, a long tail, WRN-16-1 -> WRN-10-1", "uniform"
SEEDS = (20, 21, 22)


def priors(config: str, counts: str, *shared: str) -> tuple[Row, ...]:
  """Each prior, and the controls, of a config with the flags `shared`; `counts` are the classes' training images."""

  def row(name: str, *flags: str, teacher: str = BASE) -> Row:
    return Row(name, config, tuple(f"--config.{flag}" for flag in (*shared, *flags)), SEEDS, teacher)

  return (
    row(BASE, teacher=""),
    row("given, the true shares", "generator.prior=given", f"generator.prior_shares={counts}"),
    row("teacher", "generator.prior=teacher"),
    row("need", "generator.prior=need"),
    row("uniform, untrained generator", "arm=untrained_generator"),
    row("real images of the long tail", "arm=real_kd"),
  )


ROWS = priors("digits", "133,93,65,45,31,22,15,10,7,5", "dataset.imbalance=25", "student.inherit=False")
