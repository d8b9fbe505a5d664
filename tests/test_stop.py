"""Ctrl-C and SIGTERM end a program in time, even where Python cannot run its handlers or an exception gets lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cpsc_jax import stop
from cpsc_jax.errors import INTERRUPTED, RESUME

BUSY = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes in C, in which no handler of Python runs
DEAF = """
for _ in range(600):
  try: time.sleep(0.1)
  except KeyboardInterrupt: pass"""
PROGRAM = """
import hashlib, sys, time
from cpsc_jax import stop
stop.SECONDS = {seconds}
with stop.ended_in_time(), stop.exit_on_sigterm():
  print("ready", flush=True)
  exec({work!r})
"""


def ended(work, *signals, seconds=1.0, grace=None):
  """(exit code, what it said, seconds after the first signal) of a program that is sent signals."""
  environment = {key: value for key, value in os.environ.items() if key != stop.GRACE}
  environment |= {} if grace is None else {stop.GRACE: str(grace)}
  program = [sys.executable, "-c", PROGRAM.format(seconds=seconds, work=work)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  with subprocess.Popen(program, env=environment, text=True, **pipes) as process:
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    began = time.monotonic()
    for number in signals:
      process.send_signal(number)
      time.sleep(0.2)
    try:
      said = process.communicate(timeout=30)[1]
    finally:
      process.kill()
    return process.returncode, said, time.monotonic() - began


@pytest.mark.parametrize("work", [BUSY, DEAF], ids=["in C", "lost in a callback"])
def test_ctrl_c_ends_what_does_not_listen(work):
  code, said, seconds = ended(work, signal.SIGINT)
  assert code == INTERRUPTED and said == stop.SAID[INTERRUPTED] + "\n" and 0.9 < seconds < 10


@pytest.mark.parametrize("work", [BUSY, DEAF], ids=["in C", "lost in a callback"])
def test_a_second_ctrl_c_ends_it_at_once(work):
  code, said, seconds = ended(work, signal.SIGINT, signal.SIGINT, seconds=600)
  assert code == INTERRUPTED and said == stop.SAID[INTERRUPTED] + "\n" and seconds < 10


@pytest.mark.parametrize("number, want", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, RESUME)])
def test_an_exception_that_a_callback_loses_ends_it_at_once(number, want):
  """As those of JAX that the garbage collector calls."""
  work = """
import gc
gc.callbacks.append(lambda *_: time.sleep(0.3))
while True:
  gc.collect()"""
  code, said, seconds = ended(work, number, seconds=600)
  assert code == want and said == stop.SAID[want] + "\n" and seconds < 10


@pytest.mark.parametrize("main", ["lambda: 2", "lambda: sys.exit(75)"])
def test_a_program_that_fails_does_not_wait_for_its_threads(main):
  """As those of Orbax, which wait five minutes for each other once a write was broken off."""
  work = (
    "import sys, threading, time\nfrom cpsc_jax import stop\nthreading.Thread(target=time.sleep, args=(600,)).start()"
  )
  program = [sys.executable, "-c", f"{work}\nprint('said')\nstop.program({main})"]
  done = subprocess.run(program, capture_output=True, text=True, timeout=60, check=False)
  assert done.returncode == (2 if "2" in main else 75) and done.stdout == "said\n" and not done.stderr


def test_what_is_ignored_stays_ignored():
  """As in the background of a script."""
  work = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nwith stop.at_once():\n  time.sleep(1)\nprint('done')"
  program = f"import signal, time\nfrom cpsc_jax import stop\nprint('ready', flush=True)\n{work}"
  with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[0] == "done\n" and process.returncode == 0


@pytest.mark.parametrize("number, want", [(signal.SIGINT, INTERRUPTED), (signal.SIGTERM, RESUME)])
def test_an_import_ends_at_once(number, want):
  work = "print('ready', flush=True)\nwith stop.at_once():\n  time.sleep(600)"
  program = [sys.executable, "-c", f"import time\nfrom cpsc_jax import stop\n{work}"]
  with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(number)
    said = process.communicate(timeout=30)[1]
  assert process.returncode == want and "before anything was begun; run the same command again" in said
  assert said.count("\n") == 1


def test_sigterm_has_the_time_that_the_environment_gives_it():
  code, said, seconds = ended(BUSY, signal.SIGTERM, seconds=600, grace=1)
  assert code == RESUME and said == stop.SAID[RESUME] + "\n" and 0.9 < seconds < 10


def test_what_listens_ends_by_itself():
  code, said, seconds = ended("time.sleep(600)", signal.SIGTERM, seconds=600)
  assert code == RESUME and said.count(stop.SAID[RESUME]) == 1 and seconds < 10
  code, said, seconds = ended("time.sleep(600)", signal.SIGINT, seconds=600)
  assert code != 0 and "KeyboardInterrupt" in said and seconds < 10


def test_afterwards_signals_do_what_they_did(monkeypatch):
  """In a program that goes on, as after `cpsc_jax.main.main` in a notebook."""
  monkeypatch.setattr(stop, "SECONDS", 0.2)
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), stop.ended_in_time():
    signal.raise_signal(signal.SIGINT)
    time.sleep(1)
  time.sleep(0.5)  # the deadline would have come
  assert signal.getsignal(signal.SIGINT) == before and signal.set_wakeup_fd(-1) == -1
