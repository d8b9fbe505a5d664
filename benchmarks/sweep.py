"""Members of a sweep in one program against the same members one after another, alternating, in one run.

  python -m benchmarks.sweep [--config digits] [--grid 'loss.generator.scl=0.35,1.4'] [--seeds 5] [--rounds 3]
    [--out FILE.json] [--config.KEY=VALUE ...]
  python -m benchmarks.sweep --program 8 [--config digits] [--rounds 3] [--out FILE.json] [--config.KEY=VALUE ...]

Two sides are the command `cpsc-jax sweep` in a process of its own, with --together 0 and --together 1; the third,
`commands`, is an ordinary run for each member, as one would start them without sweeps. All use all cores that they may.
A round before the others trains the teachers, which all sides are then given, and fills the cache of compiled programs;
its times are written down and not counted. `ratios` are the median time together over those of the other two, from the
beginning of the first command to the end of the last. `differences` are those between the members of the two sweeps:
the largest in accuracy at the last epoch, and in the losses of the first epoch, relative.

--program measures the compiled epoch alone, of so many seeds with one teacher that is not trained, in one process:
`ms` are milliseconds of a member's iteration. Its rounds alternate too, after one that is not counted.
"""

import argparse
import json
import os
import pathlib
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from benchmarks.command import built, flags_of_runs, report
from cpsc_jax import algorithm, datasets, initial, mesh, nets
from cpsc_jax.environment import hardware
from cpsc_jax.errors import Refusal
from cpsc_jax.main import parse
from cpsc_jax.sweep.together import Program

SWEEPS = {"together": 0, "alone": 1}  # {side: --together}
SIDES = (*SWEEPS, "commands")
GRID, SEEDS = "loss.generator.scl=0.35,1.4", 5


def sweep(workdir: pathlib.Path, most: int, flags: Sequence[str], teachers: pathlib.Path | None) -> float:
  """Seconds of one sweep, with at most `most` members in a program (0: any number); `teachers` are those it is given.

  Raises:
    Refusal: the sweep failed; its last line is quoted.
  """
  if teachers:
    shutil.copytree(teachers, workdir / "teachers")
  return timed("cpsc_jax.sweep", [*flags, f"--workdir={workdir}", f"--together={most}"], "a sweep")


def commands(workdir: pathlib.Path, of_members: Mapping[str, Sequence[str]]) -> float:
  """Seconds of ordinary runs one after another, {member: the flags of its command}.

  Raises:
    Refusal: a run failed; its last line is quoted.
  """
  return sum(
    timed("cpsc_jax.main", [*flags, f"--workdir={workdir / name}"], f"the run of {name}")
    for name, flags in of_members.items()
  )


def timed(module: str, flags: Sequence[str], what: str) -> float:
  """Seconds of one command.

  Raises:
    Refusal: it failed; its last line is quoted.
  """
  began = time.monotonic()
  done = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True, check=False)
  if done.returncode:
    raise Refusal(f"{what} failed with {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}")
  return time.monotonic() - began


def members(workdir: pathlib.Path) -> dict[str, tuple[dict, list[dict]]]:
  """{member: (results, history of the student)} of a finished sweep."""
  folders = sorted(path.parent for path in (workdir / "members").glob("*/results.json"))
  return {
    folder.name: (
      json.loads((folder / "results.json").read_text()),
      json.loads((folder / "history.json").read_text())["student"],
    )
    for folder in folders
  }


def differences(one: pathlib.Path, other: pathlib.Path) -> dict[str, float]:
  """How far the members of two sweeps are apart.

  Raises:
    Refusal: they have not the same members.
  """
  ours, theirs = members(one), members(other)
  if ours.keys() != theirs.keys() or not ours:
    raise Refusal(f"the sweeps have different members: {', '.join(sorted(ours.keys() ^ theirs.keys())) or 'none'}.")
  accuracies, losses = [0.0], [0.0]
  for name, (results, history) in ours.items():
    its_results, its_history = theirs[name]
    last = [each["student"]["last"]["accuracy"] for each in (results, its_results)]
    accuracies.append(abs(last[0] - last[1]))
    for player, total in history[0]["totals"].items():
      losses.append(abs(total - its_history[0]["totals"][player]) / abs(total))
  return {"accuracy": max(accuracies), "losses of the first epoch": max(losses)}


def measure(flags: Sequence[str], rounds: int, folder: pathlib.Path) -> dict:
  """Carries out all rounds in `folder`; returns what the benchmark reports."""
  first = folder / "first"
  cold = {"together": sweep(first / "together", SWEEPS["together"], flags, None)}
  teachers = first / "together" / "teachers"
  teachers = teachers if teachers.exists() else None
  found = members(first / "together")
  of_members = {name: shlex.split(results["command"])[1:] for name, (results, _) in found.items()}

  def seconds_of(side: str, workdir: pathlib.Path) -> float:
    if side in SWEEPS:
      return sweep(workdir, SWEEPS[side], flags, teachers)
    return commands(workdir, of_members)

  for side in SIDES[1:]:
    cold[side] = seconds_of(side, first / side)
  seconds: dict[str, list[float]] = {side: [] for side in SIDES}
  for number in range(rounds):
    for side in SIDES[:: -1 if number % 2 else 1]:
      seconds[side].append(seconds_of(side, folder / str(number) / side))
      print(f"round {number + 1}, {side}: {seconds[side][-1]:.1f} s", flush=True)
  medians = {side: statistics.median(values) for side, values in seconds.items()}
  return {
    "flags": list(flags),
    "members": len(found),
    "together": sorted({results.get("together", 1) for results, _ in found.values()}),
    "seconds": seconds,
    "first": cold,
    "ratios": {side: medians["together"] / medians[side] for side in SIDES[1:]},
    "differences": differences(*(first / side for side in SWEEPS)),
    "cores": len(os.sched_getaffinity(0)),
    "hardware": hardware(),
  }


def measure_program(flags: Sequence[str], number: int, rounds: int) -> dict:
  """The epoch of `number` seeds as one program against as many calls of that of one; what the benchmark reports."""
  given, _ = parse(["benchmarks.sweep", *flags])
  spec = datasets.find(given.dataset.name, given.dataset.data_dir).spec
  (_, several), (c, one) = (built(given, spec, devices) for devices in (mesh.members_mesh(), mesh.make_mesh()))
  teacher = nets.init(one.teacher, jax.random.key(0), jnp.zeros((2, *spec.image_shape)))
  states = [initial.state(one, jax.random.key(seed), spec.image_shape) for seed in range(number)]
  iterations = c.schedule.iterations
  began = time.monotonic()
  state, epoch = Program(several, iterations, states, [teacher]).loaded()
  compiling = {"together": time.monotonic() - began}
  began = time.monotonic()
  alone = jax.jit(algorithm.epoch(one, iterations), donate_argnums=0).lower(states[0], teacher).compile()
  compiling["alone"] = time.monotonic() - began

  def epoch_together() -> None:
    nonlocal state
    state, _ = jax.block_until_ready(epoch(state))

  def epochs_alone() -> None:
    nonlocal states
    states = jax.block_until_ready([alone(each, teacher)[0] for each in states])

  sides = {"together": epoch_together, "alone": epochs_alone}
  ms: dict[str, list[float]] = {side: [] for side in sides}
  for counted in range(-1, rounds):
    for side, epoch_of in sorted(sides.items(), reverse=bool(counted % 2)):
      began = time.monotonic()
      epoch_of()
      if counted >= 0:
        ms[side].append(1000 * (time.monotonic() - began) / number / iterations)
  medians = {side: statistics.median(values) for side, values in ms.items()}
  return {
    "flags": list(flags),
    "members": number,
    "ms": ms,
    "compiling": compiling,
    "ratio": medians["together"] / medians["alone"],
    "hardware": hardware(),
  }


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.sweep", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument("--config", default="digits", help="(default: %(default)s)")
  parser.add_argument("--grid", help=f"(default: {GRID})")
  parser.add_argument("--seeds", type=int, help=f"(default: {SEEDS})")
  parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
  parser.add_argument("--program", type=int, metavar="N", help="N members of the compiled program alone")
  parser.add_argument("--out", type=pathlib.Path, help="a file for the numbers")
  options, rest = parser.parse_known_args(argv)
  try:
    rest = flags_of_runs(rest)
    for name in ("program", "rounds"):
      if (number := getattr(options, name)) is not None and number < 1:
        raise Refusal(f"--{name} is {number}; it must be at least 1.")
    if options.program and (options.grid is not None or options.seeds is not None):
      raise Refusal("--program N measures N seeds of the config alone; leave --grid and --seeds out.")
    if options.program:
      row = measure_program([f"--config={options.config}", *rest], options.program, options.rounds)
    else:
      grid, seeds = (GRID if options.grid is None else options.grid, SEEDS if options.seeds is None else options.seeds)
      flags = [f"--config={options.config}", f"--grid={grid}", f"--seeds={seeds}", *rest]
      with tempfile.TemporaryDirectory() as folder:
        row = measure(flags, options.rounds, pathlib.Path(folder))
  except Refusal as refusal:
    print(f"benchmarks.sweep: {refusal}", file=sys.stderr)
    return 2
  report(row, options.out)
  return 0


if __name__ == "__main__":
  sys.exit(main())
