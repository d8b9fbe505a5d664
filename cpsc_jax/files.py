"""Files of unknown origin: only regular ones are opened, and no more is read than can belong there."""

import contextlib
import errno
import json
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import Any, BinaryIO

LARGEST_JSON = 2**24  # bytes


def memory() -> int:
  """Bytes of memory of this machine."""
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def opened(path: str | pathlib.Path, largest: int) -> Iterator[BinaryIO]:
  """Opens a file for reading bytes.

  Raises:
    OSError: no such file; a pipe, a device or a folder, which is not waited for; or one of more than `largest` bytes.
  """
  descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  with open(descriptor, "rb") as file:
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
      raise OSError(errno.EINVAL, "it is a pipe, a device or a folder and no file", str(path))
    if found.st_size > largest:
      raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than {largest:,}", str(path))
    yield file


def read_bytes(path: str | pathlib.Path, largest: int) -> bytes:
  """The content of a file of at most `largest` bytes; errors as of `opened`."""
  with opened(path, largest) as file:
    return file.read()


def read_json(path: str | pathlib.Path) -> Any:
  """The content of a JSON file of at most LARGEST_JSON bytes.

  Raises:
    OSError: as `opened`.
    ValueError: it is no JSON, or nested too deeply.
  """
  try:
    return json.loads(read_bytes(path, LARGEST_JSON))
  except RecursionError:
    raise ValueError("its JSON is nested too deeply") from None
