"""The share of wall clock in which the device computes during a run, from a profiler's trace of a few epochs.

  python -m benchmarks.busy --config=digits --workdir=FOLDER [any flag of cpsc_jax.main] [--epochs=6]

The epochs traced are those of the student after the first two, with whatever belongs to them: measuring, saving,
writing. On a CPU the device computes while XLA executes a program; on a GPU while a kernel runs on any stream.
"""

import argparse
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from cpsc_jax import algorithm, main

FIRST = 2  # epochs left out: the first call compiles
CPU_EVENT = "ThunkExecutor::Execute"


def union(intervals: Iterable[tuple[float, float]]) -> float:
  """The length of the union of intervals (start, end)."""
  total, reached = 0.0, float("-inf")
  for start, end in sorted(intervals):
    total += max(0.0, end - max(start, reached))
    reached = max(reached, end)
  return total


def intervals(trace: pathlib.Path) -> list[tuple[float, float]]:
  """(start, end) in seconds of what ran on the devices of a trace."""
  (file,) = trace.rglob("*.xplane.pb")
  found = []
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    on_device = plane.name.startswith("/device:")
    for line in plane.lines:
      if on_device and not line.name.startswith("Stream"):
        continue
      for event in line.events:
        if on_device or event.name.startswith(CPU_EVENT):
          found.append((event.start_ns / 1e9, event.end_ns / 1e9))
  return found


class Traced:
  """A compiled epoch, of whose calls `epochs` are traced after the first ones."""

  def __init__(self, program: Callable[..., Any], epochs: int, folder: pathlib.Path):
    self.program, self.epochs, self.folder = program, epochs, folder
    self.calls, self.began, self.seconds = itertools.count(), 0.0, 0.0

  def __call__(self, state: Any, teacher: Any) -> Any:
    call = next(self.calls)
    if call == FIRST:
      jax.block_until_ready(state)
      jax.profiler.start_trace(str(self.folder))
      self.began = time.perf_counter()
    if call == FIRST + self.epochs:
      jax.block_until_ready(state)
      self.seconds = time.perf_counter() - self.began
      jax.profiler.stop_trace()
    return self.program(state, teacher)


def measure(flags: Sequence[str], epochs: int) -> float:
  """The share of a run with these flags. Raises SystemExit if it fails or has too few epochs."""
  compile_epoch, made = algorithm.compile_epoch, []
  with tempfile.TemporaryDirectory() as folder:

    def traced(setup: Any, iterations: int, real_data: bool = False) -> Any:
      program = compile_epoch(setup, iterations, real_data)
      if real_data:
        return program
      made.append(Traced(program, epochs, pathlib.Path(folder)))
      return made[-1]

    algorithm.compile_epoch = traced
    try:
      code = main.main(["busy", *flags])
    finally:
      algorithm.compile_epoch = compile_epoch
      if made and made[-1].began and not made[-1].seconds:
        jax.profiler.stop_trace()
    if code or not made or not made[-1].seconds:
      raise SystemExit(code or f"the run has no {FIRST + epochs + 1} epochs to distil; choose fewer with --epochs.")
    return union(intervals(pathlib.Path(folder))) / made[-1].seconds


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Other flags are cpsc_jax.main's.")
  parser.add_argument("--epochs", type=int, default=6, help="how many are traced")
  options, rest = parser.parse_known_args()
  share = measure(rest, options.epochs)
  print(f"the device computes in {share:.1%} of the wall clock of {options.epochs} epochs")
