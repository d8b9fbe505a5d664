"""What computes: versions and hardware. A result is bit-identical only where none of them differs."""

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
from collections.abc import Iterator
from importlib import metadata

import jax

from cpsc_jax.nets import onednn

PACKAGES = ("cpsc_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def describe() -> dict[str, str | int | None]:
  """All on which the bits of a result may depend."""
  here = hardware()
  return versions() | {name: here[name] for name in ("platform", "device", "devices", "cpu")}


def changes(before: dict, now: dict) -> str:
  """What differs between two of `describe`, in words; empty if nothing does."""
  names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
  return ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in names)


def versions() -> dict[str, str | None]:
  """Of what computes; `source` is a digest of this package's files, and `onednn` is None where it does not compute."""
  packages = {name: _version(name) for name in PACKAGES}
  return {**packages, "source": _source(), "onednn": onednn.version(), "python": platform.python_version()}


def hardware() -> dict:
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "cpu": cpu_model(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  }


def cpu_model() -> str:
  lines: Iterator[str] = iter(())
  with contextlib.suppress(OSError):
    lines = iter(pathlib.Path("/proc/cpuinfo").read_text().splitlines())
  names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
  return next(names, platform.processor() or platform.machine())


@functools.cache
def _source() -> str:
  total = hashlib.sha256()
  folder = pathlib.Path(__file__).parent
  for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".cc")):
    total.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
  return total.hexdigest()[:12]


@functools.cache
def _version(package: str) -> str:
  try:
    return metadata.version(package)
  except metadata.PackageNotFoundError:
    return "unknown"
