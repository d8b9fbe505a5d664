"""Every method and every control arm on one data set, over several seeds, as a table.

  python -m benchmarks.methods --config configs/digits.py --seeds 3 [--jobs 2] [--only cpsc,rgal] [--out runs/methods]

Each row of each seed is a run of its own in OUT/ROW-SEED, all with the teacher of that seed. A finished run is not
repeated and an interrupted one resumes. OUT/methods.md and OUT/methods.json are written again after each. With --jobs N
that many runs are under way at a time, each on its own share of the cores. Settings are those of
configs/METHOD_cifar10.py for the config's data set, digits or cifar10; control arms have the config's own.
"""

import argparse
import concurrent.futures
import functools
import json
import os
import pathlib
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from cpsc_jax.errors import RESUME, Refusal
from cpsc_jax.main import config_path
from cpsc_jax.methods import METHODS
from cpsc_jax.record import write_whole

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
KEPT = (
  "seed",
  "arm",
  "method",
  "teacher",
  "student",
  "generator",
  "evaluation",
  "samples",
  "seconds",
  "seconds_by_part",
  "hardware",
)  # of results.json
TRIPLETS = ("--config.loss.generator.triplet=0.1", "--config.loss.student.triplet=0.1")


def rows(config: str | pathlib.Path) -> dict[str, tuple[str, tuple[str, ...]]]:
  """{row: (config file with variant, more flags)} for the base config FILE or FILE:smoke, methods first.

  Raises:
    Refusal: a config for which the other methods have no settings.
  """
  file, _, variant = str(config).partition(":")
  name = pathlib.Path(file).stem
  if name not in ("digits", "cifar10") or variant not in ("", "smoke"):
    raise Refusal(
      f"there are settings of every method for configs/digits.py and cifar10.py (and :smoke), not {config}."
    )
  variant = "_".join(part for part in ("digits" if name == "digits" else "", variant) if part)

  def of_method(method: str) -> str:
    return f"{pathlib.Path(file).with_name(f'{method}_cifar10.py')}:{variant}".rstrip(":")

  return {
    "cpsc": (str(config), ()),
    **{method: (of_method(method), ()) for method in METHODS if method != "cpsc"},
    "cpsc + triplets": (str(config), TRIPLETS),
    **{arm: (str(config), (f"--config.arm={arm}",)) for arm in ("untrained_generator", "real_kd", "real_labels")},
  }


def run(config: str, flags: Sequence[str], workdir: pathlib.Path, cores: set[int], until: float | None = None) -> bool:
  """Runs or resumes one row in a process of its own, on these `cores` only; returns whether it is finished.

  At the time `until`, of time.monotonic(), it is told to stop, and nothing is begun afterwards. With such a time, a run
  that was stopped is to be resumed; without, it has failed.

  Raises:
    Refusal: the run failed; its last line is quoted.
  """
  if (workdir / "results.json").exists():
    return True
  left = threading.TIMEOUT_MAX if until is None else until - time.monotonic()
  if left < 0:
    return False
  command = [sys.executable, "-m", "cpsc_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{workdir}.log", "a") as log:
    pin = functools.partial(os.sched_setaffinity, 0, cores)
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=pin)
    stop = threading.Timer(min(left, threading.TIMEOUT_MAX), process.terminate)
    stop.start()
    code = process.wait()
    stop.cancel()
  if code == RESUME and until is not None:
    return False
  if code:
    last = pathlib.Path(f"{workdir}.log").read_text().strip().splitlines()[-1:]
    raise Refusal(f"{workdir} failed with {code}: {' '.join(last)}")
  return True


def put_between(page: pathlib.Path, marks: tuple[str, str], text: str) -> None:
  """Puts `text` in place of what stands between two marks of a Markdown file.

  Raises:
    Refusal: the file lacks the marks.
  """
  before, begin, rest = page.read_text().partition(marks[0])
  _, end, after = rest.partition(marks[1])
  if not (begin and end):
    raise Refusal(f"{page} lacks the marks {' and '.join(marks)}; put them where the table is to stand.")
  write_whole(page, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())


def shares(jobs: int) -> list[set[int]]:
  """The cores of this process, divided among `jobs` runs; fewer shares where there are fewer cores."""
  cores = sorted(os.sched_getaffinity(0))
  return [set(cores[job::jobs]) for job in range(min(jobs, len(cores)))]


def finished_results(out: pathlib.Path, names: Iterable[str], seeds: int) -> dict[str, list[dict]]:
  """The results of every row so far: {row: [results of a seed, ...]}."""
  found = {}
  for name in names:
    paths = [folder(out, name, seed) / "results.json" for seed in range(seeds)]
    found[name] = [json.loads(path.read_text()) for path in paths if path.exists()]
  return found


def folder(out: pathlib.Path, name: str, seed: int) -> pathlib.Path:
  """Where a row of one seed is run."""
  return out / f"{name.replace(' ', '')}-{seed}"


def table(found: Mapping[str, list[dict]]) -> str:
  """The rows as Markdown."""
  lines = [
    "| row | seeds | last epoch | mean | best epoch | mean | gap to teacher | wall clock | images drawn |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for name, results in found.items():
    if not results:
      lines.append(f"| {name} | not measured | | | | | | | |")
      continue
    last, best = ([r["student"][which]["accuracy"] for r in results] for which in ("last", "best"))
    gap = statistics.mean(r["teacher"]["accuracy"] - value for r, value in zip(results, last, strict=True))
    seconds = statistics.median(r["seconds_by_part"]["student"] for r in results)
    lines.append(
      f"| {name} | {', '.join(str(r['seed']) for r in results)} | {four_digits(last)} | {statistics.mean(last):.4f} |"
      f" {four_digits(best)} | {statistics.mean(best):.4f} | {gap:.4f} | {seconds:.0f} s |"
      f" {results[0]['samples']['generator']:,} |"
    )
  return "\n".join(lines)


def four_digits(values: Iterable[float]) -> str:
  return ", ".join(f"{value:.4f}" for value in values)


def note(found: Mapping[str, list[dict]]) -> str:
  """What the table was measured on."""
  some = next((r for results in found.values() for r in results), None)
  if some is None:
    return "Nothing is measured yet."
  hardware, evaluation = some["hardware"], some["evaluation"]
  return (
    f"Accuracies on {evaluation['images']} {evaluation['split']} images. Median wall clock of the student's training"
    f" on {hardware['cores']} core(s) of {hardware['cpu']}."
  )


def write(out: pathlib.Path, found: Mapping[str, list[dict]]) -> None:
  """methods.md and methods.json of the results so far."""
  (out / "methods.md").write_text(f"{table(found)}\n\n{note(found)}\n")
  brief = {name: [{key: r[key] for key in KEPT} for r in results] for name, results in found.items()}
  (out / "methods.json").write_text(json.dumps(brief, indent=2) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, runs what is missing, writes the table; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.methods", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument(
    "--config", default=str(REPOSITORY / "configs" / "digits.py"), help="digits.py (default) or cifar10.py"
  )
  parser.add_argument("--seeds", type=int, default=3, help="0 .. SEEDS - 1 (default: %(default)s)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
  parser.add_argument("--only", help="rows, comma-separated (default: all)")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/methods"), help="(default: %(default)s)")
  options, rest = parser.parse_known_args(argv)
  try:
    if unknown := [flag for flag in rest if not flag.startswith("--config.")]:
      raise Refusal(f"unknown flag '{unknown[0]}'; use those of --help, or --config.KEY=VALUE.")
    options.config = config_path(options.config)
    if not pathlib.Path(options.config.partition(":")[0]).is_file():
      raise Refusal(f"no config file '{options.config}'; give configs/digits.py or configs/cifar10.py.")
    every = rows(options.config)
    names = options.only.split(",") if options.only else list(every)
    if unknown := [name for name in names if name not in every]:
      raise Refusal(f"no row '{unknown[0]}'; choose from {', '.join(every)}.")
    work(options, rest, {name: every[name] for name in names})
  except Refusal as refusal:
    print(f"methods: {refusal}", file=sys.stderr)
    return refusal.exit_code
  print((options.out / "methods.md").read_text())
  return 0


def work(options: argparse.Namespace, rest: Sequence[str], chosen: Mapping[str, tuple[str, tuple[str, ...]]]) -> None:
  """Trains the teachers (in the rows of real_labels, which need no other), then runs all rows that are not finished."""
  out, every, seeds, free = options.out, rows(options.config), range(options.seeds), queue.Queue()
  for cores in shares(options.jobs):
    free.put(cores)

  def write_all() -> None:
    write(out, finished_results(out, chosen, options.seeds))

  def one(name: str, seed: int, teacher: pathlib.Path | None = None) -> None:
    config, flags = every[name]
    cores = free.get()
    try:
      given = [f"--config.teacher.checkpoint={teacher}"] if teacher else []
      run(config, [*rest, *flags, *given, f"--config.seed={seed}"], folder(out, name, seed), cores)
    finally:
      free.put(cores)
    print(f"{name}, seed {seed}: done", flush=True)
    write_all()

  def in_parallel(tasks: Iterable[tuple]) -> None:
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
      for future in [pool.submit(one, *task) for task in tasks]:
        future.result()

  teachers = {seed: (folder(out, "real_labels", seed) / "teacher").absolute() for seed in seeds}
  in_parallel(("real_labels", seed) for seed in seeds)
  in_parallel((name, seed, teachers[seed]) for seed in seeds for name in chosen if name != "real_labels")
  write_all()


if __name__ == "__main__":
  sys.exit(main())
