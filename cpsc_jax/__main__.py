"""Data-free knowledge distillation in JAX.

  cpsc-jax --config NAME|FILE [--workdir DIR] [--config.KEY=VALUE ...]   run one experiment; NAME such as digits
  cpsc-jax sweep --config NAME --grid 'KEY=VALUE,VALUE;...' [--seeds N]  many runs: a grid or a search, and their table
  cpsc-jax convert FILE --out FOLDER     make a teacher from a PyTorch checkpoint
  cpsc-jax export WORKDIR --out FILE     write a net of a finished run as PyTorch, safetensors, ONNX or StableHLO
  cpsc-jax sample WORKDIR --out FILE     draw samples from the generator of a finished run
  cpsc-jax prepare NAME --data_dir DIR   prepare a data set
  cpsc-jax report WORKDIR                pictures, page and table of a finished run again; of several, one page

cpsc-jax COMMAND --help explains the flags of a command, cpsc-jax --config digits --help those of a run and every key of
its config. cpsc-jax --list names all configs, methods, nets and data sets; cpsc-jax --version tells the version.
"""

import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from cpsc_jax import stop

COMMANDS = ("convert", "export", "sample", "prepare", "report", "sweep")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command that the first word names, or an experiment; returns the exit code.

  `argv` is without the program's name; None means sys.argv[1:].
  """
  words = list(sys.argv[1:] if argv is None else argv)
  first = words[0] if words else "--help"
  if first in ("-h", "-help", "--help"):
    print(__doc__)
    return 0
  if not first.startswith("-") and first not in COMMANDS:
    commands = ", ".join(COMMANDS)
    print(f"cpsc_jax: unknown command '{first}'; use one of {commands}, or --config for a run.", file=sys.stderr)
    return 2
  with stop.at_once():
    command = imported(first)
  return command(words[1:] if first in COMMANDS else ["cpsc-jax", *words])


def imported(name: str) -> Callable[[Sequence[str]], int]:
  """The function of a command, of an experiment for other names. Each is imported only when it is run."""
  match name:
    case "convert":
      from cpsc_jax.interop.convert.__main__ import main
    case "export":
      from cpsc_jax.interop.export import main
    case "sample":
      from cpsc_jax.sample import main
    case "prepare":
      from cpsc_jax.datasets.prepare import main
    case "report":
      from cpsc_jax.report import main
    case "sweep":
      from cpsc_jax.sweep.__main__ import main
    case _:
      from cpsc_jax.main import main
  return main


def program() -> NoReturn:
  """The program cpsc-jax."""
  stop.program(main)


if __name__ == "__main__":
  program()
