"""One config and its control arms over several seeds, as a table with means and deviations.

  python -m benchmarks.seeds --config digits --seeds 10-14 [--arms distill,real_kd] [--jobs 2] [--out runs/seeds]
    [--into FILE]

The arm `distill` is the plain command, one seed at a time on all cores, and trains the teacher of its seed; the other
arms use that teacher, JOBS of them at a time, each on its share of the cores. A finished run is not repeated and an
interrupted one resumes. OUT/seeds.md and OUT/seeds.json are written after each run; with --into, the table also takes
the place of what stands between the two marks <!-- seeds --> and <!-- /seeds --> of FILE.
"""

import argparse
import concurrent.futures
import json
import pathlib
import queue
import statistics
import sys
from collections.abc import Sequence

from benchmarks.methods import KEPT, put_between, run, shares
from cpsc_jax.config import CHOICES
from cpsc_jax.errors import Refusal
from cpsc_jax.main import config_path
from cpsc_jax.record import write_whole
from cpsc_jax.report import fidelity_name

MARKS = "<!-- seeds -->", "<!-- /seeds -->"
Found = dict[str, dict[int, dict]]


def folder(out: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
  return out / f"{arm}-{seed}"


def results(out: pathlib.Path, arms: Sequence[str], seeds: Sequence[int]) -> Found:
  """{arm: {seed: results}} of all runs that are finished."""
  paths = {arm: {seed: folder(out, arm, seed) / "results.json" for seed in seeds} for arm in arms}
  return {
    arm: {seed: json.loads(path.read_text()) for seed, path in of_arm.items() if path.exists()}
    for arm, of_arm in paths.items()
  }


def table(found: Found) -> str:
  """The results as Markdown: last epoch, best epoch in brackets, mean and sample standard deviation."""
  seeds = sorted({seed for of_arm in found.values() for seed in of_arm})
  lines = [
    f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | deviation | label fidelity | seconds |",
    "|---" * (len(seeds) + 5) + "|",
  ]
  if teachers := {seed: r["teacher"] for seed, r in found.get("distill", {}).items()}:
    cells = [f"{teachers[seed]['accuracy']:.4f}" if seed in teachers else "not measured" for seed in seeds]
    net = next(iter(teachers.values()))["net"]
    lines.append(_row(f"teacher, {net}", cells, [t["accuracy"] for t in teachers.values()], "", ""))
  for arm, of_arm in found.items():
    cells = [_cell(of_arm[seed]) if seed in of_arm else "not measured" for seed in seeds]
    last = [r["student"]["last"]["accuracy"] for r in of_arm.values()]
    generators = [r["generator"] for r in of_arm.values() if r["generator"]]
    fidelity = [generator[fidelity_name(generator)] for generator in generators]
    known = f"{min(fidelity):.3f} to {max(fidelity):.3f}" if fidelity and None not in fidelity else ""
    known += " (pool)" if known and fidelity_name(generators[0]) == "pool_fidelity" else ""
    seconds = f"{statistics.median(r['seconds'] for r in of_arm.values()):.0f}" if of_arm else ""
    net = f", {next(iter(of_arm.values()))['student']['net']}" if of_arm else ""
    lines.append(_row(f"`{arm}`{net}", cells, last, known, seconds))
  return "\n".join([*lines, "", *_notes(found)])


def _cell(result: dict) -> str:
  last, best = result["student"]["last"], result["student"]["best"]
  return f"{last['accuracy']:.4f} ({best['accuracy']:.4f} at {best['epoch']})"


def _row(name: str, cells: list[str], values: list[float], fidelity: str, seconds: str) -> str:
  mean = f"{statistics.mean(values):.4f}" if values else ""
  deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
  return f"| {name} | {' | '.join(cells)} | {mean} | {deviation} | {fidelity} | {seconds} |"


def _notes(found: Found) -> list[str]:
  """What was measured on what, one sentence per arm."""
  lines = []
  for arm, of_arm in found.items():
    if of_arm:
      some = next(iter(of_arm.values()))
      hardware, evaluation = some["hardware"], some["evaluation"]
      lines.append(
        f"- `{arm}`: {len(of_arm)} runs, {hardware['cores']} core(s) of {hardware['cpu']}, {evaluation['images']}"
        f" images of the {evaluation['split']} split; median seconds of a whole command."
      )
  return lines


def write(out: pathlib.Path, found: Found, into: pathlib.Path | None) -> None:
  out.mkdir(parents=True, exist_ok=True)
  write_whole(out / "seeds.md", (table(found) + "\n").encode())
  brief = {arm: [{key: r[key] for key in KEPT} for r in of_arm.values()] for arm, of_arm in found.items()}
  write_whole(out / "seeds.json", (json.dumps(brief, indent=2) + "\n").encode())
  if into:
    put_between(into, MARKS, table(found))


def seeds_of(text: str) -> list[int]:
  """The numbers of "10-14" or "0,1,2"."""
  try:
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(part) for part in text.split(",")]
  except ValueError as error:
    raise Refusal(f"--seeds is '{text}'; expected FIRST-LAST or numbers with commas between.") from error


def work(options: argparse.Namespace, rest: list[str], arms: list[str], seeds: list[int]) -> None:
  out, cores = options.out, queue.Queue()
  for share in shares(options.jobs):
    cores.put(share)

  def report() -> None:
    write(out, results(out, arms, seeds), options.into)

  def one(arm: str, seed: int) -> None:
    teacher = (folder(out, "distill", seed) / "teacher").absolute()
    flags = [*rest, f"--config.arm={arm}", f"--config.seed={seed}"]
    if arm == "distill":
      run(options.config, flags, folder(out, arm, seed), shares(1)[0])
    else:
      share = cores.get()
      try:
        run(options.config, [*flags, f"--config.teacher.checkpoint={teacher}"], folder(out, arm, seed), share)
      finally:
        cores.put(share)
    print(f"{arm}, seed {seed}: done", flush=True)

  for seed in seeds:
    one("distill", seed)
    report()
  others = [(arm, seed) for arm in arms if arm != "distill" for seed in seeds]
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    for future in [pool.submit(one, *task) for task in others]:
      future.result()
      report()
  report()


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, runs what is missing, writes the table; returns the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.seeds", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument("--config", default="digits", help="a ready config or a file (default: %(default)s)")
  parser.add_argument("--seeds", default="0,1,2", help="10-14 or 0,1,2 (default: %(default)s)")
  parser.add_argument("--arms", default=",".join(CHOICES["arm"]), help="with commas between (default: all)")
  parser.add_argument("--jobs", type=int, default=1, help="control arms at a time (default: %(default)s)")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/seeds"), help="(default: %(default)s)")
  parser.add_argument("--into", type=pathlib.Path, help="a Markdown file with the two marks")
  options, rest = parser.parse_known_args(argv)
  try:
    arms, seeds = options.arms.split(","), seeds_of(options.seeds)
    if strange := [flag for flag in rest if not flag.startswith("--config.")]:
      raise Refusal(f"'{strange[0]}' is neither a flag of this program nor --config.KEY=VALUE.")
    if unknown := [arm for arm in arms if arm not in CHOICES["arm"]]:
      raise Refusal(f"no arm '{unknown[0]}'; there are {', '.join(CHOICES['arm'])}.")
    options.config = config_path(options.config)
    work(options, rest, ["distill", *(arm for arm in arms if arm != "distill")], seeds)
  except Refusal as refusal:
    print(f"seeds: {refusal}", file=sys.stderr)
    return refusal.exit_code
  print((options.out / "seeds.md").read_text())
  return 0


if __name__ == "__main__":
  sys.exit(main())
