"""Fixtures shared by all tests; everything runs on the CPU unless JAX is told otherwise."""

import os
import pathlib

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
def digits_dir(tmp_path_factory):
  """A data directory with the digits prepared."""
  from cpsc_jax import datasets

  directory = str(tmp_path_factory.mktemp("data"))
  datasets.require("digits", directory)
  return directory


@pytest.fixture(scope="session")
def finished(tmp_path_factory, digits_dir):
  """The working directory of a finished run; tests leave it as it is."""
  from cpsc_jax.main import main

  workdir = tmp_path_factory.mktemp("runs") / "smoke"
  assert main(command(workdir, digits_dir)) == 0
  return workdir


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory):
  """Programs compiled once serve all tests, child processes included."""
  folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
  jax.config.update("jax_compilation_cache_dir", folder)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
