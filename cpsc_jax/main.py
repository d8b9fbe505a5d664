"""python -m cpsc_jax.main --config configs/digits.py [--workdir DIR] [--config.seed=1 ...]"""

import time

STARTED = time.monotonic()

import pathlib  # noqa: E402
import sys  # noqa: E402

import jax  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from cpsc_jax import mesh, stop  # noqa: E402
from cpsc_jax.command import INTERRUPTED  # noqa: E402
from cpsc_jax.errors import RESUME, Refusal  # noqa: E402


def main(argv=None):
  """Parses flags, runs, prints the table; returns the exit code."""
  argv = sys.argv if argv is None else argv
  try:
    with stop.exit_on_sigterm():
      config, workdir = parse(argv)
      mesh.start()
      from cpsc_jax import distill, report

      results = distill.run(config, workdir, STARTED)
      if mesh.is_primary():
        report.print_table(results)
        print(f"everything is in {workdir}")
  except Refusal as refusal:
    print(f"cpsc_jax: {refusal}", file=sys.stderr)
    return refusal.exit_code
  except OSError as error:
    where = error.filename or workdir
    print(f"cpsc_jax: {where}: {error.strerror}; the same command resumes once that is mended.", file=sys.stderr)
    return Refusal.exit_code
  except jax.errors.JaxRuntimeError as error:
    if mesh.single_process():
      raise
    print(f"cpsc_jax: {mesh.lost_process(error)}", file=sys.stderr, flush=True)
    return RESUME
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
    "config",
    None,
    "the config file; configs/NAME.py:smoke is its run of seconds",
    lock_config=True,
    flag_values=values,
    sys_argv=argv,
  )
  flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
  file = config_file(argv)
  if file and not file.is_file():
    raise Refusal(f"no config file '{file}'; the ready ones are in configs/, such as configs/digits.py.")
  try:
    rest = values(argv)
    config = values.config
  except flags.UnrecognizedFlagError as error:
    raise Refusal(f"no flag --{error.flagname}; there are --config, --workdir and --config.KEY=VALUE.") from error
  except (AttributeError, KeyError) as error:
    key = str(error).strip("\"'")
    raise Refusal(f"the config has no key '{key}'; configs/default.py explains every key.") from error
  except Exception as error:  # a config file may raise anything
    raise Refusal(f"{file}: {last_line(error)}" if "Traceback" in str(error) else last_line(error)) from error
  if values.help:
    print(f"{__doc__}\n{values.main_module_help()}")
    raise SystemExit(0)
  if rest[1:]:
    raise Refusal(f"'{rest[1]}' is not a flag; flags look like --config.student.lr=0.05.")
  if config is None:
    raise Refusal("no --config given; try --config configs/digits.py.")
  if "://" in (values.workdir or ""):
    raise Refusal(
      f"--workdir {values.workdir} is an address, not a folder; mount the bucket (gcsfuse BUCKET FOLDER, on every"
      " machine) and name the folder."
    )
  return config, pathlib.Path(values.workdir or pathlib.Path("runs") / config.name)


def config_file(argv):
  """The path given by --config FILE or --config=FILE, without a :variant, or None."""
  for flag, following in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = flag.partition("=")
    if name in ("--config", "-config"):
      return pathlib.Path((value if equals else following).split(":")[0])
  return None


def last_line(error):
  """The last line of an error's text, which in a quoted traceback is the error itself."""
  return " ".join(([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1].split())


if __name__ == "__main__":
  sys.exit(main())
