"""Runs a command as several processes of one job on this machine, each with its own virtual CPU devices.

  python launch/local_processes.py --processes 2 --devices 4 -- python -m cpsc_jax.main --config configs/digits.py:smoke

For tests and debugging: the processes use CPUs even on a machine with accelerators. When a process dies, it is named,
the others are stopped before JAX misses it, which it tells with a C++ stack, and the job is restarted from its last
checkpoint, up to --restarts times; a refusal (exit code 2), a loss that is not finite (3) and Ctrl-C (130) end it.
SIGTERM is forwarded to all processes, and the job ends once they have saved.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

INTERRUPTED, RESUME = 130, 75
FINAL = (2, 3, INTERRUPTED)  # exit codes after which a restart would fail again
SECONDS_WITHOUT_IT = 5.0  # that the others have to end by themselves; less than the heartbeat timeout of cpsc_jax.mesh
SECONDS_AFTER_INTERRUPT = 2.0  # in which processes end that Ctrl-C has reached too; it reaches all of a terminal
SECONDS_OF_LAST_LINES = 5.0  # a process that a child of it outlives never closes its output


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The flags; None means sys.argv[1:]."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, default=2, metavar="N")
  parser.add_argument("--devices", type=int, default=4, metavar="M", help="virtual CPU devices of each process")
  parser.add_argument("--restarts", type=int, default=3, help="how often the job is restarted")
  parser.add_argument("--grace", type=float, default=30.0, help="seconds to save after SIGTERM")
  parser.add_argument("--dry-run", action="store_true", help="only print what would run")
  parser.add_argument("command", nargs="+", help="the command of every process, after --")
  return parser.parse_args(argv)


def environments(processes: int, devices: int, port: int | str) -> list[dict[str, str]]:
  """The variables that each process gets in addition to those of the launcher."""
  flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}".strip()
  return [
    {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": flags,
      "CPSC_JAX_COORDINATOR": f"localhost:{port}",
      "CPSC_JAX_PROCESSES": str(processes),
      "CPSC_JAX_PROCESS": str(process),
    }
    for process in range(processes)
  ]


def free_port() -> int:
  """A TCP port of this machine that is free now."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def say(text: str) -> None:
  """Prints a line of the launcher's own."""
  print(f"[launcher] {text}", flush=True)


def run_once(
  command: Sequence[str],
  extra: list[dict[str, str]],
  grace: float,
  children: list[subprocess.Popen],
  interrupted: Sequence[float],
) -> list[int]:
  """Runs all processes to their end and returns their exit codes; `children` holds them while they run.

  `interrupted` is filled with the time of Ctrl-C when it comes.
  """
  relays = []
  for index, environment in enumerate(extra):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    child = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)
    children.append(child)
    relays.append(threading.Thread(target=relay, args=(index, child), daemon=True))
    relays[-1].start()
  deadline = None
  while any(child.poll() is None for child in children):
    failed = [index for index, child in enumerate(children) if child.poll()]
    if failed and deadline is None:
      saving = all(children[index].returncode == RESUME for index in failed)
      deadline = time.monotonic() + (grace if saving else min(grace, SECONDS_WITHOUT_IT))
      names = ", ".join(f"process {index} {ending(children[index].returncode)}" for index in failed)
      say(names if saving else f"{names}; stopping the others")
    if interrupted and deadline is None and time.monotonic() > interrupted[0] + SECONDS_AFTER_INTERRUPT:
      for child in children:
        child.send_signal(signal.SIGINT)
      deadline = time.monotonic() + grace
    if deadline is not None and time.monotonic() > deadline:
      for child in children:
        child.kill()
      deadline = float("inf")
    time.sleep(0.05)
  codes = [child.wait() for child in children]
  for thread in relays:
    thread.join(SECONDS_OF_LAST_LINES)
  children.clear()
  return codes


def relay(index: int, child: subprocess.Popen) -> None:
  """Prints the output of a process, each line with its index."""
  for line in child.stdout:
    print(f"[{index}] {line}", end="", flush=True)


def ending(code: int) -> str:
  """An exit code in words."""
  return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the job, restarting it as often as allowed; returns its exit code."""
  options = parse(argv)
  children, terminated, interrupted = [], [], []

  def forward(*_):
    terminated.append(True)
    for child in list(children):
      child.terminate()

  if options.dry_run:
    for environment in environments(options.processes, options.devices, "PORT"):
      print(" ".join(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(options.command))
    return 0
  os.environ.setdefault("CPSC_JAX_GRACE", str(options.grace))  # of cpsc_jax.stop, in the processes
  signal.signal(signal.SIGTERM, forward)
  signal.signal(signal.SIGINT, lambda *_: interrupted.append(time.monotonic()))
  for start in range(options.restarts + 1):
    if start:
      say(f"starting again, {start} of {options.restarts}")
    extra = environments(options.processes, options.devices, free_port())
    codes = run_once(options.command, extra, options.grace, children, interrupted)
    final = [code for code in codes if code in FINAL]
    if not any(codes):
      return 0
    if interrupted:
      return INTERRUPTED
    if final:
      return final[0]
    if terminated:
      return RESUME
  say(f"giving up after {options.restarts} restarts; the same command resumes from the last checkpoint")
  return RESUME


if __name__ == "__main__":
  sys.exit(main())
