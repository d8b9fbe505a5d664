"""Runs a command as several processes of one job on this machine, each with its own virtual CPU devices.

  python launch/local_processes.py --processes 2 --devices 4 -- python -m cpsc_jax.main --config configs/digits.py:smoke

For tests and debugging: on a machine with accelerators the processes still use CPUs. When a process dies, the others
are stopped and the job starts again from its last checkpoint, as often as --restarts says; a refusal (exit code 2), a
loss that is not finite (3) and Ctrl-C (130) end it. SIGTERM is handed on, and ends the job once all have saved.
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

FINAL = (2, 3, 130)  # exit codes after which starting again is no use
RESUME = 75


def parse(argv):
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, default=2, metavar="N")
  parser.add_argument("--devices", type=int, default=4, metavar="M", help="virtual CPU devices of each process")
  parser.add_argument("--restarts", type=int, default=3, help="how often the job is started again")
  parser.add_argument("--grace", type=float, default=30.0, help="seconds that survivors have to end by themselves")
  parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
  parser.add_argument("command", nargs="+", help="after --, the command of every process")
  return parser.parse_args(argv)


def environments(processes, devices, port):
  """What each process finds in its environment beside ours."""
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


def free_port():
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


def say(text):
  print(f"[launcher] {text}", flush=True)


def run_once(command, extra, grace, children):
  """Runs all processes to their end and returns their exit codes; fills `children` while they live."""
  for index, environment in enumerate(extra):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    child = subprocess.Popen(command, env={**os.environ, **environment}, **pipes)
    children.append(child)
    threading.Thread(target=relay, args=(index, child), daemon=True).start()
  deadline = None
  while any(child.poll() is None for child in children):
    failed = [index for index, child in enumerate(children) if child.poll()]
    if failed and deadline is None:
      deadline = time.monotonic() + grace
      say("; ".join(f"process {index} {ending(children[index].returncode)}" for index in failed))
    if deadline is not None and time.monotonic() > deadline:
      say(f"the others have not ended within {grace:.0f} s and are killed")
      for child in children:
        child.kill()
      deadline = float("inf")
    time.sleep(0.05)
  codes = [child.wait() for child in children]
  children.clear()
  return codes


def relay(index, child):
  for line in child.stdout:
    print(f"[{index}] {line}", end="", flush=True)


def ending(code):
  return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def main(argv=None):
  options = parse(argv)
  children, told = [], []

  def hand_on(*_):
    told.append(True)
    for child in list(children):
      child.terminate()

  if options.dry_run:
    for environment in environments(options.processes, options.devices, "PORT"):
      print(" ".join(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(options.command))
    return 0
  signal.signal(signal.SIGTERM, hand_on)
  for start in range(options.restarts + 1):
    if start:
      say(f"starting again, {start} of {options.restarts}")
    extra = environments(options.processes, options.devices, free_port())
    codes = run_once(options.command, extra, options.grace, children)
    final = [code for code in codes if code in FINAL]
    if not any(codes):
      return 0
    if final:
      return final[0]
    if told:
      return RESUME
  say(f"given up after {options.restarts} restarts; the same command resumes from the last checkpoint")
  return RESUME


if __name__ == "__main__":
  sys.exit(main())
