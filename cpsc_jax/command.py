"""How the commands beside `main` read their flags and end: one sentence and exit code 2 for what they refuse."""

import argparse
import sys

from cpsc_jax.errors import Refusal

INTERRUPTED = 130


class Flags(argparse.ArgumentParser):
  """An argument parser that refuses bad flags in one sentence."""

  def error(self, message):
    raise Refusal(f"{message}; --help explains every flag.")


def carry_out(work, flags, argv):
  """Runs work(parsed flags) and returns the exit code."""
  try:
    work(flags.parse_args(argv))
  except Refusal as refusal:
    # It may quote a stranger's file: nothing in that may steer a terminal.
    print("cpsc_jax: " + "".join(c if c.isprintable() else "?" for c in str(refusal)), file=sys.stderr)
    return refusal.exit_code
  except KeyboardInterrupt:
    print("cpsc_jax: interrupted; nothing was written.", file=sys.stderr)
    return INTERRUPTED
  return 0
