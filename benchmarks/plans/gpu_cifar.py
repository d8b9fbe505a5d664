"""CIFAR-10 on one GPU in a few calls of ten minutes (benchmarks/gpu_campaign.sh), best expected evidence first.

Each pair's first row trains the teacher of the others. Schedules are a sixth of the published one. Needs
--config.dataset.data_dir=DIR, with CIFAR-10 prepared there.
"""

from benchmarks.plan import Row

PAIR = "CIFAR-10 on one GPU"
TEACHER = ("teacher.epochs=100", "teacher.batch_size=128")
WRN = ("teacher.net=wrn_40_2", "student.net=wrn_16_2", *TEACHER)
RESNET = ("teacher.net=resnet34", "student.net=resnet18", *TEACHER)
SHORT = ("schedule.epochs=100", "evaluate.every=10")
FAST = ("evaluate.every=10",)


def campaign(data: str = "cifar10") -> tuple[Row, ...]:
  """CPSC-DFKD of both pairs, then FastDFKD, CMI and real images with the same teachers, on a data set."""

  def row(name: str, *flags: str, config: str = data, teacher: str = "") -> Row:
    given = (f"dataset.name={data}", *flags)
    return Row(name, config, tuple(f"--config.{flag}" for flag in given), teacher=teacher)

  def others(pair: str, nets: tuple[str, ...]) -> list[Row]:
    teacher = f"cpsc, {pair}"
    fast = row(f"fast, {pair}", *nets, *FAST, config="fast_cifar10:five", teacher=teacher)
    cmi = row(f"cmi, {pair}", *nets, *FAST, config="cmi_cifar10", teacher=teacher)
    real = row(f"real_kd, {pair}", *nets, *SHORT, "arm=real_kd", teacher=teacher)
    return [fast, cmi, real]

  return (
    row("cpsc, WRN-40-2 -> WRN-16-2", *WRN, *SHORT),
    row("cpsc, ResNet-34 -> ResNet-18", *RESNET, *SHORT),
    *others("WRN-40-2 -> WRN-16-2", WRN),
    *others("ResNet-34 -> ResNet-18", RESNET),
  )


ROWS = campaign()
PUBLISHED = (
  ("CMI, WRN-40-2 -> WRN-16-2 (best epoch)", "0.9252", "0.9487"),
  ("FastDFKD with ten steps, WRN-40-2 -> WRN-16-2 (best epoch)", "0.9245", "0.9487"),
  ("CMI, ResNet-34 -> ResNet-18 (best epoch)", "0.9484", "0.9570"),
  ("FastDFKD with ten steps, ResNet-34 -> ResNet-18 (best epoch)", "0.9405", "0.9570"),
)
