"""What a run shows: never silent for long on plain output, nothing extra where it is quick, no thread left behind."""

import contextlib
import io
import itertools
import re
import threading
import time

import pytest

from cpsc_jax import progress
from cpsc_jax.progress import Steps, say, working

INTERVAL = 0.1
SILENCE = 4 * INTERVAL  # what is accepted: the interval, and some more for a busy machine


class Recorder(io.StringIO):
  """Standard output that knows when each line came; a terminal if `tty`."""

  def __init__(self, tty=False):
    super().__init__()
    self.tty, self.times = tty, [time.monotonic()]

  def isatty(self):
    return self.tty

  def write(self, text):
    self.times += [time.monotonic()] * text.count("\n")
    return super().write(text)

  @property
  def lines(self):
    return self.getvalue().splitlines()

  @property
  def kinds(self):
    """The lines without their seconds; repetitions count once."""
    return [line for line, _ in itertools.groupby(re.sub(r"\d+ s (so far|left)", r"N s \1", x) for x in self.lines)]

  def longest_silence(self):
    return max(after - before for before, after in itertools.pairwise([*self.times, time.monotonic()]))


@pytest.fixture
def recorded(monkeypatch):
  """A context manager for what is printed; nothing may go on after it."""
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", INTERVAL)

  @contextlib.contextmanager
  def record(**options):
    monkeypatch.setattr(progress, "_last_line", time.monotonic())
    with contextlib.redirect_stdout(Recorder(**options)) as output:
      yield output
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("cpsc_jax")]
    assert not progress._shown

  return record


def program():
  """Stands for a jitted function."""


def test_compiling_and_running_are_reported(recorded):
  with recorded() as output:
    with Steps("teacher", 3) as steps:
      with steps.calling(program):
        time.sleep(5 * INTERVAL)
      time.sleep(5 * INTERVAL)
      steps.advance("accuracy 0.5000")
      time.sleep(5 * INTERVAL)
      steps.advance("accuracy 0.6000")
      steps.advance("accuracy 0.7000")
    assert output.longest_silence() < SILENCE
  assert output.kinds == [
    "teacher: 3 epochs",
    "teacher: compiling, N s so far",
    "teacher: epoch 1/3 running, N s so far",
    "teacher: epoch 1/3  accuracy 0.5000",
    "teacher: epoch 2/3 running, N s so far",
    "teacher: epoch 2/3  accuracy 0.6000  N s left",
    "teacher: epoch 3/3  accuracy 0.7000",
  ]


def test_seconds_count_from_the_start_of_what_is_named(recorded):
  with recorded() as output, Steps("teacher", 3) as steps:
    with steps.calling(program):
      time.sleep(1.3)
    time.sleep(1.3)
  for what in ("compiling", "epoch 1/3 running"):
    seconds = [int(number) for number in re.findall(rf"{what}, (\d+) s so far", output.getvalue())]
    assert seconds[0] == 0 and seconds[-1] == 1


def test_programs_of_the_first_epoch_compile_as_one(recorded):
  with recorded() as output, Steps("teacher", 3) as steps:
    for function in (program, print):
      with steps.calling(function):
        time.sleep(0.7)
  assert max(int(number) for number in re.findall(r"compiling, (\d+) s so far", output.getvalue())) == 1


def test_a_program_compiles_once(recorded):
  with recorded() as output, Steps("teacher", 3) as steps:
    with steps.calling(program):
      pass
    with steps.calling(program):
      time.sleep(2 * INTERVAL)
    assert "compiling" not in output.getvalue() and "epoch 1/3 running" in output.getvalue()
    with steps.calling(print):
      time.sleep(2 * INTERVAL)
    assert "compiling" in output.getvalue()


def test_quick_epochs_are_throttled_and_the_last_is_shown(recorded, monkeypatch):
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.5)
  with recorded() as output:
    with Steps("distill", 100) as steps:
      for epoch in range(100):
        time.sleep(0.01)
        steps.advance(f"accuracy 0.{epoch:02}")
    assert output.longest_silence() < 1.0
  assert len(output.lines) <= 4 + (output.times[-1] - output.times[0]) / 0.5
  assert "epoch 1/100" in output.lines[1] and output.lines[-1] == "distill: epoch 100/100  accuracy 0.99"
  assert not any("running" in line for line in output.lines), "how an epoch went comes before that the next one runs"


def test_the_time_left_is_estimated_without_the_first_epoch(recorded, monkeypatch):
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.01)
  with recorded() as output, Steps("distill", 102, done=1) as steps:
    time.sleep(1.0)
    for _ in range(2):
      steps.advance("well")
      time.sleep(0.1)
  lines = [line for line in output.lines if "well" in line]
  assert output.lines[0] == "distill: 101 epochs" and lines[0] == "distill: epoch 2/102  well"
  assert 9 <= int(re.search(r"(\d+) s left", lines[1])[1]) < 50


def test_nothing_is_announced_where_nothing_is_left_to_do(recorded):
  with recorded() as output, Steps("distill", 5, done=5):
    pass
  assert output.lines == []


def test_work_that_is_quick_is_silent_and_other_work_is_reported(recorded):
  with recorded() as output:
    with working("drawing pictures"):
      pass
    assert output.lines == []
    with working("compiling the evaluation"):
      time.sleep(5 * INTERVAL)
    assert output.longest_silence() < SILENCE
  assert output.kinds == ["compiling the evaluation, N s so far"]


def test_silence_from_before_counts(recorded, monkeypatch):
  with recorded() as output:
    time.sleep(0.8 * INTERVAL)
    with working("drawing pictures"):
      time.sleep(0.8 * INTERVAL)
  assert output.kinds == ["drawing pictures, N s so far"]


def test_other_lines_put_off_the_next(recorded, monkeypatch):
  monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1.0)
  with recorded() as output, working("drawing"):
    for _ in range(12):
      time.sleep(0.1)
      say("a line")
  assert output.kinds == ["a line"]


def test_the_innermost_work_is_named(recorded):
  with recorded() as output, Steps("teacher", 2), working("saving"):
    before = len(output.lines)
    time.sleep(3 * INTERVAL)
    said = output.lines[before:]
  assert said and all(line.startswith("saving, ") for line in said)


@pytest.mark.parametrize("work", [lambda: working("drawing"), lambda: Steps("teacher", 2)])
@pytest.mark.parametrize("tty", [False, True])
def test_exceptions_pass_and_end_what_is_shown(recorded, work, tty):
  with recorded(tty=tty) as output:
    with pytest.raises(SystemExit), work():
      time.sleep(2 * INTERVAL)
      raise SystemExit(75)
    shown = output.getvalue()
    time.sleep(2 * INTERVAL)
    assert shown and output.getvalue() == shown


@pytest.mark.parametrize("tty", [False, True])
def test_only_process_0_prints(recorded, monkeypatch, tty):
  monkeypatch.setattr("jax.process_index", lambda: 1)
  with recorded(tty=tty) as output:
    with working("drawing"), Steps("teacher", 1) as steps:
      time.sleep(2 * INTERVAL)
      steps.advance("accuracy 0.5000")
    say("done")
  assert output.getvalue() == ""


def test_output_that_is_closed_ends_the_thread_quietly(recorded, monkeypatch):
  raised = []
  monkeypatch.setattr(threading, "excepthook", raised.append)
  with recorded() as output, working("drawing"):
    output.close()
    time.sleep(2 * INTERVAL)
  assert not raised


def test_a_terminal_shows_a_bar_and_no_lines(recorded, monkeypatch):
  for name, value in (("TERM", "xterm"), ("COLUMNS", "120")):
    monkeypatch.setenv(name, value)
  with recorded(tty=True) as output:
    with Steps("teacher", 2) as steps:
      with steps.calling(program):
        time.sleep(2 * INTERVAL)
      with working("saving"):
        steps.advance("accuracy 0.5000")
        time.sleep(2 * INTERVAL)
      steps.advance("accuracy 0.6000")
    with working("drawing pictures"):
      time.sleep(2 * INTERVAL)
  text = output.getvalue()
  for word in ("compiling", "accuracy 0.5000", "2/2", "drawing pictures"):
    assert word in text
  assert "so far" not in text and "saving" not in text, "the bar's clock ticks"


def test_a_terminal_that_cannot_redraw_shows_lines(recorded, monkeypatch):
  monkeypatch.setenv("TERM", "dumb")
  with recorded(tty=True) as output, working("drawing"):
    time.sleep(2 * INTERVAL)
  assert output.kinds == ["drawing, N s so far"]


def test_a_notebook_shows_a_bar_where_it_has_the_widgets(monkeypatch):
  monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
  for found in (None, "ipywidgets"):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    assert progress._redraws() == bool(found)
