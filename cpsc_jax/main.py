"""python -m cpsc_jax.main --config configs/digits.py [--workdir DIR] [--config.seed=1 ...]"""

import time

STARTED = time.monotonic()

import pathlib  # noqa: E402
import sys  # noqa: E402

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from cpsc_jax.errors import Refusal  # noqa: E402

INTERRUPTED = 130


def main(argv=None):
  """Parses flags, runs, prints the table; returns the exit code."""
  argv = sys.argv if argv is None else argv
  try:
    config, workdir = parse(argv)
    from cpsc_jax import distill, report

    results = distill.run(config, workdir, STARTED)
    report.print_table(results)
    print(f"everything is in {workdir}")
  except Refusal as refusal:
    print(f"cpsc_jax: {refusal}", file=sys.stderr)
    return refusal.exit_code
  except KeyboardInterrupt:
    print("cpsc_jax: interrupted; the same command resumes from the last checkpoint.", file=sys.stderr)
    return INTERRUPTED
  return 0


def parse(argv):
  """(config, workdir) of a command line.

  Raises:
    Refusal: no config, a file that is none, or an override of a key that does not exist or of the wrong type.
  """
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "where everything goes (default: runs/<config name>)", flag_values=values)
  config_flags.DEFINE_config_file(
    "config", None, "the config file; configs/NAME.py:smoke is its run of seconds", lock_config=True, flag_values=values
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
  try:
    rest = values(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError, ImportError, SyntaxError) as error:
    raise Refusal(" ".join(str(error).split())) from error
  if values.help:
    print(f"{__doc__}\n{values.main_module_help()}")
    raise SystemExit(0)
  if rest[1:]:
    raise Refusal(f"'{rest[1]}' is not a flag; flags look like --config.student.lr=0.05.")
  if values.config is None:
    raise Refusal("no --config given; try --config configs/digits.py.")
  return values.config, pathlib.Path(values.workdir or pathlib.Path("runs") / values.config.name)


if __name__ == "__main__":
  sys.exit(main())
