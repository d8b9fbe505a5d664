"""CIFAR-10: a deeper network of few bits, fine-tuned without data by the settings of the smaller one.

Needs --config.teacher.checkpoint=DIR, the converted ResNet-56 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plans.cifar10_quantise import row

PAIR = "CIFAR-10, ResNet-56 at few bits"
ROWS = (row(4), row(5), row(8), row(3))
