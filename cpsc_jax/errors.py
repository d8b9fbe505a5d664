"""Errors whose message is for the user."""

RESUME = 75  # EX_TEMPFAIL of sysexits.h: launchers run the same command again
INTERRUPTED = 130  # what shells expect after Ctrl-C


class Refusal(Exception):
  """Input or state that the program does not accept.

  The message is one sentence: what is wrong, what was expected, how to mend it. Commands print it without a traceback
  and exit with `exit_code`.
  """

  exit_code = 2


class NonFiniteLoss(Refusal):
  """Training produced a NaN or an infinity; the last good checkpoint is kept."""

  exit_code = 3


class Preempted(Refusal):
  """SIGTERM ended a training; the message names the epoch that is saved."""

  exit_code = RESUME


def first_line(error: BaseException) -> str:
  """An exception in one line: its type and the first line of its text."""
  return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
