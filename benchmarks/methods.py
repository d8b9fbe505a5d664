"""Every method and every control arm on one data set, over several seeds, as a table.

  python -m benchmarks.methods --config configs/digits.py --seeds 3 [--jobs 2] [--only cpsc,rgal] [--out runs/methods]

Each row of each seed is a run of its own under --out/ROW-SEED, all with the teacher of that seed, so that a row that is
finished is not run again and one that was interrupted goes on. methods.md and methods.json under --out are written
anew after each. With --jobs N so many runs share the cores, each keeping to its own. Settings are those of
configs/METHOD_cifar10.py for the config's data set, digits or cifar10; control arms are the config's own.
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

from cpsc_jax.errors import Refusal
from cpsc_jax.main import config_file
from cpsc_jax.methods import METHODS

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TRIPLETS = ("--config.loss.generator.triplet=0.1", "--config.loss.student.triplet=0.1")


def rows(config):
  """{row: (config file with variant, more flags)} for the base config FILE or FILE:smoke, methods first."""
  file, _, variant = str(config).partition(":")
  name = pathlib.Path(file).stem
  if name not in ("digits", "cifar10") or variant not in ("", "smoke"):
    raise Refusal(
      f"there are settings of every method for configs/digits.py and cifar10.py (and :smoke), not {config}."
    )
  variant = "_".join(part for part in ("digits" if name == "digits" else "", variant) if part)
  neighbour = lambda method: f"{pathlib.Path(file).with_name(f'{method}_cifar10.py')}:{variant}".rstrip(":")
  return {
    "cpsc": (config, ()),
    **{method: (neighbour(method), ()) for method in METHODS if method != "cpsc"},
    "cpsc + triplets": (config, TRIPLETS),
    **{arm: (config, (f"--config.arm={arm}",)) for arm in ("untrained_generator", "real_kd", "real_labels")},
  }


def run(config, flags, workdir, cores):
  """Runs or resumes one row in a process of its own that keeps to `cores`; a Refusal if it fails."""
  if (workdir / "results.json").exists():
    return
  command = [sys.executable, "-m", "cpsc_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]
  workdir.parent.mkdir(parents=True, exist_ok=True)
  with open(f"{workdir}.log", "a") as log:
    keep_to = functools.partial(os.sched_setaffinity, 0, cores)
    done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, preexec_fn=keep_to, check=False)
  if done.returncode:
    last = pathlib.Path(f"{workdir}.log").read_text().strip().splitlines()[-1:]
    raise Refusal(f"{workdir} failed with {done.returncode}: {' '.join(last)}")


def shares(jobs):
  """The cores of this process dealt out to `jobs` runs."""
  cores = sorted(os.sched_getaffinity(0))
  return [set(cores[job::jobs]) for job in range(min(jobs, len(cores)))]


def figures(out, names, seeds):
  """What is known of every row so far: {row: [results of a seed, ...]}."""
  found = {}
  for name in names:
    paths = [folder(out, name, seed) / "results.json" for seed in range(seeds)]
    found[name] = [json.loads(path.read_text()) for path in paths if path.exists()]
  return found


def folder(out, name, seed):
  return out / f"{name.replace(' ', '')}-{seed}"


def table(found):
  """The rows as Markdown."""
  lines = [
    "| row | seeds | last epoch | mean | best epoch | mean | gap to teacher | wall clock | images drawn |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  each = lambda values: ", ".join(f"{value:.4f}" for value in values)
  for name, results in found.items():
    if not results:
      lines.append(f"| {name} | not measured | | | | | | | |")
      continue
    last, best = ([r["student"][which]["accuracy"] for r in results] for which in ("last", "best"))
    gap = statistics.mean(r["teacher"]["accuracy"] - value for r, value in zip(results, last, strict=True))
    seconds = statistics.median(r["seconds_by_part"]["student"] for r in results)
    lines.append(
      f"| {name} | {', '.join(str(r['seed']) for r in results)} | {each(last)} | {statistics.mean(last):.4f} |"
      f" {each(best)} | {statistics.mean(best):.4f} | {gap:.4f} | {seconds:.0f} s |"
      f" {results[0]['samples']['generator']:,} |"
    )
  return "\n".join(lines)


def write(out, found):
  """methods.md and methods.json of what is known so far."""
  hardware = next((r["hardware"] for results in found.values() for r in results), {})
  note = "Median wall clock of the student's training" + (
    f" on {hardware['cores']} core(s) of {hardware['cpu']}." if hardware else "."
  )
  (out / "methods.md").write_text(f"{table(found)}\n\n{note}\n")
  kept = (
    "seed",
    "arm",
    "method",
    "teacher",
    "student",
    "generator",
    "samples",
    "seconds",
    "seconds_by_part",
    "hardware",
  )
  brief = {name: [{key: r[key] for key in kept} for r in results] for name, results in found.items()}
  (out / "methods.json").write_text(json.dumps(brief, indent=2) + "\n")


def main(argv=None):
  """Parses flags, runs what is missing, writes the table; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.methods", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument(
    "--config", default=str(REPOSITORY / "configs" / "digits.py"), help="configs/digits.py or cifar10.py"
  )
  parser.add_argument("--seeds", type=int, default=3, help="0 .. SEEDS - 1 (default: %(default)s)")
  parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default: %(default)s)")
  parser.add_argument("--only", help="rows, comma-separated (default: all)")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/methods"), help="(default: %(default)s)")
  options, rest = parser.parse_known_args(argv)
  try:
    if strange := [flag for flag in rest if not flag.startswith("--config.")]:
      raise Refusal(f"'{strange[0]}' is neither a flag of this program nor --config.KEY=VALUE.")
    if not config_file([f"--config={options.config}"]).is_file():
      raise Refusal(f"no config file '{options.config}'.")
    every = rows(options.config)
    names = options.only.split(",") if options.only else list(every)
    if unknown := [name for name in names if name not in every]:
      raise Refusal(f"no row '{unknown[0]}'; there are {', '.join(every)}.")
    work(options, rest, {name: every[name] for name in names})
  except Refusal as refusal:
    print(f"methods: {refusal}", file=sys.stderr)
    return refusal.exit_code
  print((options.out / "methods.md").read_text())
  return 0


def work(options, rest, chosen):
  """Trains the teachers (in the rows of real_labels, which need no other), then runs all rows that are not finished."""
  out, free = options.out, queue.Queue()
  for cores in shares(options.jobs):
    free.put(cores)
  report = lambda: write(out, figures(out, chosen, options.seeds))

  def one(name, config, flags, seed, teacher=None):
    cores = free.get()
    try:
      given = [f"--config.teacher.checkpoint={teacher}"] if teacher else []
      run(config, [*rest, *flags, *given, f"--config.seed={seed}"], folder(out, name, seed), cores)
    finally:
      free.put(cores)
    print(f"{name}, seed {seed}: done", flush=True)
    report()

  def all_of(tasks):
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
      for future in [pool.submit(one, *task) for task in tasks]:
        future.result()

  config, flags = rows(options.config)["real_labels"]
  all_of(("real_labels", config, flags, seed) for seed in range(options.seeds))
  teacher = lambda seed: (folder(out, "real_labels", seed) / "teacher").absolute()
  all_of(
    (name, config, flags, seed, teacher(seed))
    for seed in range(options.seeds)
    for name, (config, flags) in chosen.items()
    if name != "real_labels"
  )
  report()


if __name__ == "__main__":
  sys.exit(main())
