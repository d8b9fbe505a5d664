"""What SIGTERM and Ctrl-C do. Schedulers send the first before they take a machine away; the same command resumes.

Python runs its handlers between two of its own instructions, and a compiler or a wait for a device is one that may take
minutes; an exception of a handler can also get lost in a callback. So a thread counts the seconds, and what is not over
by then is ended. Nothing is lost by that: files are written whole or not at all.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

from cpsc_jax.errors import INTERRUPTED, RESUME

GRACE = "CPSC_JAX_GRACE"  # the environment variable: seconds that SIGTERM leaves for finishing and saving the epoch
SECONDS = 8.0  # without it, and for Ctrl-C
SAID = {
  RESUME: "cpsc_jax: stopped by SIGTERM; the same command resumes from the last checkpoint.",
  INTERRUPTED: "cpsc_jax: interrupted; the same command resumes from the last checkpoint.",
}


@contextlib.contextmanager
def ended_in_time() -> Iterator[None]:
  """Within it, the program ends at most SECONDS after Ctrl-C, at once after a second one, and GRACE after SIGTERM."""
  if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
    yield
    return
  seen, write = os.pipe()
  os.set_blocking(write, False)
  before, deadlines = signal.set_wakeup_fd(write, warn_on_full_buffer=False), []

  def leave(code: int) -> None:
    print(SAID[code], file=sys.stderr, flush=True)
    os._exit(code)

  def watch() -> None:
    interrupted = False
    while number := os.read(seen, 1):
      if number[0] == signal.SIGINT and interrupted:
        leave(INTERRUPTED)
      if number[0] in (signal.SIGINT, signal.SIGTERM):
        interrupted = interrupted or number[0] == signal.SIGINT
        code = INTERRUPTED if number[0] == signal.SIGINT else RESUME
        seconds = SECONDS if code == INTERRUPTED else _grace()
        deadlines.append(threading.Timer(seconds, leave, (code,)))
        deadlines[-1].daemon = True
        deadlines[-1].start()

  watcher = threading.Thread(target=watch, daemon=True)
  watcher.start()
  try:
    with _lost_exceptions(leave):
      yield
  finally:
    signal.set_wakeup_fd(before)
    os.close(write)
    watcher.join()
    os.close(seen)
    for deadline in deadlines:
      deadline.cancel()


@contextlib.contextmanager
def _lost_exceptions(leave: Callable[[int], None]) -> Iterator[None]:
  """Within it, an exception of a signal's handler that gets lost in a callback, as in those of JAX that the garbage
  collector calls, ends the program nevertheless."""
  before, within = sys.unraisablehook, [True]

  def hook(complaint: "sys.UnraisableHookArgs") -> None:
    if within and isinstance(complaint.exc_value, KeyboardInterrupt):
      leave(INTERRUPTED)
    if within and isinstance(complaint.exc_value, SystemExit):
      os._exit(RESUME)  # `exit_on_sigterm` has said so
    before(complaint)

  sys.unraisablehook = hook
  try:
    yield
  finally:
    within.clear()
    if sys.unraisablehook == hook:
      sys.unraisablehook = before


def _grace() -> float:
  try:
    return max(float(os.environ.get(GRACE, SECONDS)), 0.0)
  except ValueError:
    return SECONDS


@contextlib.contextmanager
def at_once() -> Iterator[None]:
  """Within it, Ctrl-C and SIGTERM end the program at once, as is right while it is still imported."""

  def leave(number: int, _: object) -> None:
    what, code = ("interrupted", INTERRUPTED) if number == signal.SIGINT else ("stopped by SIGTERM", RESUME)
    print(f"cpsc_jax: {what} before anything was begun; run the same command again.", file=sys.stderr, flush=True)
    os._exit(code)

  with _handler(leave, signal.SIGINT), _handler(leave, signal.SIGTERM):
    yield


_of_program = []  # not empty once `program` has begun: this process may then be ended


def program(main: Callable[[], int]) -> NoReturn:
  """Ends this process with the exit code of `main`; signals that come after it change nothing.

  Unless all went well it ends at once: threads of Orbax whose write was broken off, by Ctrl-C or by a full disk, wait
  minutes for each other, and Python would wait for them.
  """
  _of_program.append(True)
  sys.stdout.reconfigure(errors="replace")  # a name that the terminal's encoding lacks is no reason to fail
  try:
    code = main()
  except SystemExit as left:  # of `exit_on_sigterm`, or of a parser of flags
    code = left.code
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  if code and isinstance(code, int):
    end_program(code)
  sys.exit(code)


def end_program(code: int) -> None:
  """Ends this process at once if it is a `program`, and does nothing otherwise.

  Called while an exception is handled, it spares what the exception holds: to take arrays and compiled programs apart
  while the devices may still be using them is not safe.
  """
  if _of_program:
    jax = sys.modules.get("jax")
    with contextlib.suppress(Exception):
      sys.stdout.flush()
      if jax and jax.distributed.is_initialized():
        jax.distributed.shutdown()
    os._exit(code)


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
  """Within it, SIGTERM ends the program at once, with the exit code that asks for a restart."""

  def leave(*_: object) -> None:
    print(SAID[RESUME], file=sys.stderr, flush=True)
    raise SystemExit(RESUME)

  with _handler(leave, signal.SIGTERM):
    yield


@contextlib.contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
  """Within it, SIGTERM does nothing by itself: yields a function that returns whether one has arrived."""
  arrived = []  # appending is safe even where a second signal interrupts the handler
  with _handler(lambda *_: arrived.append(True), signal.SIGTERM):
    yield lambda: bool(arrived)


@contextlib.contextmanager
def _handler(function: Callable, number: int) -> Iterator[None]:
  if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
    yield
    return
  before = signal.getsignal(number)
  if before != signal.SIG_IGN:  # as under nohup, or in the background of a script
    signal.signal(number, function)
  try:
    yield
  finally:
    signal.signal(number, before)
