"""CIFAR-10 on two CPU cores: what each part of CPSC-DFKD is worth, in a third of the epochs of `cifar10:cpu`.

As digits_ablation, at the smallest scale that separates the parts. `cifar10:cpu` does without `ikd`, so that it is a
row of its own here. Layers are inherited: a student that starts from nothing learns too little in this time (the plan
cifar10_options). Needs --config.teacher.checkpoint=DIR, the converted WRN-16-1 of docs/teachers.md, and
--config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row
from benchmarks.plans.digits_ablation import without

PAIR, BASE = "CIFAR-10, WRN-16-1 -> WRN-10-1: the parts of CPSC-DFKD", "cpsc"
SEEDS = (20, 21, 22)
TERMS = ("adversarial", "bn", "scl", "ce")
IKD = "loss.generator.ikd=1"


def row(name: str, *flags: str) -> Row:
  given = ("precision=bfloat16", "schedule.epochs=8", "evaluate.every=4", *flags)
  return Row(name, "cifar10:cpu", tuple(f"--config.{flag}" for flag in given), SEEDS)


ROWS = (
  row(BASE),
  row("untrained generator", "arm=untrained_generator"),
  # as in digits_ablation, without what asks for labels; the student has no such term here
  row("- conditional generator, ce, scl", "generator.conditional=False", *without("ce", "scl")),
  *(row(f"- {term}", *without(term)) for term in TERMS),
  row("+ ikd", IKD),
  *(row(f"{term} alone", *without(*(other for other in TERMS if other != term))) for term in TERMS),
  row("ikd alone", IKD, *without(*TERMS)),
)
