"""CIFAR-10 on two CPU cores: every method in its variant "cpu", meant to take about 20 minutes; the best also longer.

Needs --config.teacher.checkpoint=DIR, the converted WRN-16-1 of docs/teachers.md, and --config.dataset.data_dir=DIR.
"""

from benchmarks.plan import Row

PAIR = "CIFAR-10, WRN-16-1 -> WRN-10-1"


def longer(method, epochs, batch_size):
  """Three times the epochs of a method's variant "cpu", a pool that holds what they make, and bfloat16.

  Bfloat16 takes about three quarters of the time on processors that have it (docs/performance.md).
  """
  flags = ("precision=bfloat16", f"schedule.epochs={epochs}", f"pool.size={epochs * 4 * batch_size}")
  return Row(f"{method}, three times as long", f"{method}_cifar10:cpu", tuple(f"--config.{flag}" for flag in flags))


ROWS = (
  Row("fast", "fast_cifar10:cpu"),
  Row("fast, untrained generator", "fast_cifar10:cpu", ("--config.arm=untrained_generator",)),
  Row("cpsc", "cifar10:cpu"),
  Row("nayer", "nayer_cifar10:cpu"),
  longer("fast", 108, 128),
  longer("nayer", 96, 120),
  Row("fast, nothing inherited", "fast_cifar10:cpu", ("--config.student.inherit=False",)),
  Row("cpsc, untrained generator", "cifar10:cpu", ("--config.arm=untrained_generator",)),
  Row("cmi", "cmi_cifar10:cpu"),
  Row("rgal", "rgal_cifar10:cpu"),
  Row("dafl", "dafl_cifar10:cpu"),
  Row("deepinversion", "deepinversion_cifar10:cpu"),
  Row("dfad", "dfad_cifar10:cpu"),
  Row("zskt", "zskt_cifar10:cpu"),
  Row("the student of fast on real images", "fast_cifar10:cpu", ("--config.arm=real_kd",)),
)
PUBLISHED = (("WRN-10-1 of others, trained on the real labels", "0.8806", "no teacher"),)
