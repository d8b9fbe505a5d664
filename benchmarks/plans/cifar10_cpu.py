"""CIFAR-10 on two CPU cores: every method that has the variant "cpu", about 20 minutes each.

Needs --config.teacher.checkpoint=DIR, the converted WRN-16-1 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.table import Row

PAIR = "CIFAR-10, WRN-16-1 -> WRN-10-1"
ROWS = (
  Row("fast", "fast_cifar10:cpu"),
  Row("cpsc", "cifar10:cpu"),
  Row("nayer", "nayer_cifar10:cpu"),
  Row("fast, nothing inherited", "fast_cifar10:cpu", ("--config.student.inherit=False",)),
)
PUBLISHED = (("WRN-10-1 of others, trained on the real labels", "0.8806", "no teacher"),)
