"""Compiled programs outlive the process that compiled them, and a damaged or a crowded cache does no harm."""

import os
import subprocess
import sys

import jax
import pytest

from cpsc_jax import compile_cache

PROGRAM = """
import jax, jax.numpy as jnp
from cpsc_jax import compile_cache

compile_cache.SECONDS_WORTH_KEEPING = 0.0
compile_cache.start()
print(jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x))(jnp.ones((8, 8)))[0, 0])
"""


def run(home, **env):
  env = {**os.environ, "XDG_CACHE_HOME": str(home), "JAX_LOG_COMPILES": "1", **env}
  env.pop("JAX_COMPILATION_CACHE_DIR", None)
  done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return float(done.stdout), done.stderr.count("Persistent compilation cache hit for 'jit__lambda")


def test_a_second_start_compiles_nothing_and_damage_is_survived(tmp_path):
  want, hits = run(tmp_path)
  assert hits == 0
  assert run(tmp_path) == (want, 1)
  for entry in (tmp_path / "cpsc_jax" / "programs").glob("*/*lambda*"):
    entry.write_bytes(entry.read_bytes()[:100])  # as a kill may leave it
  assert run(tmp_path) == (want, 0)
  assert run(tmp_path) == (want, 1), "a torn entry is replaced"
  (tmp_path / "file").touch()
  assert run(tmp_path / "file") == (want, 0)


def test_the_users_choice_stands(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
  before = jax.config.jax_compilation_cache_dir
  compile_cache.start()
  assert jax.config.jax_compilation_cache_dir == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("packer", ["zlib", "zstandard"])
def test_torn_entries_are_dropped_once(tmp_path, packer):
  module = pytest.importorskip(packer)
  whole = module.compress(bytes(range(256)) * 100)
  for name, content in {"whole": whole, "torn": whole[:-3], "empty": b"", "other": b"text"}.items():
    (tmp_path / f"{name}-cache").write_bytes(content)
  compile_cache._drop_torn(tmp_path)
  assert sorted(path.name for path in tmp_path.iterdir()) == [compile_cache.CHECKED, "whole-cache"]
  (tmp_path / "old-cache").write_bytes(whole[:-3])
  os.utime(tmp_path / "old-cache", (1e9, 1e9))
  compile_cache._drop_torn(tmp_path)
  assert (tmp_path / "old-cache").exists(), "what was there at the last look is not read again"


@pytest.mark.parametrize(("most", "left"), [(30, ["b", "c", "d"]), (25, ["c", "d"]), (0, [])])
def test_the_oldest_programs_go_first(tmp_path, monkeypatch, most, left):
  (tmp_path / "machine").mkdir()
  for age, name in enumerate("dcba"):
    path = tmp_path / "machine" / name
    path.write_bytes(b"0123456789")
    os.utime(path, (1e9 - age, 1e9 - age))
  monkeypatch.setattr(compile_cache, "MOST_BYTES", most)
  compile_cache._prune(tmp_path)
  assert sorted(path.name for path in (tmp_path / "machine").iterdir()) == left
