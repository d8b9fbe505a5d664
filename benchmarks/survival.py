"""Kills runs, tells them to stop and damages their files, and checks how each of them ends.

  python -m benchmarks.survival --out DIR [--kills 200] [--signals 60] [--flips 100]

A run must end bit-identical to one that was left alone, or refuse by name what was damaged: never a wrong result, never
a traceback. The table goes to DIR/survival.md, every trial to DIR/survival.json; the same command goes on where it was
stopped.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):  # half of the time to compile
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax

from cpsc_jax import checkpoint, report, saved
from cpsc_jax.checkpoint import TEMPORARY
from cpsc_jax.errors import INTERRUPTED, RESUME, Refusal
from cpsc_jax.main import main as run
from cpsc_jax.record import write_whole
from cpsc_jax.stop import GRACE

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
FLAGS = (
  f"--config={REPOSITORY / 'configs' / 'digits.py'}:smoke",
  "--config.teacher.epochs=6",
  "--config.schedule.epochs=8",
  "--config.checkpoint.every=2",
  "--config.pool.replay_share=0.25",
)
SECONDS_TO_END = 10.0  # after a signal
SECONDS_TO_APPEAR = 120.0  # for a moment to come
OUTPUT_CODES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: RESUME, signal.SIGINT: INTERRUPTED}


@dataclasses.dataclass
class Trial:
  """One thing that was done to a run.

  Attributes:
    what: "kill -9", "SIGTERM", "Ctrl-C" or "byte flip".
    where: the phase of the run, or the kind of file.
    ended: how: "bit-identical", "refused by name" or "WRONG".
    seconds: from a signal to the end of the process.
    details: the file and byte that were flipped; what went wrong.
  """

  what: str
  where: str
  ended: str = ""
  seconds: float = 0.0
  details: str = ""


@dataclasses.dataclass(frozen=True)
class Running:
  """A run in a process of its own, what it has printed, and when it was started (time.time())."""

  process: subprocess.Popen
  workdir: pathlib.Path
  log: pathlib.Path
  since: float

  def imports_jax(self) -> bool:
    with contextlib.suppress(OSError):
      return "jaxlib" in pathlib.Path(f"/proc/{self.process.pid}/maps").read_text()
    return False

  def says(self, words: str) -> bool:
    return re.search(words, self.log.read_text()) is not None

  def saves(self, folder: str) -> bool:
    return any((self.workdir / folder / "checkpoints").glob(f"*{TEMPORARY}"))

  def has_written(self, name: str) -> bool:
    with contextlib.suppress(OSError):
      return (self.workdir / name).stat().st_mtime >= self.since
    return False


@dataclasses.dataclass(frozen=True)
class Phase:
  """When a run is hit.

  Attributes:
    begun: whether the phase has begun.
    seconds: the hit comes at a random moment of so many seconds from then on.
    cold: whether nothing is compiled yet.
  """

  begun: Callable[[Running], bool]
  seconds: float
  cold: bool = False


# In the order in which a run comes through them.
PHASES = {
  "import": Phase(Running.imports_jax, 0.8),
  "compiling the teacher": Phase(lambda run: run.says(r"teacher: \d+ epochs"), 3.0, cold=True),
  "training the teacher": Phase(lambda run: run.says(r"teacher: \d+ epochs"), 1.5),
  "saving the teacher": Phase(lambda run: run.saves("teacher_training"), 0.03),
  "evaluation": Phase(lambda run: run.says("start as the teacher's"), 1.0),
  "compiling the student": Phase(lambda run: run.says(r"distill: \d+ epochs"), 4.0, cold=True),
  "training the student": Phase(lambda run: run.says(r"distill: \d+ epochs"), 2.0),
  "saving the student": Phase(lambda run: run.saves("."), 0.03),
  "writing results": Phase(lambda run: run.has_written("student.partial"), 0.4),
  "drawing pictures": Phase(lambda run: run.has_written("history.json"), 0.6),
}


@dataclasses.dataclass(frozen=True)
class Campaign:
  """A folder to work in, the flags of a run, and the workdir of one that is left alone."""

  out: pathlib.Path
  flags: tuple[str, ...]
  undisturbed: pathlib.Path

  @functools.cached_property
  def want(self) -> dict:
    """What the run ends with that is left alone; it is carried out if that was not done before."""
    code, said = self.complete(self.undisturbed)
    if code:
      raise Refusal(f"the run that is left alone ends with {code}: {said}")
    return outcome(self.undisturbed)

  def start(self, workdir: pathlib.Path, cold: bool = False) -> Running:
    """A run in a process of its own; `cold`: with nothing compiled before."""
    log, since = self.out / "log.txt", time.time()
    environment = {key: value for key, value in os.environ.items() if key != GRACE}
    if cold:
      shutil.rmtree(self.out / "cold", ignore_errors=True)
      environment["JAX_COMPILATION_CACHE_DIR"] = str(self.out / "cold")
    command = [sys.executable, "-m", "cpsc_jax.main", *self.flags, f"--workdir={workdir}"]

    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script, and of what that starts
      signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("w") as file:
      process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file, env=environment)
    return Running(process, workdir, log, since)

  def complete(self, workdir: pathlib.Path) -> tuple[int, str]:
    """Carries out or resumes a run in this process: (exit code, what it says to stderr)."""
    with captured() as said:
      code = run(["cpsc-jax", *self.flags, f"--workdir={workdir}"])
    return code, said.getvalue()


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
  """stderr within the block; stdout is dropped, and so are log messages."""
  said, logger = io.StringIO(), logging.getLogger("cpsc_jax")
  before = logger.level
  logger.setLevel(logging.CRITICAL)
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
    try:
      yield said
    finally:
      logger.setLevel(before)


def outcome(workdir: pathlib.Path) -> dict:
  """All that a run finds out and all that it keeps, but for the time it took."""
  results = json.loads((workdir / "results.json").read_text())
  kept = {name: checkpoint.read_card(workdir / name)["digest"] for name in saved.WHICH}
  kept |= {name: (workdir / name).read_bytes() for name in ("history.json", "samples.npz", "config.json")}
  return (
    kept
    | {name: results[name] for name in ("student", "generator", "evaluation", "samples", "config")}
    | {"teacher": results["teacher"] | {"variables": kept["teacher"]}}
  )


def hit(campaign: Campaign, workdir: pathlib.Path, name: str, kind: signal.Signals, rng: random.Random) -> Trial | None:
  """Sends a signal to a run in a phase of it; None if it does not come through that phase any more.

  Where the run ends before the signal, its folder is put back and the signal comes earlier.
  """
  before = campaign.out / "before"
  shutil.rmtree(before, ignore_errors=True)
  shutil.copytree(workdir, before)
  for tries in range(4):
    if trial := hit_once(campaign, workdir, name, kind, rng, PHASES[name].seconds / 2**tries):
      return trial
    shutil.rmtree(workdir)
    shutil.copytree(before, workdir)
  return None


def hit_once(
  campaign: Campaign, workdir: pathlib.Path, name: str, kind: signal.Signals, rng: random.Random, seconds: float
) -> Trial | None:
  """`hit`, at most `seconds` after the phase has begun; None if the run ended before that."""
  phase, what = PHASES[name], {signal.SIGKILL: "kill -9", signal.SIGINT: "Ctrl-C"}.get(kind, kind.name)
  run = campaign.start(workdir, phase.cold)
  process = run.process
  try:
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    while not phase.begun(run):
      if process.poll() is not None or time.monotonic() > deadline:
        said = run.log.read_text()
        return None if process.poll() == 0 else Trial(what, name, "WRONG", 0, f"never came: {said[-300:]}")
      time.sleep(0.001)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(rng.uniform(0, seconds))
      return None
    process.send_signal(kind)
    began = time.monotonic()
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(3 * SECONDS_TO_END)
    seconds = time.monotonic() - began
  finally:
    process.kill()
    process.wait()
  if process.returncode == 0 and (workdir / "results.json").exists():
    return None  # it was done already
  wrong = wrong_ending(kind, process.returncode, seconds, run.log.read_text())
  return Trial(what, name, "WRONG" if wrong else "", round(seconds, 2), wrong)


def wrong_ending(kind: signal.Signals, code: int, seconds: float, said: str) -> str:
  """What is wrong with how a process ended after a signal; empty if nothing is."""
  if code != OUTPUT_CODES[kind]:
    return f"exit code {code}: {said[-300:]}"
  if kind == signal.SIGKILL:
    return ""
  own = [line for line in said.splitlines() if line.startswith("cpsc_jax: ")]
  if seconds > SECONDS_TO_END:
    return f"took {seconds:.1f} s to end: {said[-300:]}"
  return "" if len(own) == 1 and "Traceback" not in said else f"said {said[-300:]}"


def signals(campaign: Campaign, number: int, kinds: Sequence[signal.Signals]) -> list[Trial]:
  """One run, hit in every one of its phases, then carried to its end, which must be that of a run left alone."""
  rng, workdir, trials = random.Random(f"{kinds} {number}"), campaign.out / "run", []
  shutil.rmtree(workdir, ignore_errors=True)
  workdir.mkdir(parents=True)
  for place, name in enumerate(PHASES):
    trial = hit(campaign, workdir, name, kinds[(number + place) % len(kinds)], rng)
    trials += [trial] if trial else []
  code, said = campaign.complete(workdir)
  identical = code == 0 and outcome(workdir) == campaign.want
  for trial in trials:
    trial.ended = trial.ended or ("bit-identical" if identical else "WRONG")
    trial.details = trial.details or ("" if identical else f"in the end: exit code {code}, {said[-300:]}")
  return trials


# States of a workdir, {name: files that a kill leaves out}; and the kinds of its files, the first that fits.
LATER = ("results.json", "files.sha256", "history.json", "samples.*", "pool.npz", "curves.png", "student*", "generator")
STATES = {
  "finished": (),
  "in distillation": LATER,
  "in teacher training": (*LATER, "checkpoints", "events", "teacher"),
}
KINDS = {
  "events": r"(^|/)events/",
  "net.json": r"/net\.json$",
  "a net's arrays": r"^\w+/variables/.*/d/",
  "a net's metadata": r"^\w+/variables/",
  "a checkpoint's arrays": r"checkpoints/\d+/tree/.*/d/",
  "a checkpoint's record": r"checkpoints/\d+/record/",
  "a checkpoint's files.sha256": r"checkpoints/\d+/files\.sha256$",
  "a checkpoint's metadata": r"checkpoints/\d+/",
  "pictures": r"\.png$",
}


def kind_of(name: str) -> str:
  """What kind of file a name in a workdir is; small files at its top are a kind of their own."""
  return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), name)


def files_of(workdir: pathlib.Path) -> dict[str, list[str]]:
  """{kind: names} of all files of a workdir that hold a byte."""
  names = sorted(
    str(path.relative_to(workdir)) for path in workdir.rglob("*") if path.is_file() and path.stat().st_size
  )
  kinds = collections.defaultdict(list)
  for name in names:
    kinds[kind_of(name)].append(name)
  return dict(sorted(kinds.items()))


def flip(campaign: Campaign, number: int) -> Trial:
  """One bit of one file of a workdir is turned, and the run is repeated; if it refuses, the bit is turned back.

  Kinds of files take turns, within each state of a workdir. Afterwards the pictures are drawn again and the nets read.
  """
  places = places_of(campaign)
  return flipped(campaign, number, *places[number % len(places)])


def places_of(campaign: Campaign) -> list[tuple[str, str]]:
  """All (state, kind of file) that there are."""
  campaign.want  # noqa: B018
  workdir = campaign.out / "flipped"
  return [(state, kind) for state in STATES for kind in files_of(left_in(campaign, state, workdir))]


def flipped(campaign: Campaign, number: int, state: str, kind: str) -> Trial:
  """The trial of a random bit of a random file of this kind, in a workdir in this state."""
  rng, workdir = random.Random(f"flip {number}"), campaign.out / "flipped"
  name = rng.choice(files_of(left_in(campaign, state, workdir))[kind])
  content = bytearray((workdir / name).read_bytes())
  place, bit = rng.randrange(len(content)), rng.randrange(8)
  trial = Trial("byte flip", f"{kind}, {state}", details=f"{name}, byte {place}, bit {bit}")
  whole = bytes(content)
  content[place] ^= 1 << bit
  (workdir / name).write_bytes(content)
  try:
    trial.ended, said = judged(campaign, workdir, name)
    if trial.ended == "refused by name":
      (workdir / name).write_bytes(whole)
      mended, said_then = judged(campaign, workdir, name)
      trial.ended = trial.ended if mended == "bit-identical" else "WRONG"
      said += f"; mended: {said_then}"
  except BaseException as error:  # what is looked for
    trial.ended, said = "WRONG", "".join(traceback.format_exception_only(error))
  trial.details += f": {said}" if trial.ended == "WRONG" else ""
  return trial


def left_in(campaign: Campaign, state: str, workdir: pathlib.Path) -> pathlib.Path:
  """`workdir`, made anew as it is in a state of STATES."""
  shutil.rmtree(workdir, ignore_errors=True)
  shutil.copytree(campaign.undisturbed, workdir)
  for pattern in STATES[state]:
    for path in workdir.glob(pattern):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  return workdir


def judged(campaign: Campaign, workdir: pathlib.Path, name: str) -> tuple[str, str]:
  """(how a run in a workdir ends of which file `name` was changed, what it said)."""
  code, said = campaign.complete(workdir)
  if code == 2:
    named = str(workdir) in said and any(part in said.replace(str(workdir), "") for part in pathlib.Path(name).parts)
    good = named and said.startswith("cpsc_jax: ") and said.count("\n") == 1
    return ("refused by name" if good else "WRONG"), said
  if code != 0 or outcome(workdir) != campaign.want:
    return "WRONG", f"exit code {code}: {said}"
  with captured():
    report.report(workdir)
    for which in saved.WHICH:
      saved.load(saved.find(workdir, which))
  return ("bit-identical" if outcome(workdir) == campaign.want else "WRONG"), said


def table(trials: Sequence[Trial]) -> str:
  """The trials as Markdown; of flipped bits by kind of file, in whatever state the workdir was."""
  columns = ("what", "where", "times", "bit-identical", "refused by name", "wrong", "longest, s")
  lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
  groups = collections.defaultdict(list)
  for trial in trials:
    groups[trial.what, trial.where.partition(", ")[0]].append(trial)
    groups[trial.what, "all"].append(trial)
  order = {name: place for place, name in enumerate(PHASES)}
  for (what, where), group in sorted(groups.items(), key=lambda g: (g[0][0], order.get(g[0][1], 99), g[0][1])):
    counts = collections.Counter(trial.ended for trial in group)
    seconds = f"{max(t.seconds for t in group):.1f}" if what in ("SIGTERM", "Ctrl-C") else ""
    cells = [counts[ended] for ended in ("bit-identical", "refused by name", "WRONG")]
    lines.append(f"| {what} | {where} | {len(group)} | {' | '.join(map(str, cells))} | {seconds} |")
  return "\n".join(lines) + "\n"


def carry_out(out: pathlib.Path, kills: int, stops: int, flips: int) -> list[Trial]:
  """All trials, those of an earlier call with the same `out` included."""
  out.mkdir(parents=True, exist_ok=True)
  record, flags = out / "survival.json", (*FLAGS, f"--config.dataset.data_dir={out.absolute() / 'data'}")
  campaign = Campaign(out.absolute(), flags, out.absolute() / "undisturbed")
  done = json.loads(record.read_text()) if record.exists() else {}
  stopping = (signal.SIGTERM, signal.SIGINT)
  parts = {
    "flip": (flips, lambda number: [flip(campaign, number)]),
    "kill": (kills, lambda number: signals(campaign, number, (signal.SIGKILL,))),
    "stop": (stops, lambda number: signals(campaign, number, stopping)),
  }
  for part, (wanted, work) in parts.items():
    rounds = done.setdefault(part, [])
    for number in itertools.count(len(rounds)):
      if sum(map(len, rounds)) >= wanted:
        break
      rounds.append([dataclasses.asdict(trial) for trial in work(number)])
      write_whole(record, (json.dumps(done, indent=1) + "\n").encode())
      print(f"{part} {number}: {', '.join(t['where'] + ' ' + t['ended'] for t in rounds[-1])}", flush=True)
      jax.clear_caches()
  return [Trial(**trial) for rounds in done.values() for round in rounds for trial in round]


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, carries out the trials and writes the table; returns 1 if any of them went wrong."""
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument("--out", type=pathlib.Path, required=True)
  for name, number in (("kills", 200), ("signals", 60), ("flips", 100)):
    flags.add_argument(f"--{name}", type=int, default=number, help="at least so many (default: %(default)s)")
  options = flags.parse_args(argv)
  compiled = str(options.out.absolute() / "compiled")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  jax.config.update("jax_compilation_cache_dir", compiled)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  trials = carry_out(options.out, options.kills, options.signals, options.flips)
  (options.out / "survival.md").write_text(table(trials))
  print(table(trials))
  wrong = [trial for trial in trials if trial.ended == "WRONG"]
  for trial in wrong:
    print(f"WRONG: {trial.what}, {trial.where}: {trial.details}")
  return 1 if wrong else 0


if __name__ == "__main__":
  sys.exit(main())
