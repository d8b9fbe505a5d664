"""launch/slurm.sbatch under a real Slurm of two nodes, both on this machine, set up for the test and taken down."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY

DAEMONS = ("munged", "slurmctld", "slurmd")
SCRIPT = REPOSITORY / "launch" / "slurm.sbatch"
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port0}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 Port={port1} CPUs=1 State=UNKNOWN
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=1 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def wait_for(condition, seconds, what):
  deadline = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
    time.sleep(0.2)
  return found


def queue():
  return subprocess.run(["squeue", "-h"], capture_output=True, text=True, check=True).stdout


def idle_nodes():
  return subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True).stdout.strip()


def free_ports(count):
  probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
  ports = [probe.getsockname()[1] for probe in probes]
  for probe in probes:
    probe.close()
  return ports


@pytest.fixture
def slurm(tmp_path, monkeypatch):
  """Environment of a running cluster with two nodes, or a skip with the reason."""
  missing = [name for name in DAEMONS if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin")]
  if missing or os.geteuid():
    pytest.skip("needs root and Debian's slurm-wlm and munge" + f"; {missing} not found" * bool(missing))
  folder = pathlib.Path("/tmp") / f"slurm-{os.getpid()}"  # sockets have short names
  folder.mkdir(mode=0o755)
  (folder / "state").mkdir()
  (folder / "munge.key").write_bytes(os.urandom(128))
  (folder / "munge.key").chmod(0o600)
  ports = dict(zip(("port0", "port1", "port2"), free_ports(3), strict=True))
  host = socket.gethostname()
  (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, **ports))
  monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
  monkeypatch.setenv("PATH", os.environ["PATH"] + ":/usr/sbin")
  files = [f"--{kind}={folder}/munge.{kind.split('-')[0]}" for kind in ("socket", "key-file", "pid-file", "log-file")]
  commands = [["munged", "--foreground", "--force", "--num-threads=2", f"--seed-file={folder}/munge.seed", *files]]
  commands += [["slurmctld", "-D"], ["slurmd", "-D", "-N", host], ["slurmd", "-D", "-N", "localhost"]]
  daemons = []
  for command in commands:
    daemons.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    if command[0] == "munged":
      wait_for((folder / "munge.socket").exists, 20, "munged starting")
  try:
    wait_for(lambda: idle_nodes() == "2", 60, "two nodes being ready")
    yield folder
  finally:
    subprocess.run(["scancel", "--full", "--user=root"], check=False)
    wait_for(lambda: not queue(), 60, "the cluster being empty")
    for daemon in reversed(daemons):
      daemon.terminate()
      daemon.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def task_process(job, task):
  """The process id of one task of a job, or None."""
  want = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={task}".encode()}
  for path in pathlib.Path("/proc").glob("[0-9]*"):
    try:
      variables = set((path / "environ").read_bytes().split(b"\0"))
      if want <= variables and b"cpsc_jax.main" in (path / "cmdline").read_bytes():
        name = (path / "comm").read_text().strip()
        if name.startswith("python"):
          return int(path.name)
    except OSError:  # it has ended meanwhile, or is none of ours
      continue
  return None


@pytest.mark.slow
def test_two_tasks_one_killed_job_resumed(slurm, tmp_path, digits_dir, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.setenv("CPSC_JAX_PYTHON", sys.executable)
  workdir, log = tmp_path / "w", tmp_path / "log"
  config = [f"--config={REPOSITORY / 'configs' / 'digits.py'}:smoke", "--config.schedule.epochs=20"]
  arguments = [*config, "--config.teacher.epochs=2", f"--workdir={workdir}", f"--config.dataset.data_dir={digits_dir}"]
  submitted = subprocess.run(
    ["sbatch", "--parsable", f"--output={log}", SCRIPT, *arguments], cwd=REPOSITORY, capture_output=True, text=True
  )
  assert submitted.returncode == 0, submitted.stderr
  job = submitted.stdout.strip()
  checkpoints = workdir / "checkpoints"
  wait_for(lambda: any(p.name.isdigit() for p in checkpoints.glob("*")), 1800, "a whole checkpoint")
  os.kill(wait_for(lambda: task_process(job, 1), 10, "task 1 being there"), signal.SIGKILL)
  killed = time.monotonic()
  wait_for(lambda: "back into the queue" in log.read_text(), 60, "the job going down")
  print(f"the job was down {time.monotonic() - killed:.0f} s after its task")
  wait_for(lambda: (workdir / "results.json").exists(), 1800, "the resumed job finishing")
  wait_for(lambda: not queue(), 60, "the job ending")
  text = log.read_text()
  print(text)
  assert "0: distill: resuming after epoch" in text and "task 1: Killed" in text
  assert any(line.startswith("1: ") for line in text.splitlines())
  results = json.loads((workdir / "results.json").read_text())
  assert results["hardware"]["processes"] == 2 and results["student"]["last"]["epoch"] == 20


def test_help_and_dry_run():
  def run(*argv):
    return subprocess.run(["bash", SCRIPT, *argv], capture_output=True, text=True, check=True).stdout

  assert "sbatch --nodes=4" in run("--help")
  assert run("--dry-run", "--config", "c.py").strip().endswith("-m cpsc_jax.main --config c.py")
