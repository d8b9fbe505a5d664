"""The path of gpu_cifar.py in seconds, on the digits: a rehearsal on a CPU."""

from benchmarks.plan import Row

PAIR = "Digits, a rehearsal"
ROWS = (
  Row("cpsc", "digits:smoke", ("--config.teacher.epochs=4", "--config.schedule.epochs=6")),
  Row("fast", "fast_cifar10:digits_smoke", teacher="cpsc"),
)
