"""What SIGTERM does. Schedulers send it before they take a machine away; the same command then resumes the run."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from cpsc_jax.errors import RESUME


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
  """Within it, SIGTERM ends the program at once, with the exit code that asks for a restart."""

  def leave(*_: object) -> None:
    message = "cpsc_jax: stopped by SIGTERM; the same command resumes from the last checkpoint."
    print(message, file=sys.stderr, flush=True)
    raise SystemExit(RESUME)

  with _handler(leave):
    yield


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
  """Within it, SIGTERM does nothing by itself: yields a function that returns whether one has arrived."""
  arrived = []  # appending is safe even where a second signal interrupts the handler
  with _handler(lambda *_: arrived.append(True)):
    yield lambda: bool(arrived)


@contextlib.contextmanager
def _handler(function: Callable) -> Iterator[None]:
  if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
    yield
    return
  before = signal.signal(signal.SIGTERM, function)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
