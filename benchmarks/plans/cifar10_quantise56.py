"""CIFAR-10: a deeper network of few bits, fine-tuned without data by the settings of the smaller one.

The rows of 10 epochs fine-tune in 5 of them, in place of 20 of 25. The first four rows ask for float32, as they were
run on a GPU, whose default is bfloat16. Needs --config.teacher.checkpoint=DIR, the converted ResNet-56 of
docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plans.cifar10_quantise import LEAST_ERROR, row

PAIR = "CIFAR-10, ResNet-56 at few bits"
EXACT = "precision=float32"
SHORT = "schedule.epochs=10"
ROWS = (
  row(4, EXACT, seeds=(0, 1, 2)),
  row(5, EXACT),
  row(8, EXACT),
  row(3, EXACT),
  row(4, SHORT, name=", 10 epochs"),
  row(8, SHORT, name=", 10 epochs"),
  *(row(bits, SHORT, LEAST_ERROR, name=", 10 epochs, ranges of least error") for bits in (4, 5, 3)),
  *(row(bits, LEAST_ERROR, name=", ranges of least error") for bits in (4, 5)),
)
