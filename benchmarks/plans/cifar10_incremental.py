"""CIFAR-10 in five phases of two classes on two CPU cores: class-incremental learning and its controls.

All rows begin with the same network of the first two classes and have the same order of classes. Joint training has
the crops and the learning rate of that network. Needs --config.dataset.data_dir=DIR.
"""

from benchmarks.plans import digits_incremental

PAIR, BASE = "CIFAR-10, five phases of two classes, WRN-16-1", digits_incremental.BASE
JOINT = ("student.crop_pad=4", "student.lr=0.1")
ROWS = digits_incremental.arms("incremental_cifar10:cpu", (0,), JOINT, "precision=bfloat16")
