"""Teachers on a long tail of CIFAR-10: from which distribution labels are drawn, over three seeds, on two CPU cores.

The first class has 5,000 training images, the last one 50. All rows of a seed have the same teacher, and nothing of it
is inherited, so that a student knows of a class what the samples show; the test images have all classes equally often.
Needs --config.dataset.data_dir=DIR.
"""

from benchmarks.plans import digits_prior

PAIR, BASE = "CIFAR-10, a long tail, WRN-16-1 -> WRN-10-1", digits_prior.BASE
ROWS = digits_prior.priors(
  "cifar10:cpu",
  "5000,2997,1796,1077,645,387,232,139,83,50",
  "dataset.imbalance=100",
  "student.inherit=False",
  "precision=bfloat16",
  "evaluate.every=8",
  "teacher.epochs=40",
  "teacher.batch_size=64",
)
