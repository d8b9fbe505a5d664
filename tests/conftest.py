"""Fixtures shared by all tests; everything runs on the CPU unless JAX is told otherwise."""

import fcntl
import os
import pathlib
import signal
import subprocess

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in the background of a script; child processes inherit it
  signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:  # a worker and its child processes keep to their share of the cores
  share = str(max(1, os.cpu_count() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
  os.environ.setdefault("NPROC", share)  # read by XLA when JAX is first used
  os.environ.setdefault("OMP_NUM_THREADS", share)

os.environ.setdefault("CPSC_JAX_GRACE", "120")  # a busy machine may need long for the epoch that is to be saved

# LLVM's optimisation takes half of the time to compile, and steps as small as those of tests run no slower without it.
if "--xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import numpy as np
import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
SHARED = pathlib.Path(os.environ.get("CPSC_JAX_SHARED", REPOSITORY.parent / "shared"))
SMOKE = f"--config={REPOSITORY / 'configs' / 'digits.py'}:smoke"


def command(workdir, digits_dir, *flags, config=SMOKE):
  """The arguments of `cpsc_jax.main.main` for a run of seconds on the digits."""
  return ["main", config, f"--workdir={workdir}", f"--config.dataset.data_dir={digits_dir}", *flags]


def shared(*parts):
  """A path under the reference material, or a skip with the reason."""
  path = SHARED.joinpath(*parts)
  if not path.exists():
    pytest.skip(f"reference material {'/'.join(parts)} is not here (set CPSC_JAX_SHARED to its folder)")
  return path


def with_devices(number, optimised=True):
  """The environment of a child process that sees so many devices.

  Its code is optimised: on several devices convolutions are XLA's own, and many steps with them slow without.
  """
  flags = f"--xla_force_host_platform_device_count={number}"
  return {**os.environ, "XLA_FLAGS": flags if optimised else f"{os.environ['XLA_FLAGS']} {flags}"}


@pytest.fixture
def golden():
  """name -> {key: array} of one file of reference arrays."""

  def load(name):
    with np.load(shared("goldens", f"{name}.npz")) as arrays:
      return {key: arrays[key] for key in arrays.files}

  return load


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
  """Runs a test twice, in both precisions."""
  with jax.enable_x64(request.param == "float64"):
    yield np.dtype(request.param)


@pytest.fixture(scope="session")
def common(tmp_path_factory):
  """The session's folder that all pytest workers share."""
  own = tmp_path_factory.getbasetemp()
  return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(path, make):
  """`path`, after `make` has filled it: by the worker that needs it first, while the others wait."""
  done = path.with_name(f"{path.name}.done")
  with path.with_name(f"{path.name}.lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not done.exists():
      make()
      done.touch()
  return path


@pytest.fixture(scope="session")
def digits_dir(common):
  """A data directory with the digits prepared."""
  from cpsc_jax import datasets

  path = common / "data"
  return str(made_once(path, datasets.find("digits", str(path)).require))


@pytest.fixture(scope="session")
def finished(common, digits_dir):
  """The working directory of a finished run; tests leave it as it is."""
  from cpsc_jax.main import main

  def run():
    assert main(command(path, digits_dir)) == 0

  path = common / "smoke"
  return made_once(path, run)


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 12 MB with nothing on it, or a skip where none can be mounted."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", folder], capture_output=True, check=False
  )
  if mounted.returncode:
    pytest.skip("a disk of 12 MB cannot be mounted here")
  yield folder
  subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session", autouse=True)
def compile_cache(common):
  """Programs compiled once serve all tests, workers and child processes."""
  folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(common / "compiled"))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
