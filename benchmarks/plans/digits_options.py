"""The digits: what each option adds to CPSC-DFKD or FastDFKD, over five seeds, each with the same teachers."""

from benchmarks.plan import Row

PAIR, BASE = "Digits, WRN-16-1 -> WRN-10-1, options", "cpsc"
SEEDS = (20, 21, 22, 23, 24)


def row(name: str, *flags: str, config: str = "digits") -> Row:
  return Row(name, config, tuple(f"--config.{flag}" for flag in flags), SEEDS, teacher="cpsc")


ROWS = (
  Row("cpsc", "digits", (), SEEDS),
  row("+ replay 0.5", "pool.replay_share=0.5", "pool.dtype=uint8"),
  row("+ average of the generator", "generator.ema=0.95"),
  row("+ between classes 0.25", "generator.between_share=0.25"),
  row("+ distillation at T 4", "loss.kd_temperature=4"),
  row("+ standardised logits", "loss.kd_standardise=True"),
  row("+ the teacher's classifier", "student.classifier=teacher", "loss.student.features=1"),
  row("+ triplets", "loss.generator.triplet=0.1", "loss.student.triplet=0.1"),
  row("fast", config="fast_cifar10:digits"),
  row("fast + kept logits", "pool.logits=True", config="fast_cifar10:digits"),
)
