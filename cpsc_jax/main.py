"""Runs one experiment: loads or trains a teacher, trains a student, reports.

cpsc-jax --config digits [--workdir DIR] [--config.seed=1 ...]

--config NAME|FILE    a ready config or the path of a config file; NAME:smoke is a run of seconds
--workdir DIR         folder of the run (default: runs/ and the config's name); an interrupted run resumes from it
--config.KEY=VALUE    overrides a key of the config, such as --config.student.lr=0.05
--dry-run             says what would be read, computed and written, how much memory and time it needs, and ends
--help, --list, --version
                      every key with the config's values, and what --list tells: ready configs and their variants,
                      methods, nets and data sets; versions
"""

import contextlib
import time

from cpsc_jax import stop

STARTED = time.monotonic()
IMPORTING = contextlib.ExitStack()
if __name__ == "__main__":
  IMPORTING.enter_context(stop.at_once())

import ast  # noqa: E402
import os  # noqa: E402
import pathlib  # noqa: E402
import re  # noqa: E402
import runpy  # noqa: E402
import sys  # noqa: E402
import traceback  # noqa: E402
from collections.abc import Sequence  # noqa: E402

import jax  # noqa: E402
import ml_collections  # noqa: E402
from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from cpsc_jax import compile_cache, configs, describe, mesh, schema  # noqa: E402
from cpsc_jax.command import no_reader  # noqa: E402
from cpsc_jax.errors import INTERRUPTED, RESUME, Refusal  # noqa: E402

IMPORTING.close()
CONFIG_FLAGS = ("--config", "-config")
HELP_FLAGS = {"--help", "-help", "-h"}
DRY_FLAGS = {"--dry-run", "--dry_run"}


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, runs, prints the table of results; returns the exit code. `argv` starts with the program's name."""
  argv = sys.argv if argv is None else argv
  workdir = None
  try:
    with stop.ended_in_time(), stop.exit_on_sigterm():
      if text := information(argv):
        print(text)
        return 0
      config, workdir = parse([word for word in argv if word not in DRY_FLAGS])
      compile_cache.start()
      mesh.start()
      from cpsc_jax import dry_run, phases, report, run, tasks

      if DRY_FLAGS & set(argv):
        print(dry_run.text(config, workdir))
        return 0
      command = ["cpsc-jax", *argv[1:]]
      if tasks.of(config).in_phases:
        results = phases.run(config, workdir, command=command).results
      else:
        results = run.run(config, workdir, STARTED, command=command).results
      if mesh.is_primary():
        report.print_table(results)
        print(f"all files are in {workdir}")
  except Refusal as refusal:
    print(f"cpsc_jax: {refusal}", file=sys.stderr)
    return refusal.exit_code
  except BrokenPipeError:
    return no_reader()
  except OSError as error:
    place, reason = error.filename or workdir, error.strerror or error
    print(f"cpsc_jax: {place}: {reason}; fix this, then resume with the same command.", file=sys.stderr)
    return Refusal.exit_code
  except jax.errors.JaxRuntimeError as error:
    if mesh.single_process():
      raise
    print(f"cpsc_jax: {mesh.lost_process(error)}", file=sys.stderr, flush=True)
    return RESUME
  except KeyboardInterrupt:
    print(stop.SAID[INTERRUPTED], file=sys.stderr, flush=True)
    stop.end_program(INTERRUPTED)
    return INTERRUPTED
  return 0


def parse(argv: Sequence[str]) -> tuple[ml_collections.ConfigDict, pathlib.Path]:
  """(config, workdir) of a command line, which starts with the program's name.

  Raises:
    Refusal: no config or one that cannot be loaded, an unknown flag, or an override of an unknown key or of the wrong
      type.
  """
  file, variant = config_file(argv)
  if file is None:
    raise Refusal(f"--config is required, such as --config digits; the ready configs are {ready_names()}.")
  if not file.is_file():
    raise Refusal(f"no config file '{file}'; give the path of a file or one of the ready configs: {ready_names()}.")
  config, argv = load(file, variant), without_config(argv)
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "", flag_values=values)
  try:
    config_flags.DEFINE_config_dict("config", config, "", lock_config=True, flag_values=values, sys_argv=argv)
    rest = values(argv)
    config = values.config
  except flags.UnrecognizedFlagError as error:
    raise Refusal(f"unknown flag --{error.flagname}; use --config, --workdir or --config.KEY=VALUE.") from error
  except (AttributeError, KeyError) as error:
    raise Refusal(f"{missing_key(str(error), argv)}; docs/config.md and --help explain all keys.") from error
  except (TypeError, ValueError, flags.Error) as error:
    raise Refusal(last_line(error)) from error
  schema.check(dict(schema.flatten(config)))
  if rest[1:]:
    raise Refusal(f"unexpected argument '{rest[1]}'; flags look like --config.student.lr=0.05.")
  if "://" in (values.workdir or ""):
    raise Refusal(
      f"--workdir must be a folder, got the address {values.workdir}; mount the bucket on every machine (gcsfuse BUCKET"
      " FOLDER) and give the folder."
    )
  return config, pathlib.Path(values.workdir or pathlib.Path("runs") / config.name)


def information(argv: Sequence[str]) -> str:
  """What --help, --list and --version ask for; empty without them. --help tells the values of the config, if one is
  named.

  Raises:
    Refusal: as `parse`.
  """
  if "--version" in argv:
    return describe.versions()
  if not (HELP_FLAGS | {"--list"}) & set(argv):
    return ""
  inventory = describe.inventory({name: summary(file) for name, file in ready_configs().items()})
  if "--list" in argv:
    return inventory
  rest = [word for word in argv if word not in HELP_FLAGS | DRY_FLAGS]
  config = parse(rest)[0] if len(rest) > 1 else configs.default.get_config()
  return f"{__doc__}{describe.keys(dict(schema.flatten(config)))}\n\n{inventory}"


def summary(file: pathlib.Path) -> str:
  """What a ready config is: the first sentence of its text, after the line with its name."""
  text = " ".join(ast.get_docstring(ast.parse(file.read_text())).split("\n\n")[1].split())
  return text.partition(". ")[0].rstrip(".")


def config_file(argv: Sequence[str]) -> tuple[pathlib.Path | None, str | None]:
  """(file, variant) that --config FILE[:VARIANT] stands for; the file is None without the flag.

  A bare name, one that is no existing file and has neither a slash nor the suffix .py, stands for a ready config.

  Raises:
    Refusal: a bare name that is no ready config, or two configs.
  """
  words = [(*flag.partition("="), following) for flag, following in zip(argv, [*argv[1:], ""], strict=True)]
  given = [value if equals else following for name, equals, value, following in words if name in CONFIG_FLAGS]
  if len(given) > 1:
    raise Refusal(f"--config is given twice, {given[0]} and {given[1]}; a run has one config.")
  path, colon, variant = config_path(given[0]).partition(":") if given else ("", "", "")
  return (pathlib.Path(path) if path else None), (variant if colon else None)


def without_config(argv: Sequence[str]) -> list[str]:
  """A command line without the flag --config and its value."""
  rest, skip = [], False
  for word in argv:
    if not skip and word.partition("=")[0] not in CONFIG_FLAGS:
      rest.append(word)
    skip = not skip and word in CONFIG_FLAGS
  return rest


def load(file: pathlib.Path, variant: str | None) -> ml_collections.ConfigDict:
  """What get_config(variant) of a config file returns; without a variant, get_config().

  Raises:
    Refusal: names the file and the line that raised something, or what the file lacks.
  """
  try:
    get_config = runpy.run_path(str(file)).get("get_config")
    if not callable(get_config):
      raise Refusal(
        f"{file} has no function get_config(variant=''), which returns a config; configs/digits.py has one."
      )
    config = get_config() if variant is None else get_config(variant)
  except Refusal:
    raise
  except SyntaxError as error:
    raise Refusal(f"{error.filename}, line {error.lineno}: {error.msg}; mend it.") from error
  except Exception as error:  # a config is a program of the user's own and may raise anything
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    place = f"{file}, line {lines[-1]}" if lines else str(file)
    if isinstance(error, AttributeError | KeyError) and "does not exist" in str(error):
      raise Refusal(f"{place}: {missing_key(str(error), [])}; docs/config.md and --help explain all keys.") from error
    raise Refusal(f"{place}: {type(error).__name__}: {last_line(error)}; mend it.") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise Refusal(f"get_config of {file} returns {type(config).__name__}, which is no ml_collections.ConfigDict.")
  return config


def config_path(value: str) -> str:
  """FILE[:VARIANT] as given, or with the path of a ready config in place of its bare name."""
  file, colon, variant = value.partition(":")
  if not file or "/" in file or os.sep in file or file.endswith(".py") or pathlib.Path(file).is_file():
    return value
  ready = ready_configs()
  if file not in ready:
    raise Refusal(f"no config '{file}'; give one of the ready configs ({ready_names()}) or the path of a file.")
  return f"{ready[file]}{colon}{variant}"


def ready_configs() -> dict[str, pathlib.Path]:
  """{name: file} of the configs that are installed with this package."""
  files = sorted(pathlib.Path(configs.__file__).parent.glob("*.py"))
  return {file.stem: file for file in files if "\ndef get_config(" in file.read_text()}


def ready_names() -> str:
  """The names of all ready configs."""
  return ", ".join(ready_configs())


def missing_key(message: str, argv: Sequence[str]) -> str:
  """ml_collections' message about a key that a config does not have, in words."""
  forms = r"lookup: ([\w.]+)", r'Key "(\w+)"', r"'(\w+)"
  key = next((found[1] for form in forms if (found := re.search(form, message))), message)
  overrides = (flag.split("=")[0].lstrip("-").removeprefix("config.") for flag in argv)
  full = next((path for path in overrides if path == key or key in path.split(".")), key)
  similar = re.search(r'Did you mean "(\w+)"', message)
  return f"the config has no key '{full}'" + (f" (did you mean '{similar[1]}'?)" if similar else "")


def last_line(error: BaseException) -> str:
  """The last line of an error's text, which in a quoted traceback is the error itself."""
  return " ".join(([line for line in str(error).splitlines() if line.strip()] or [type(error).__name__])[-1].split())


if __name__ == "__main__":
  stop.program(main)
