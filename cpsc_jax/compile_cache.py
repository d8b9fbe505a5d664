"""What compilers made is kept in the user's cache folder, so that a second start compiles nothing."""

import contextlib
import hashlib
import os
import pathlib
import platform
import zlib

import jax

MOST_BYTES = 2**30  # of compiled programs; the oldest go first
CHECKED = ".checked"  # a file, as old as the last look for torn entries
SECONDS_WORTH_KEEPING = 0.2  # a program that takes less to compile is not kept


def folder() -> pathlib.Path:
  """The user's cache folder of this package, $XDG_CACHE_HOME/cpsc_jax or ~/.cache/cpsc_jax."""
  return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "cpsc_jax"


def start() -> None:
  """Turns on JAX's persistent compilation cache, unless it is on or turned off already or the folder is not writable.

  JAX knows a program by its text, its devices and the versions of its compiler. A CPU's programs are also kept apart by
  the instructions that it has, as a home may be shared between machines. Each program is kept as soon as it is
  compiled, so that a run which is killed again and again before its first checkpoint compiles only what it had not yet
  finished.
  """
  if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir:
    return
  programs = folder() / "programs" / _instructions()
  try:
    programs.mkdir(parents=True, exist_ok=True)
  except OSError:
    return
  if not os.access(programs, os.W_OK):
    return
  _prune(programs.parent)
  _drop_torn(programs)
  jax.config.update("jax_compilation_cache_dir", str(programs))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", SECONDS_WORTH_KEEPING)


def _instructions() -> str:
  """A digest of the processor's instruction sets."""
  words = platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    words = next((line for line in lines if line.startswith(("flags", "Features"))), words)
  return hashlib.sha256(words.encode()).hexdigest()[:12]


def _drop_torn(programs: pathlib.Path) -> None:
  """Deletes entries, written since the last look, that a kill has left half written: JAX would never replace them."""
  mark = programs / CHECKED
  since = mark.stat().st_mtime if mark.exists() else 0.0
  for path in programs.glob("*-cache"):
    with contextlib.suppress(OSError):  # another process looks too
      if path.stat().st_mtime >= since and not _whole(path.read_bytes()):
        path.unlink()
  with contextlib.suppress(OSError):
    mark.touch()


def _whole(entry: bytes) -> bool:
  """Whether an entry can be unpacked: JAX packs with zstandard where that is installed, and else with zlib."""
  with contextlib.suppress(zlib.error):
    return bool(zlib.decompress(entry))
  with contextlib.suppress(Exception):  # of zstandard, which may be missing
    import zstandard

    return bool(zstandard.ZstdDecompressor().decompress(entry))
  return False


def _prune(programs: pathlib.Path) -> None:
  entries = []
  for path in programs.glob("*/*"):
    with contextlib.suppress(OSError):  # another process prunes too
      entries.append((path.stat().st_mtime, path.stat().st_size, path))
  total = sum(size for _, size, _ in entries)
  for _, size, path in sorted(entries):
    if total <= MOST_BYTES:
      return
    with contextlib.suppress(OSError):
      path.unlink()
    total -= size
