"""One program on any number of devices and processes: the same terms, the same student, one writer."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import REPOSITORY, with_devices

from cpsc_jax.methods import METHODS

LAUNCHER = (sys.executable, REPOSITORY / "launch" / "local_processes.py")


def run_worker(out, processes, devices, scl_form, method, iterations):
  command = [sys.executable, REPOSITORY / "tests" / "spmd_worker.py", out, scl_form, method, str(iterations)]
  if processes > 1:
    command = [*LAUNCHER, f"--processes={processes}", f"--devices={devices}", "--restarts=0", "--", *command]
  environment = with_devices(devices, optimised=iterations > 5)
  done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-3000:]
  with np.load(out) as arrays:
    assert int(arrays["devices"]) == processes * devices
    return {key: arrays[key] for key in arrays.files if key != "devices"}


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
  """(method, iterations) -> what the worker finds on one device, worked out once."""
  folder = tmp_path_factory.mktemp("one")
  return functools.cache(lambda method, n: run_worker(folder / f"{method}-{n}.npz", 1, 1, "dense", method, n))


@pytest.mark.parametrize(
  "processes, devices, scl_form, method, iterations",
  [
    (1, 8, "blockwise", "cpsc", 3),
    pytest.param(1, 8, "dense", "need", 3, marks=pytest.mark.slow),
    pytest.param(1, 8, "blockwise", "cpsc", 20, marks=pytest.mark.slow),
    pytest.param(2, 4, "dense", "cpsc", 20, marks=pytest.mark.slow),
    pytest.param(2, 4, "blockwise", "cpsc", 20, marks=pytest.mark.slow),
    pytest.param(2, 4, "dense", "rgal", 20, marks=pytest.mark.slow),
    *(pytest.param(1, 8, "dense", name, 20, marks=pytest.mark.slow) for name in (*METHODS, "incremental")),
  ],
)
def test_iterations_do_not_depend_on_the_devices(
  on_one_device, tmp_path, processes, devices, scl_form, method, iterations
):
  found = run_worker(tmp_path / "terms.npz", processes, devices, scl_form, method, iterations)
  wanted = on_one_device(method, iterations)
  assert found.keys() == wanted.keys() and sum("terms" in key for key in found) >= 4
  for key, want in wanted.items():
    assert np.max(np.abs(found[key] - want)) <= 1e-9 * max(np.max(np.abs(want)), 1e-3), key
    assert want.shape == (iterations, 1) or "terms" not in key


def test_a_process_that_dies_is_named_and_the_job_resumed(tmp_path):
  """Two processes train; one kills itself once; the launcher says so, and the second start ends as if nothing was."""
  worker = [sys.executable, REPOSITORY / "tests" / "loop_worker.py"]

  def launch(*argv):
    command = [*LAUNCHER, "--devices=2", "--grace=1", "--", *worker, *argv]
    return subprocess.run(command, capture_output=True, text=True, check=True)

  launch(tmp_path / "whole", "never")
  broken = launch(tmp_path / "broken", "once")
  lines = broken.stdout.splitlines()
  died = lines.index("[launcher] process 1 was killed by SIGKILL; stopping the others")
  assert "[launcher] starting again, 1 of 3" in lines[died:] and "stack trace" not in broken.stdout + broken.stderr
  assert "resuming after epoch 4 of 6" in broken.stdout
  whole, broken = (json.loads((tmp_path / name / "outcome.json").read_text()) for name in ("whole", "broken"))
  assert whole == broken and len(whole["history"]) == 6


def test_processes_that_cannot_be_joined_are_refused():
  def refusal(**variables):
    environment = {**os.environ, **{f"CPSC_JAX_{name}": value for name, value in variables.items()}}
    command = [sys.executable, "-m", "cpsc_jax.main", f"--config={REPOSITORY / 'configs' / 'digits.py'}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("cpsc_jax: ") and done.stderr.count("\n") == 1
    return done.stderr

  assert "set without CPSC_JAX_PROCESSES, CPSC_JAX_PROCESS" in refusal(COORDINATOR="localhost:1")
  wrong = refusal(COORDINATOR="localhost:1", PROCESSES="2", PROCESS="2")
  assert "CPSC_JAX_PROCESS the index of this process, from 0 to that number less one; got localhost:1, 2, 2" in wrong


def test_launcher_hands_back_a_refusal_and_does_not_start_again(tmp_path):
  done = subprocess.run(
    [*LAUNCHER, "--processes=2", "--grace=1", "--", sys.executable, "-c", "raise SystemExit(2)"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2 and "starting again" not in done.stdout
  dry = subprocess.run([*LAUNCHER, "--dry-run", "--", "touch", tmp_path / "x"], capture_output=True, text=True)
  assert dry.stdout.count("CPSC_JAX_PROCESS=") == 2 and not (tmp_path / "x").exists()


def test_launcher_prints_the_last_lines_to_a_slow_reader():
  """The processes have ended while more than a pipe holds of what they printed is still to be read."""
  program = "print((49 * 'x' + '\\n') * 1400 + 'last')"
  command = [*LAUNCHER, "--processes=2", "--restarts=0", "--", sys.executable, "-c", program]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as launcher:
    time.sleep(1.5)
    lines = launcher.stdout.read().splitlines()
  assert launcher.returncode == 0 and {"[0] last", "[1] last"} < set(lines) and len(lines) == 2 * 1401


@pytest.mark.slow
def test_phases_on_two_processes_end(tmp_path, digits_dir):
  """As on one, but for round-off; the last network is written by all."""
  config = REPOSITORY / "configs" / "incremental_digits.py"
  program = (
    sys.executable,
    "-m",
    "cpsc_jax.main",
    f"--config={config}:smoke",
    f"--config.dataset.data_dir={digits_dir}",
  )
  found = []
  for name, before in (("one", ()), ("two", (*LAUNCHER, "--processes=2", "--devices=1", "--restarts=0", "--"))):
    command = [*before, *program, f"--workdir={tmp_path / name}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=with_devices(1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / name / "results.json").read_text())
    found.append(results["incremental"]["matrix"])
    assert (tmp_path / name / "student" / "net.json").exists() and results["hardware"]["processes"] == len(found)
  assert np.abs(np.concatenate([np.subtract(*rows) for rows in zip(*found, strict=True)])).max() < 0.1


@pytest.mark.parametrize("ends_by_itself", [True, False])
def test_launcher_is_interrupted(ends_by_itself, tmp_path):
  """Ctrl-C in a terminal reaches all processes, `kill -INT` the launcher alone; it ends them, in one line each."""
  program = """
import signal, sys, time
def interrupted(*_):
  print("interrupted", flush=True)
  sys.exit(130)
signal.signal(signal.SIGINT, interrupted)
print("ready", flush=True)
time.sleep(100)
"""
  command = [*LAUNCHER, "--processes=2", "--", sys.executable, "-c", program]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
  with subprocess.Popen(command, **pipes) as launcher:
    ready = [launcher.stdout.readline() for _ in range(2)]
    (os.killpg if ends_by_itself else os.kill)(launcher.pid, signal.SIGINT)
    output, error = launcher.communicate(timeout=60)
  assert sorted(ready) == ["[0] ready\n", "[1] ready\n"] and launcher.returncode == 130
  assert output.count("interrupted") == 2 and not error


def test_launcher_stops_those_that_wait_for_a_dead_one(tmp_path):
  """Before JAX misses it: one line says which died, the next that the job starts again."""
  program = f"""
import os, pathlib, time
own, other = (pathlib.Path({str(tmp_path)!r}, f"{{i}}") for i in (os.environ["CPSC_JAX_PROCESS"], "0"))
if not own.exists():
  own.touch()
  while not other.exists():
    time.sleep(0.01)
  if own != other:
    os.kill(os.getpid(), 9)
  time.sleep(600)"""
  command = [*LAUNCHER, "--processes=2", "--grace=500", "--", sys.executable, "-c", program]
  done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
  assert done.returncode == 0 and done.stdout.splitlines() == [
    "[launcher] process 1 was killed by SIGKILL; stopping the others",
    "[launcher] starting again, 1 of 3",
  ]


def test_launcher_hands_sigterm_on():
  command = [*LAUNCHER, "--processes=2", "--", sys.executable, "-uc", "print('up'); import time; time.sleep(60)"]
  launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
  assert [launcher.stdout.readline().split()[1] for _ in range(2)] == ["up", "up"]
  launcher.send_signal(signal.SIGTERM)
  assert launcher.wait(20) == 75 and "starting again" not in launcher.stdout.read()
