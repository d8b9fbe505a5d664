"""What the user sees while a run works: a bar with time left on a terminal, plain lines elsewhere."""

import sys
import time

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


def say(text):
  """One line, at once, from process 0."""
  if jax.process_index() == 0:
    print(text, flush=True)


class Steps:
  """Progress of a loop over `total` epochs, of which `done` are done already; use as a context manager."""

  def __init__(self, title, total, done=0):
    self.title, self.total, self.done, self.first = title, total, done, done
    self.last_line = time.monotonic()
    self.compiled = None  # when the first epoch was done; it holds the compilation and tells nothing of the others
    self.bar = None
    if sys.stdout.isatty() and jax.process_index() == 0:
      columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
      left = (TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
      self.bar = Progress(*columns, *left, console=Console())
      self.task = self.bar.add_task(title, total=total, completed=done, note="compiling")

  def __enter__(self):
    if self.bar:
      self.bar.start()
    else:
      say(f"{self.title}: {self.total - self.done} epochs" + (", compiling ..." if self.done < self.total else ""))
    return self

  def __exit__(self, *_):
    if self.bar:
      self.bar.stop()

  def advance(self, note):
    """One epoch is done; `note` says how it went."""
    self.done += 1
    now = time.monotonic()
    if self.bar:
      self.bar.update(self.task, completed=self.done, note=note)
    elif now - self.last_line >= SECONDS_BETWEEN_LINES or self.done in (self.first + 1, self.total):
      say(f"{self.title}: epoch {self.done}/{self.total}  {note}{self._left(now)}")
      self.last_line = now
    self.compiled = self.compiled or now

  def _left(self, now):
    if self.compiled is None or self.done == self.total:
      return ""
    return f"  {(now - self.compiled) / (self.done - self.first - 1) * (self.total - self.done):.0f} s left"
