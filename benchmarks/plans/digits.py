"""The digits: every method and control over five seeds, each with the same teachers; digits_options.py has options."""

from benchmarks.plan import Row
from cpsc_jax.methods import METHODS

PAIR, BASE = "Digits, WRN-16-1 -> WRN-10-1", "cpsc"
SEEDS = (20, 21, 22, 23, 24)
RGAL = (  # the published command and code; `rgal_cifar10:digits` is the paper's form
  "loss.triplet.synthesis_of=student",
  "loss.triplet.synthesis_from=2",
  "loss.triplet.swapped=False",
  "loss.triplet.student_features=pooled",
)


BATCH_256 = ("schedule.batch_size=256", "schedule.iterations=10")  # as many images as with 64
BATCH_512 = ("schedule.batch_size=512", "schedule.iterations=5")
SCALED = "schedule.lr_batch_size=64"


def row(name: str, *flags: str, config: str = "digits") -> Row:
  return Row(name, config, tuple(f"--config.{flag}" for flag in flags), SEEDS, teacher="cpsc")


ROWS = (
  Row("cpsc", "digits", (), SEEDS),
  row("cpsc, untrained generator", "arm=untrained_generator"),
  row("real_kd", "arm=real_kd"),
  row("cpsc, nothing inherited", "student.inherit=False"),
  row("cpsc, nothing inherited, untrained generator", "student.inherit=False", "arm=untrained_generator"),
  *(row(method, config=f"{method}_cifar10:digits") for method in METHODS if method != "cpsc"),
  row("rgal as its command runs it", *RGAL, config="rgal_cifar10:digits"),
  row("fast with Reptile", "episodes.form=reptile", config="fast_cifar10:digits"),
  row("cpsc in bfloat16", "precision=bfloat16"),
  row("cpsc, batch 256", *BATCH_256),
  row("cpsc, batch 256, rates scaled", *BATCH_256, SCALED),
  row("cpsc, batch 512", *BATCH_512),
  row("cpsc, batch 512, rates scaled", *BATCH_512, SCALED),
  row("cpsc, norms in 8 parts", "student.norm_parts=8"),
)
