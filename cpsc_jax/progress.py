"""What the user sees while a run works: a bar on a terminal and in a notebook, plain lines elsewhere.

Only process 0 prints. Plain output is never silent for long: whatever takes its time runs within `Steps` or `working`,
which print a line of their own after SECONDS_BETWEEN_LINES without one.
"""

import contextlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  ProgressColumn,
  SpinnerColumn,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 4.0

# The state of standard output, of which there is one per process.
_lock = threading.RLock()  # one line at a time, from whichever thread
_last_line = -float("inf")  # time.monotonic() of the last line
_shown: list[Any] = []  # the bars and heartbeats that are on, innermost last


def say(text: str) -> None:
  """Prints one line at once, on process 0."""
  global _last_line
  if jax.process_index() == 0:
    with _lock:
      print(text, flush=True)
      _last_line = time.monotonic()


@contextlib.contextmanager
def working(text: str) -> Iterator[None]:
  """Shows that `text` ("drawing pictures", say) is under way, for as long as the block runs.

  On plain output that is a line such as "drawing pictures, 10 s so far" whenever no other line has come for
  SECONDS_BETWEEN_LINES; a block that takes less prints nothing. On a terminal and in a notebook it is a spinner, unless
  a bar is there already.
  """
  started = time.monotonic()
  if not _redraws():
    with _Heartbeat(lambda: f"{text}, {time.monotonic() - started:.0f} s so far"):
      yield
  elif _shown or jax.process_index():
    yield
  else:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with _bar(*columns, transient=True) as spinner:
      spinner.add_task(text, total=None)
      yield


class Steps:
  """Progress of a loop over `total` epochs, `done` of which are done already; use as a context manager."""

  def __init__(self, title: str, total: int, done: int = 0):
    self.title, self.total, self.done = title, total, done
    self._first = done
    self._called: set[int] = set()  # ids of programs that are compiled
    self._compiling = False
    self._compile_began: float | None = None
    self._epoch_began = time.monotonic()
    self._first_done: float | None = None  # when the first epoch ended; its time includes the compilation
    self._unprinted: str | None = None  # how the last epoch went, while that waits to be printed
    self._last_printed = -float("inf")  # when that of an epoch was
    self._on = contextlib.ExitStack()
    self._bar = None

  def __enter__(self) -> "Steps":
    if jax.process_index() == 0 and _redraws() and not _shown:
      columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
      left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
      self._bar = self._on.enter_context(_bar(*columns, *left))
      self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, note="")
    else:
      if self.done < self.total:
        say(f"{self.title}: {self.total - self.done} epochs")
      self._on.enter_context(_Heartbeat(self._describe))
    return self

  def __exit__(self, *exception: object) -> None:
    self._on.__exit__(*exception)

  @contextlib.contextmanager
  def calling(self, program: Callable) -> Iterator[None]:
    """Within it `program`, a jitted function, is called: the first time, it is compiled, and shown so."""
    if id(program) in self._called:
      yield
      return
    self._called.add(id(program))
    if self.done > self._first or self._compile_began is None:  # before the first epoch, all programs count as one
      self._compile_began = time.monotonic()
    self._compiling = True
    if self._bar:
      self._bar.update(self._task, note="compiling")
    try:
      yield
    finally:
      self._compiling = False
      if self.done == self._first:
        self._epoch_began = time.monotonic()
      if self._bar:
        self._bar.update(self._task, note="")

  def advance(self, note: str) -> None:
    """One more epoch is done; `note` says how it went."""
    now = time.monotonic()
    with _lock:
      self.done += 1
      self._unprinted = f"{self.title}: epoch {self.done}/{self.total}  {note}{self._left(now)}"
      self._epoch_began = now
      self._first_done = self._first_done or now
      if self._bar:
        self._bar.update(self._task, completed=self.done, note=note)
      elif now - self._last_printed >= SECONDS_BETWEEN_LINES or self.done == self.total:
        say(self._describe())

  def _describe(self) -> str:
    """The line that is due: how the last epoch went if that was not printed yet, else what is under way."""
    line, self._unprinted = self._unprinted, None
    if line:
      self._last_printed = time.monotonic()
      return line
    if self._compiling:
      return f"{self.title}: compiling, {time.monotonic() - self._compile_began:.0f} s so far"
    epoch = min(self.done + 1, self.total)
    return f"{self.title}: epoch {epoch}/{self.total} running, {time.monotonic() - self._epoch_began:.0f} s so far"

  def _left(self, now: float) -> str:
    if self._first_done is None or self.done == self.total:
      return ""
    per_epoch = (now - self._first_done) / (self.done - self._first - 1)
    return f"  {per_epoch * (self.total - self.done):.0f} s left"


class _Heartbeat:
  """A thread that prints describe() whenever no line has come for SECONDS_BETWEEN_LINES; the innermost one speaks."""

  def __init__(self, describe: Callable[[], str]):
    self._describe = describe
    self._began = time.monotonic()
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._run, name="cpsc_jax progress", daemon=True)

  def __enter__(self) -> None:
    with _lock:
      _shown.append(self)
    if jax.process_index() == 0:
      self._thread.start()

  def __exit__(self, *_: object) -> None:
    self._ended.set()
    if self._thread.ident:
      self._thread.join()
    with _lock:
      _shown.remove(self)

  def _run(self) -> None:
    while not self._ended.wait(max(0.01, self._due() - time.monotonic())):
      with _lock:
        if _shown[-1] is self and time.monotonic() >= self._due():
          try:
            say(self._describe())
          except (OSError, ValueError):  # output is closed: the main thread's next line raises it where it is caught
            return

  def _due(self) -> float:
    """When the next line is due. Silence from before is made up for, but work that is done at once needs no line."""
    return max(_last_line + SECONDS_BETWEEN_LINES, self._began + SECONDS_BETWEEN_LINES / 4)


@contextlib.contextmanager
def _bar(*columns: ProgressColumn, transient: bool = False) -> Iterator[Progress]:
  """A bar of rich, shown while the block runs."""
  console = Console()
  redirect = not console.is_jupyter  # on a terminal, other lines have to pass above the bar
  bar = Progress(*columns, console=console, transient=transient, redirect_stdout=redirect, redirect_stderr=redirect)
  with bar:
    _shown.append(bar)
    try:
      yield bar
    finally:
      bar.refresh()  # rich leaves this out in notebooks
      _shown.remove(bar)


def _redraws() -> bool:
  """Whether output can be redrawn in place: on a terminal, or in a notebook that has the widgets rich needs there."""
  console = Console()
  if console.is_jupyter:
    return importlib.util.find_spec("ipywidgets") is not None
  return sys.stdout.isatty() and not console.is_dumb_terminal
