"""CIFAR-10 on two CPU cores: settings of CPSC-DFKD one by one, in a third of the epochs of `cifar10:cpu`, in bfloat16.

Measured on the validation images, as settings are chosen by it. Needs --config.teacher.checkpoint=DIR, the converted
WRN-16-1 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR, BASE = "CIFAR-10, WRN-16-1 -> WRN-10-1, settings of CPSC-DFKD", "cpsc"
FIRST = ("generator.lr=1e-3", "generator.crop_pad=0", "generator.flip=False", "student.lr=0.1", "pool.replay_share=0.5")
SHORT = ("evaluate.split=validation", "precision=bfloat16", "schedule.epochs=8", *FIRST)
FAST = ("generator.lr=3e-3",)
JITTERED = (*FAST, "generator.crop_pad=4", "generator.flip=True")
OFTEN = ("pool.replay_share=0.75",)
NOW = (*JITTERED, "student.lr=0.05", *OFTEN)  # as `cifar10:cpu` has it since


def row(name: str, *flags: str) -> Row:
  return Row(name, "cifar10:cpu", tuple(f"--config.{flag}" for flag in (*SHORT, *flags)))


ROWS = (
  row("cpsc"),
  row("generator's rate 3e-3", *FAST),
  row("ce 2", "loss.generator.ce=2"),
  row("bn 2", "loss.generator.bn=2"),
  row("rate 1e-2", "generator.lr=1e-2"),
  row("rate 3e-3, bn 30", *FAST, "loss.generator.bn=30"),
  row("rate 3e-3, two generator steps, 19 iterations", *FAST, "generator.steps=2", "schedule.iterations=19"),
  row("rate 3e-3, student's rate 0.2", *FAST, "student.lr=0.2"),
  row("rate 3e-3, adversarial 0.3", *FAST, "loss.generator.adversarial=0.3"),
  row("rate 3e-3, scl 0", *FAST, "loss.generator.scl=0"),
  row("rate 3e-3, 14 student steps, 15 iterations", *FAST, "student.steps=14", "schedule.iterations=15"),
  row("rate 3e-3, student's rate 0.05", *FAST, "student.lr=0.05"),
  row("rate 3e-3, 6 epochs for the generator alone", *FAST, "generator.warmup_epochs=6", "schedule.epochs=13"),
  row("rate 3e-3, jittered", *JITTERED),
  row("rate 3e-3, jittered, three quarters replayed", *JITTERED, *OFTEN),
  row("rate 3e-3, jittered, student's rate 0.05", *JITTERED, "student.lr=0.05"),
  row("rate 3e-3, jittered, student's rate 0.05, three quarters replayed", *NOW),
  row("rate 3e-3, jittered, student's rate 0.03", *JITTERED, "student.lr=0.03"),
  row("as now, ce 2", *NOW, "loss.generator.ce=2"),
  row("as now, ce 8", *NOW, "loss.generator.ce=8"),
  row("as now, temperature 4", *NOW, "loss.kd_temperature=4"),
  row("as now, adversarial 3", *NOW, "loss.generator.adversarial=3"),
)
