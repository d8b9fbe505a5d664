"""20 classes of Tiny-ImageNet at 64 pixels: what stalls CPSC-DFKD, looked for in four epochs on validation images.

Needs --config.dataset.data_dir=DIR and --config.dataset.name=NAME, as tiny20_cpu. The teacher of all rows is trained
without the validation images.
"""

from benchmarks.plan import Row

PAIR, BASE = "20 classes of Tiny-ImageNet, WRN-16-1 -> WRN-10-1, settings of CPSC-DFKD", "cpsc"
SHARED = (
  "evaluate.split=validation",
  "teacher.net=wrn_16_1",
  "teacher.epochs=20",
  "student.net=wrn_10_1",
  "generator.net=dcgan",
  "precision=bfloat16",
  "evaluate.every=2",
  "evaluate.diagnostics_every=4",
  "schedule.epochs=4",
)


def row(name: str, *flags: str, teacher: str = BASE) -> Row:
  return Row(name, "photos", tuple(f"--config.{flag}" for flag in (*SHARED, *flags)), teacher=teacher)


ROWS = (
  row(BASE, teacher=""),
  row("the other generator", "generator.net=cifar"),
  row("generator's rate 1e-3", "generator.lr=1e-3"),
)
