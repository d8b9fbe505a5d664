"""CIFAR-10 on two CPU cores for longer: CPSC-DFKD in four times the epochs of `cifar10:cpu`, three seeds, beside an
untrained generator, the real images and the published code's ways. FastDFKD for as long is a row of cifar10_cpu.py.

Needs --config.teacher.checkpoint=DIR, the converted WRN-16-1 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR, BASE = "CIFAR-10, WRN-16-1 -> WRN-10-1, for longer", "cpsc"
LONG = ("precision=bfloat16", "schedule.epochs=96", "evaluate.every=12", "evaluate.diagnostics_every=24")
PUBLISHED_STEPS = ("reference=True", "student.steps=5", "generator.steps=6", "schedule.epochs=60")


def row(name: str, *flags: str, seeds: tuple[int, ...] = (0,)) -> Row:
  return Row(name, "cifar10:cpu", tuple(f"--config.{flag}" for flag in (*LONG, *flags)), seeds)


ROWS = (
  row("cpsc", seeds=(0, 1, 2)),
  row("cpsc, untrained generator", "arm=untrained_generator"),
  row("real_kd", "arm=real_kd"),
  row("cpsc, as its published code runs it, but in bfloat16", *PUBLISHED_STEPS),
)
PUBLISHED = (("WRN-10-1 of others, trained on the real labels", "0.8806", "no teacher"),)
