"""Convolutions of oneDNN for CPUs, called from compiled programs (onednn.cc); two to four times as fast as XLA's.

They are used where `pip install 'cpsc_jax[cpu]'` brought oneDNN and there is a C++ compiler: onednn.cc is compiled on
first use, in a few seconds, and kept in the user's cache folder under a digest of all that it depends on. Without them,
with several devices, and with CPSC_JAX_ONEDNN=off, cpsc_jax.nets.convolution computes the same by itself.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import jax
import jaxlib
import numpy as np

from cpsc_jax import compile_cache
from cpsc_jax.progress import say, working

SWITCH = "CPSC_JAX_ONEDNN"  # the environment variable
LIBRARY, HEADERS = "onednn-cpu-gomp", "onednn-devel-cpu-gomp"  # the wheels
TARGETS = {
  "cpsc_jax.convolution": "cpsc_convolution",
  "cpsc_jax.convolution.input_gradient": "cpsc_convolution_input_gradient",
  "cpsc_jax.convolution.weight_gradient": "cpsc_convolution_weight_gradient",
}
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = TARGETS
BITS = {"float32": 32, "bfloat16": 16}
SOURCE = pathlib.Path(__file__).with_name("onednn.cc")
FLAGS = ("-O2", "-std=c++17", "-shared", "-fPIC")

_on = True


@contextlib.contextmanager
def disabled() -> Iterator[None]:
  """Whatever is traced within the block does not use oneDNN."""
  global _on
  before, _on = _on, False
  try:
    yield
  finally:
    _on = before


def version() -> str | None:
  """The version of oneDNN with which this process convolves float32; None where it does not."""
  return importlib.metadata.version(LIBRARY) if usable(jax.ShapeDtypeStruct((1,), "float32")) else None


def usable(*arrays: jax.Array | jax.ShapeDtypeStruct) -> bool:
  """Whether oneDNN can convolve these arrays, of one dtype; compiles its binding when asked for the first time.

  Shapes that are not known yet (jax.export) and programs for several devices are left to XLA.
  """
  bits = BITS.get(str(arrays[0].dtype))
  known = all(isinstance(size, int) and size for array in arrays for size in array.shape)
  if not (_on and bits and known) or jax.default_backend() != "cpu" or jax.device_count() > 1:
    return False
  return _supports(bits)


def forward(x: jax.Array, w: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> jax.Array:
  """x (N, H, W, I), w (kh, kw, I, O), padding ((top, bottom), (left, right)) -> (N, H', W', O)."""
  sizes = zip(x.shape[1:3], w.shape[:2], strides, padding, strict=True)
  shape = (x.shape[0], *((size + sum(pads) - k) // s + 1 for size, k, s, pads in sizes), w.shape[3])
  return _call(FORWARD, shape, x, w, strides, padding)


def input_gradient(
  dy: jax.Array, w: jax.Array, shape: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
  """The gradient by x, of the given shape (N, H, W, I), from dy (N, H', W', O) and w (kh, kw, I, O)."""
  return _call(INPUT_GRADIENT, shape, dy, w, strides, padding)


def weight_gradient(
  x: jax.Array, dy: jax.Array, shape: Sequence[int], strides: Sequence[int], padding: Sequence[tuple[int, int]]
) -> jax.Array:
  """The gradient by w, of the given shape (kh, kw, I, O), from x (N, H, W, I) and dy (N, H', W', O)."""
  return _call(WEIGHT_GRADIENT, shape, x, dy, strides, padding)


def _call(target, shape, a, b, strides, padding):
  call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct(shape, a.dtype), vmap_method="expand_dims")
  numbers = {"strides": np.array(strides, np.int64), "padding": np.array(padding, np.int64).ravel()}
  return call(a, b, **numbers)


@functools.cache
def _supports(bits: int) -> bool:
  library = _library()
  return library is not None and bool(library.cpsc_supports(bits))


@functools.cache
def _library() -> ctypes.CDLL | None:
  """The compiled binding, its functions registered with XLA; None where it cannot be had, which is said."""
  if os.environ.get(SWITCH) == "off":
    return None
  if sys.platform != "linux" or platform.machine() != "x86_64":
    return None
  try:
    library, headers = _installed(LIBRARY, "libdnnl.so.3"), _installed(HEADERS, "dnnl.hpp")
  except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
    return None
  try:
    binding = _binding(library, headers)
    for target, symbol in TARGETS.items():
      jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(binding, symbol)), platform="cpu")
  except (OSError, RuntimeError, ValueError, AttributeError) as e:
    say(f"oneDNN's convolutions are not used: {e} ({SWITCH}=off hides this line).")
    return None
  return binding


def _installed(distribution: str, name: str) -> pathlib.Path:
  """Where a distribution put a file. Raises PackageNotFoundError, FileNotFoundError."""
  for file in importlib.metadata.files(distribution) or ():
    if file.name == name and (path := pathlib.Path(file.locate()).resolve()).exists():
      return path
  raise FileNotFoundError(f"{distribution} has no {name}")


def _binding(library: pathlib.Path, headers: pathlib.Path) -> ctypes.CDLL:
  """The binding from the cache, or compiled and put there; a file there that is damaged is replaced.

  Raises RuntimeError without a compiler or when it fails, OSError when the result cannot be loaded.
  """
  parts = (SOURCE.read_bytes(), library.read_bytes(), jaxlib.__version__.encode(), " ".join(FLAGS).encode())
  digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:16]
  folder = compile_cache.folder()
  for path in folder.glob(f"onednn-{digest}-*.so"):
    if path.stem.endswith(_sha(path)):
      with contextlib.suppress(OSError):
        return ctypes.CDLL(str(path))
  with tempfile.TemporaryDirectory() as scratch:
    built = _compile(library, headers, pathlib.Path(scratch))
    try:
      folder.mkdir(parents=True, exist_ok=True)
      path = folder / f"onednn-{digest}-{_sha(built)}.so"
      with tempfile.NamedTemporaryFile(dir=folder, delete=False) as whole:
        whole.write(built.read_bytes())
      os.replace(whole.name, path)
    except OSError:  # a home that cannot be written: compiled for this process alone
      path = built
    return ctypes.CDLL(str(path))


def _sha(path: pathlib.Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(library: pathlib.Path, headers: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
  if compiler is None:
    raise RuntimeError("there is no C++ compiler (g++ or clang++), which compiles their binding once")
  out = folder / "binding.so"
  inputs = (f"-I{jax.ffi.include_dir()}", f"-I{headers.parent}", str(SOURCE), str(library))
  say("compiling the binding of oneDNN, once on this machine")
  with working("compiling the binding of oneDNN"):
    command = [compiler, *FLAGS, *inputs, "-o", str(out), f"-Wl,-rpath,{library.parent}"]
    done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"{compiler} could not compile their binding: {next(iter(done.stderr.splitlines()), '')}")
  return out
