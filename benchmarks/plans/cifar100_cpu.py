"""CIFAR-100 on two CPU cores: CPSC-DFKD with 100 classes, in the variant "cpu".

Needs --config.teacher.checkpoint=DIR, the converted small ResNet-32 of docs/teachers.md, and
--config.dataset.data_dir=DIR with CIFAR-100; where only its test images are at hand, prepared as a folder of one's own
(docs/data.md), also --config.dataset.name=NAME.
"""

from benchmarks.plan import Row

PAIR = "CIFAR-100, small ResNet-32 -> small ResNets"
SHARED = ("precision=bfloat16", "evaluate.every=10", "evaluate.diagnostics_every=20")


def row(name: str, *flags: str) -> Row:
  return Row(name, "cifar100:cpu", tuple(f"--config.{flag}" for flag in (*SHARED, *flags)))


BALANCED = "loss.generator.bn=0.5"  # the term itself is 20 times that of WRN-16-1, for which 10 was chosen
ROWS = (
  row("cpsc, bn 10 -> small ResNet-8"),
  row("cpsc, bn 0.5 -> small ResNet-8", BALANCED),
  row("untrained generator -> small ResNet-8", "arm=untrained_generator"),
  row("cpsc, bn 10 -> small ResNet-20", "student.net=small_resnet20"),
)
PUBLISHED = (("small ResNet-20 of others, trained on the real labels", "0.6969", "no teacher"),)
