"""Data-free knowledge distillation in JAX.

  cpsc-jax --config NAME|FILE [--workdir DIR] [--config.KEY=VALUE ...]   run one experiment; NAME such as digits
  cpsc-jax convert FILE --out FOLDER     make a teacher from a PyTorch checkpoint
  cpsc-jax export WORKDIR --out FILE     write a net of a finished run as PyTorch, safetensors, ONNX or StableHLO
  cpsc-jax sample WORKDIR --out FILE     draw samples from the generator of a finished run
  cpsc-jax prepare NAME --data_dir DIR   prepare a data set
  cpsc-jax report WORKDIR                pictures, page and table of a finished run again; of several, one page

cpsc-jax COMMAND --help explains the flags of a command, cpsc-jax --config digits --help those of a run and every key of
its config. cpsc-jax --list names all configs, methods, nets and data sets; cpsc-jax --version tells the version.
"""

import sys
from collections.abc import Sequence

COMMANDS = ("convert", "export", "sample", "prepare", "report")


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command that the first word names, or an experiment; returns the exit code.

  `argv` is without the program's name; None means sys.argv[1:]. Each command is imported only when it is run.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  first, rest = (argv[0] if argv else "--help"), argv[1:]
  match first:
    case "-h" | "-help" | "--help":
      print(__doc__)
      return 0
    case "convert":
      from cpsc_jax.interop.convert.__main__ import main as convert

      return convert(rest)
    case "export":
      from cpsc_jax.interop.export import main as export

      return export(rest)
    case "sample":
      from cpsc_jax.sample import main as sample

      return sample(rest)
    case "prepare":
      from cpsc_jax.datasets.prepare import main as prepare

      return prepare(rest)
    case "report":
      from cpsc_jax.report import main as report

      return report(rest)
  if not first.startswith("-"):
    commands = ", ".join(COMMANDS)
    print(f"cpsc_jax: unknown command '{first}'; use one of {commands}, or --config for a run.", file=sys.stderr)
    return 2
  from cpsc_jax.main import main as run

  return run(["cpsc-jax", *argv])


if __name__ == "__main__":
  sys.exit(main())
