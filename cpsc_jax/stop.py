"""Being told to stop. SIGTERM, which schedulers send before they take a machine away, ends a run so that it resumes."""

import contextlib
import signal
import sys

from cpsc_jax.errors import RESUME


@contextlib.contextmanager
def exit_on_sigterm():
  """Within it, SIGTERM ends the program at once, with the exit code that says 'run me again'."""

  def leave(*_):
    print("cpsc_jax: told to stop; the same command resumes from the last checkpoint.", file=sys.stderr, flush=True)
    raise SystemExit(RESUME)

  with _handler(leave):
    yield


@contextlib.contextmanager
def deferred_sigterm():
  """Within it, SIGTERM is only noted: yields a function that says whether one came."""
  came = []
  with _handler(lambda *_: came.append(True)):
    yield lambda: bool(came)


@contextlib.contextmanager
def _handler(function):
  before = signal.signal(signal.SIGTERM, function)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
