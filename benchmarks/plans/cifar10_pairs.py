"""CIFAR-10 on two CPU cores: CPSC-DFKD from two more converted teachers, to students of their own family.

Needs --config.dataset.data_dir=DIR and a folder teachers/ with the converted resnet56 and small_resnet20 of
docs/teachers.md where the plan is run.
"""

from benchmarks.plan import Row

PAIR = "CIFAR-10, ResNet-56 -> ResNet-20, small ResNet-20 -> small ResNet-8"
LONG = ("precision=bfloat16", "evaluate.every=10", "evaluate.diagnostics_every=20")


def row(name: str, teacher: str, student: str, *flags: str) -> Row:
  nets = (f"teacher.checkpoint=teachers/{teacher}", f"student.net={student}")
  return Row(name, "cifar10:cpu", tuple(f"--config.{flag}" for flag in (*LONG, *nets, *flags)))


ROWS = (
  row("small ResNet-20 -> small ResNet-8", "small_resnet20", "small_resnet8"),
  row("ResNet-56 -> ResNet-20", "resnet56", "cifar_resnet20"),
)
PUBLISHED = (
  ("small ResNet-8 of others, trained on the real labels", "0.8959", "no teacher"),
  ("ResNet-20 of others, trained on the real labels", "0.9173", "no teacher"),
)
