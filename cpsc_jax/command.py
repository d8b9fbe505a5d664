"""Shared by the commands beside `main`: how they parse flags, report a refusal and choose an exit code."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from cpsc_jax.errors import INTERRUPTED, Refusal


class Flags(argparse.ArgumentParser):
  """An argument parser whose errors are Refusals: one sentence, exit code 2."""

  def error(self, message: str) -> NoReturn:
    raise Refusal(f"{message}; --help explains every flag.")


def run_command(
  work: Callable[[argparse.Namespace], object], flags: argparse.ArgumentParser, argv: Sequence[str] | None
) -> int:
  """Runs work(parsed flags) and returns the exit code: 0, that of a Refusal, or 130 after Ctrl-C.

  `argv` is without the program's name; None means sys.argv[1:].
  """
  try:
    work(flags.parse_args(argv))
  except Refusal as refusal:
    # The message may quote an untrusted file, so that control characters must not reach the terminal.
    print("cpsc_jax: " + "".join(c if c.isprintable() else "?" for c in str(refusal)), file=sys.stderr)
    return refusal.exit_code
  except BrokenPipeError:
    return no_reader()
  except OSError as error:
    print(
      f"cpsc_jax: {error.filename or 'a file'}: {error.strerror or error}; mend this and try again.", file=sys.stderr
    )
    return Refusal.exit_code
  except KeyboardInterrupt:
    print("cpsc_jax: interrupted; nothing was written.", file=sys.stderr)
    return INTERRUPTED
  return 0


def no_reader() -> int:
  """The exit code when whoever was reading has seen enough, as in --help | head; what is still printed goes nowhere."""
  os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  return Refusal.exit_code


def comma_separated(kind: Callable[[str], object], name: str) -> Callable[[str], list]:
  """An argparse type: "1,2" -> [kind("1"), kind("2")]; errors call the expected value "comma-separated `name`"."""

  def parse(text: str) -> list:
    return [kind(part) for part in text.split(",")]

  parse.__name__ = f"comma-separated {name}"
  return parse
