"""Many runs of one config: a grid or a search, several seeds of each point, and a table of means and differences.

cpsc-jax sweep --config digits --grid 'loss.generator.scl=0,0.7,2;generator.conditional=true,false' --seeds 5

Members whose programs agree run side by side as one compiled program, the others one after another. The same command
resumes. docs/sweep.md explains the grammar of grids, what members share, and what is left in the folder. Further flags
are those of a run: --config.KEY=VALUE, for all members.
"""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Sequence

from cpsc_jax import stop

IMPORTING = contextlib.ExitStack()
if __name__ == "__main__":
  IMPORTING.enter_context(stop.at_once())

from cpsc_jax import compile_cache, mesh  # noqa: E402
from cpsc_jax import main as runs  # noqa: E402
from cpsc_jax.command import Flags  # noqa: E402
from cpsc_jax.errors import INTERRUPTED, Refusal  # noqa: E402

IMPORTING.close()
DEFAULT_SEEDS = 3


def flags() -> Flags:
  parser = Flags(
    prog="cpsc-jax sweep",
    description=__doc__.partition("\n\n")[0],
    epilog="--config NAME|FILE[:VARIANT] is required, and --config.KEY=VALUE holds for all members.",
    allow_abbrev=False,
  )
  parser.add_argument(
    "--grid",
    action="append",
    metavar="'KEY=VALUE,VALUE;KEY=...'",
    help="what varies: every combination; several --grid: the points of all of them; for a search also KEY=log(A..B)"
    " and KEY=even(A..B)",
  )
  parser.add_argument("--seeds", type=int, default=DEFAULT_SEEDS, help="of each point (default: %(default)s)")
  parser.add_argument("--workdir", help="folder of the sweep (default: runs/sweep_ and the config's name)")
  parser.add_argument(
    "--search",
    choices=("grid", "random", "halving"),
    default="grid",
    help="grid: all points (default); random: some, drawn at random; halving: many for a short time, the best third of"
    " them for longer. Searches choose on the validation part",
  )
  parser.add_argument("--budget", type=int, default=0, help="of a search: runs of full length that it may cost")
  parser.add_argument(
    "--together",
    type=int,
    default=0,
    metavar="N",
    help="members in one program, at most; 0: as many as memory allows (default); 1: one after another",
  )
  parser.add_argument("--dry-run", action="store_true", help="lists members, predicts memory and time, and ends")
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, carries out the sweep, prints its table; returns the exit code.

  `argv` is without the program's name; None means sys.argv[1:].
  """
  try:
    with stop.ended_in_time(), stop.exit_on_sigterm():
      options, rest = flags().parse_known_args(sys.argv[1:] if argv is None else argv)
      if not options.grid:
        raise Refusal("--grid is required, such as --grid 'loss.generator.scl=0,0.7,2'; --help shows its form.")
      for name in ("together", "budget"):
        if getattr(options, name) < 0:
          raise Refusal(f"--{name} is {getattr(options, name)}; it must be a whole number from 0 on.")
      config, _ = runs.parse(["cpsc-jax sweep", *rest])
      compile_cache.start()
      mesh.start()
      from cpsc_jax.sweep import work

      workdir = pathlib.Path(options.workdir or pathlib.Path("runs") / f"sweep_{config.name}")
      asked = work.Sweep(
        config=config,
        flags=tuple(rest),
        workdir=workdir,
        grids=tuple(options.grid),
        seeds=options.seeds,
        search=options.search,
        budget=options.budget,
        most=options.together,
      )
      checked = work.checked(asked)
      if options.search != "grid":
        print("config.evaluate.split is 'validation': a search chooses on a part held out of the training split")
      if options.dry_run:
        print(work.plan_text(checked))
        return 0
      began = time.monotonic()
      print(work.carry_out(checked))
      print(f"{time.monotonic() - began:,.0f} s; all files are in {workdir}")
  except Refusal as refusal:
    print("cpsc_jax: " + "".join(c if c.isprintable() else "?" for c in str(refusal)), file=sys.stderr)
    return refusal.exit_code
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return Refusal.exit_code
  except OSError as error:
    place, reason = error.filename or "the sweep", error.strerror or error
    print(f"cpsc_jax: {place}: {reason}; fix this, then resume with the same command.", file=sys.stderr)
    return Refusal.exit_code
  except KeyboardInterrupt:
    print(stop.SAID[INTERRUPTED], file=sys.stderr, flush=True)
    stop.end_program(INTERRUPTED)
    return INTERRUPTED
  return 0


if __name__ == "__main__":
  stop.program(main)
