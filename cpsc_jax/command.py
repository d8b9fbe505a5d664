"""How the commands beside `main` read their flags and end: one sentence and exit code 2 for what they refuse."""

import argparse
import sys

from cpsc_jax.errors import Refusal


class Flags(argparse.ArgumentParser):
  """An argument parser that refuses bad flags in one sentence."""

  def error(self, message):
    raise Refusal(f"{message}; --help explains every flag.")


def carry_out(work, flags, argv):
  """Runs work(parsed flags) and returns the exit code."""
  try:
    work(flags.parse_args(argv))
  except Refusal as refusal:
    print(f"cpsc_jax: {refusal}", file=sys.stderr)
    return refusal.exit_code
  return 0
