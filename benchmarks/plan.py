"""Plans: rows of runs, each a config with flags and seeds, and what carries one of them out."""

import ctypes
import dataclasses
import functools
import json
import math
import os
import pathlib
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from cpsc_jax import tasks
from cpsc_jax.config import settled
from cpsc_jax.errors import RESUME, Refusal
from cpsc_jax.main import parse
from cpsc_jax.record import differences, write_whole
from cpsc_jax.stop import GRACE

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
UNITS = {"s": 1, "m": 60, "h": 3600}
PLACES = ("--config.dataset.data_dir=", "--config.teacher.checkpoint=")  # of one machine, and no part of what was run
PR_SET_PDEATHSIG = 1  # of Linux, as sched_setaffinity is


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of a plan: `config` as --config takes it, more `flags`, and the seeds it is to be run with.

  With `teacher`, the name of an earlier row, each seed is given the teacher that this seed of that row has trained.
  """

  name: str
  config: str
  flags: tuple[str, ...] = ()
  seeds: tuple[int, ...] = (0,)
  teacher: str = ""

  @property
  def slug(self) -> str:
    return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")

  def given(self, seed: int) -> list[str]:
    """The flags of a run that belong to the plan; what differs between machines is not among them."""
    return [f"--config={self.config}", f"--config.seed={seed}", *self.flags]

  def command(self, seed: int) -> str:
    return shlex.join(["cpsc-jax", *self.given(seed)])


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a plan's file declares.

  `base` is the row with which others are compared, seed by seed; `published` are rows of others: (what, accuracy, of
  which teacher). `curves` are {what is varied: {its value: the row's name}}, of which each is a panel of a picture.
  """

  name: str
  pair: str
  rows: tuple[Row, ...]
  base: str = ""
  published: tuple[tuple[str, str, str], ...] = ()
  curves: Mapping[str, Mapping[float, str]] = dataclasses.field(default_factory=dict)

  def row(self, name: str) -> Row:
    return next(row for row in self.rows if row.name == name)


def read(path: pathlib.Path) -> Plan:
  """The plan in a file.

  Raises:
    Refusal: no such file, a file that lacks PAIR or ROWS, two rows of one name, or a name that no row has.
  """
  try:
    scope = runpy.run_path(str(path))  # a plan is a program of the user's own, as a config is
  except OSError as error:
    raise Refusal(f"plan {path} cannot be read: {error.strerror}.") from None
  lacking = [name for name in ("PAIR", "ROWS") if name not in scope]
  if lacking:
    raise Refusal(f"plan {path} lacks {' and '.join(lacking)}; see benchmarks/plans for an example.")
  rows = tuple(scope["ROWS"])
  if len({row.slug for row in rows}) < len(rows):
    raise Refusal(f"plan {path} has two rows of the same name; rename one.")
  published, curves = tuple(scope.get("PUBLISHED", ())), scope.get("CURVES", {})
  plan = Plan(path.stem, scope["PAIR"], rows, scope.get("BASE", ""), published, curves)
  named = [("BASE", plan.base)] if plan.base else []
  named += [("CURVES", name) for points in curves.values() for name in points.values()]
  for where, name in named:
    if name not in {row.name for row in rows}:
      raise Refusal(f"plan {path} has no row '{name}', which its {where} names.")
  known: dict[str, Row] = {}
  for row in rows:
    trains = known.get(row.teacher)
    if row.teacher and not (trains and not trains.teacher and set(row.seeds) <= set(trains.seeds)):
      raise Refusal(
        f"row '{row.name}' of plan {path} takes its teachers from '{row.teacher}', which is no earlier row that trains"
        " them with the same seeds."
      )
    known[row.name] = row
  return plan


def folder(out: pathlib.Path, plan: Plan, row: Row, seed: int) -> pathlib.Path:
  """Where a row of one seed is run."""
  return out / plan.name / f"{row.slug}-{seed}"


def shares(jobs: int) -> list[set[int]]:
  """The cores of this process, divided among `jobs` runs; fewer shares where there are fewer cores."""
  cores = sorted(os.sched_getaffinity(0))
  return [set(cores[job::jobs]) for job in range(min(jobs, len(cores)))]


def commit() -> str:
  """The commit of this checkout, with "+" where files differ from it; of a copy without .git, what $COMMIT says."""
  if not (REPOSITORY / ".git").exists():
    return os.environ.get("COMMIT", "unknown")

  def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()

  return git("rev-parse", "--short=10", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def carry_out(
  plan: Plan, row: Row, seed: int, out: pathlib.Path, flags: Sequence[str], cores: set[int], until: float
) -> None:
  """Runs or resumes one seed of a row on these `cores`; at the time `until`, of time.monotonic(), it is stopped.

  Raises:
    Refusal: the run failed, and its last line is quoted; or the folder has a run of another command or config; or the
      row's teacher is not there.
  """
  workdir = folder(out, plan, row, seed).absolute()
  given = row.given(seed)
  about = {"command": row.command(seed), "commit": commit()}
  if more := [flag for flag in flags if not flag.startswith(PLACES)]:
    about["flags"] = more
  origin = workdir.with_suffix(".origin.json")
  if origin.exists() and (known := json.loads(origin.read_text())["command"]) != about["command"]:
    raise Refusal(f"{workdir} was begun as '{known}', not as '{about['command']}'; delete it or rename the row.")
  if row.teacher:
    teacher = folder(out, plan, plan.row(row.teacher), seed).absolute() / "teacher"
    if not teacher.exists() and time.monotonic() < until:
      raise Refusal(f"row '{row.name}' takes its teachers from '{row.teacher}'; run that row first, seed {seed}.")
    given.append(f"--config.teacher.checkpoint={teacher}")
  if (workdir / "config.json").exists():
    saved = json.loads((workdir / "config.json").read_text())
    config = settled(parse(["cpsc-jax", *given, *flags])[0], saved["precision"])
    task = tasks.of(config)
    if not task.in_phases:  # what the run took from its teacher is not the plan's to say
      config = task.of_teacher(config, {"net": saved["student"]["net"]})
    if differ := differences(workdir, config, saved):
      raise Refusal(f"{workdir} was run with another {', '.join(differ)}; delete it or rename the row.")
  workdir.parent.mkdir(parents=True, exist_ok=True)
  if not origin.exists() and time.monotonic() < until:
    write_whole(origin, (json.dumps(about) + "\n").encode())
  done = run([*given, *flags], workdir, cores, until)
  if done or workdir.exists():
    print(f"{row.name}, seed {seed}: {'done' if done else 'stopped; the same command resumes it'}", flush=True)


def run(flags: Sequence[str], workdir: pathlib.Path, cores: set[int], until: float) -> bool:
  """Runs or resumes one command in a process of its own, on these `cores` only; returns whether it is finished.

  At the time `until`, and when this process ends in any way, it is told to stop; nothing is begun afterwards.

  Raises:
    Refusal: the run failed; its last line is quoted.
  """
  if (workdir / "results.json").exists():
    return True
  left = until - time.monotonic()
  if left < 0:
    return False
  command = [sys.executable, "-m", "cpsc_jax.main", *flags, f"--workdir={workdir}"]
  log = workdir.with_name(f"{workdir.name}.log")
  with open(log, "a") as file:
    pin = functools.partial(_begin, cores)
    patient = {**os.environ, GRACE: "900"}  # the epoch under way is to be saved
    process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, preexec_fn=pin, env=patient)
    stop = threading.Timer(min(left, threading.TIMEOUT_MAX), process.terminate)
    stop.start()
    code = process.wait()
    stop.cancel()
  if code == RESUME and time.monotonic() >= until:
    return False
  if code:
    raise Refusal(f"{workdir} failed with {code}: {' '.join(log.read_text().strip().splitlines()[-1:])}")
  return True


def _begin(cores: set[int]) -> None:
  """In the process of a run, before it begins: its cores, and a request to stop it if the plan's own process ends."""
  os.sched_setaffinity(0, cores)
  ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def seconds_of(text: str) -> float:
  """Seconds of "90s", "30m" or "2h"."""
  number, unit = text[:-1], text[-1:]
  try:
    seconds = float(number) * UNITS[unit]
  except (KeyError, ValueError):
    seconds = math.nan
  if not math.isfinite(seconds):
    raise Refusal(f"--budget is '{text}'; expected a number and s, m or h, such as 2h.")
  return seconds
