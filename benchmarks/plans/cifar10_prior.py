"""Teachers on a long tail of CIFAR-10: from which distribution labels are drawn, over three seeds, on two CPU cores.

The first class has 5,000 training images, the last one 50. All rows of a seed have the same teacher; the test images
have all classes equally often. Runs have a third of the epochs of `cifar10:cpu`, and layers are inherited as there: a
student that starts from nothing learns too little in this time (the plan cifar10_options).
Needs --config.dataset.data_dir=DIR.
"""

from benchmarks.plans import digits_prior

PAIR, BASE = "CIFAR-10, a long tail, WRN-16-1 -> WRN-10-1", digits_prior.BASE
ROWS = digits_prior.priors(
  "cifar10:cpu",
  "5000,2997,1796,1077,645,387,232,139,83,50",
  "dataset.imbalance=100",
  "precision=bfloat16",
  "schedule.epochs=8",
  "evaluate.every=4",
  "teacher.epochs=20",
  "teacher.batch_size=64",
)
