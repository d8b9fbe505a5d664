"""CIFAR-10 on one GPU in a few calls of ten minutes (benchmarks/gpu_campaign.sh), best expected evidence first.

Each pair's first row trains the teacher of the others. CPSC-DFKD has the settings of `cifar10:cpu`, which were chosen
on validation images of a smaller pair, with twice the batch and the student's rate in proportion. Needs
--config.dataset.data_dir=DIR, with CIFAR-10 prepared there.
"""

from benchmarks.plan import Row

PAIR = "CIFAR-10 on one GPU"
TEACHER = ("teacher.epochs=50", "teacher.batch_size=128", "teacher.optimiser=nesterov", "teacher.warmup_epochs=1")
WRN = ("teacher.net=wrn_40_2", "student.net=wrn_16_2", *TEACHER)
RESNET = ("teacher.net=resnet34", "student.net=resnet18", *TEACHER)
MEASURED = ("precision=bfloat16", "evaluate.every=10", "evaluate.diagnostics_every=50", "evaluate.gradients=False")
OURS = ("generator.width=64", "schedule.batch_size=256", "student.lr=0.1", "schedule.epochs=100")
ITERATIONS = 40


def campaign(data: str = "cifar10") -> tuple[Row, ...]:
  """CPSC-DFKD of both pairs, then with the same teachers its controls, FastDFKD and CMI, on a data set."""

  def row(pair: str, name: str, *flags: str, config: str = "cifar10:cpu") -> Row:
    nets = WRN if pair.startswith("WRN") else RESNET
    given = (f"dataset.name={data}", *nets, *MEASURED, *flags)
    teacher = "" if name == "cpsc" else f"cpsc, {pair}"
    return Row(f"{name}, {pair}", config, tuple(f"--config.{flag}" for flag in given), teacher=teacher)

  def rows(pair: str) -> list[Row]:
    ours = (*OURS, f"schedule.iterations={ITERATIONS}")
    return [
      row(pair, "cpsc", *ours),
      row(pair, "cpsc, untrained generator", *ours, "arm=untrained_generator"),
      row(pair, "fast with five steps", config="fast_cifar10:five"),
      row(pair, "real_kd", *ours, "arm=real_kd"),
      row(pair, "cmi", config="cmi_cifar10"),
    ]

  wrn, resnet = rows("WRN-40-2 -> WRN-16-2"), rows("ResNet-34 -> ResNet-18")
  return (wrn[0], resnet[0], *wrn[1:], *resnet[1:])


ROWS = campaign()
PUBLISHED = (
  ("CMI, WRN-40-2 -> WRN-16-2 (best epoch)", "0.9252", "0.9487"),
  ("FastDFKD with ten steps, WRN-40-2 -> WRN-16-2 (best epoch)", "0.9245", "0.9487"),
  ("CMI, ResNet-34 -> ResNet-18 (best epoch)", "0.9484", "0.9570"),
  ("FastDFKD with ten steps, ResNet-34 -> ResNet-18 (best epoch)", "0.9405", "0.9570"),
)
