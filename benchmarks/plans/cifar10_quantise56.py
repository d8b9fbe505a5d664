"""CIFAR-10: a deeper network of few bits, fine-tuned without data by the settings of the smaller one, in less time.

10 epochs, of which 5 fine-tune, in place of 25 and 20: a ResNet-56 takes three times as long as a ResNet-20.
Needs --config.teacher.checkpoint=DIR, the converted ResNet-56 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plans.cifar10_quantise import row

PAIR = "CIFAR-10, ResNet-56 at few bits, 10 epochs"
ROWS = tuple(row(bits, "schedule.epochs=10") for bits in (4, 5, 8, 3))
