"""What is meant for the user's eyes."""

RESUME = 75  # EX_TEMPFAIL of sysexits.h: launchers run the same command again


class Refusal(Exception):
  """Input or state that the program will not work with.

  The message is one sentence that names the thing and the mend; `main` prints it without a traceback and
  exits with `exit_code`.
  """

  exit_code = 2


class NonFiniteLoss(Refusal):
  """Training produced a NaN or an infinity; the last good checkpoint is kept."""

  exit_code = 3


class Preempted(Refusal):
  """Told to stop; everything up to the named epoch is saved."""

  exit_code = RESUME


def first_line(error):
  """An exception in one line: its type and what it says first."""
  return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
