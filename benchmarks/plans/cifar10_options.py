"""CIFAR-10 on two CPU cores: what each option adds, in a third of the epochs of the methods' variants "cpu".

Measured on the validation images, as settings are chosen by it. Needs --config.teacher.checkpoint=DIR, the converted
WRN-16-1 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR, BASE = "CIFAR-10, WRN-16-1 -> WRN-10-1, options", "cpsc"
# The variant as it was then; docs/results.md has what was changed since.
FIRST = ("generator.lr=1e-3", "generator.crop_pad=0", "generator.flip=False", "student.lr=0.1", "pool.replay_share=0.5")
SHORT = ("evaluate.split=validation", "schedule.epochs=8", *FIRST)
LESS_OFTEN = ("evaluate.split=validation", "schedule.epochs=13", *FIRST)  # takes as long
WITHOUT_REPLAY = ("pool.replay_share=0", "student.steps=4")  # an image between classes cannot be replayed
FAST_SHORT = ("evaluate.split=validation", "schedule.epochs=16", "pool.size=8192")  # 8 epochs of them are its warm-up


def row(name: str, *flags: str, config: str = "cifar10:cpu", short: tuple[str, ...] = SHORT) -> Row:
  return Row(name, config, tuple(f"--config.{flag}" for flag in (*short, *flags)))


ROWS = (
  row("cpsc"),
  row("- replay, four student steps for eight", *WITHOUT_REPLAY, short=LESS_OFTEN),
  row("the same + between classes 0.25", *WITHOUT_REPLAY, "generator.between_share=0.25", short=LESS_OFTEN),
  row("- inherited layers", "student.inherit=False"),
  row("+ average of the generator", "generator.ema=0.95"),
  row("distillation at T 4 for 20", "loss.kd_temperature=4"),
  row("+ standardised logits", "loss.kd_standardise=True"),
  row("+ the teacher's classifier", "student.classifier=teacher", "loss.student.features=1"),
  row("+ triplets", "loss.generator.triplet=0.1", "loss.student.triplet=0.1"),
  row("in bfloat16", "precision=bfloat16"),
  row("fast", config="fast_cifar10:cpu", short=FAST_SHORT),
  row("fast + kept logits", "pool.logits=True", config="fast_cifar10:cpu", short=FAST_SHORT),
)
