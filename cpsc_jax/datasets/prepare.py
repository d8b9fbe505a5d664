"""Prepares a data set once, as array_record files that TFDS reads without TensorFlow.

    cpsc-jax prepare cifar10 --data_dir D [--from ARCHIVE_OR_FOLDER]
    cpsc-jax prepare flowers --data_dir D --from FOLDER [--image_size 64]

The first form takes the original archive or the folder unpacked from it; without --from, the archive is downloaded. The
second form takes a folder of your own images, test/CLASS/*.png|jpg|jpeg and, to train a teacher, train/CLASS/* of the
same classes, under a name that you choose. If preparing is interrupted, nothing that looks finished is left behind.
"""

import argparse
import contextlib
import fcntl
import io
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from cpsc_jax import datasets
from cpsc_jax.command import Flags, run_command
from cpsc_jax.errors import Refusal, first_line
from cpsc_jax.progress import SECONDS_BETWEEN_LINES

DOWNLOADS = "downloads"


def prepare(
  name: str,
  data_dir: str,
  source: str | None = None,
  image_size: int | None = None,
  channels: int | None = None,
  photographs: bool = True,
) -> str:
  """Writes data set `name` under `data_dir` and returns its folder; does nothing if it is prepared already.

  The files are written to a scratch folder in `data_dir` and moved to their place once the split sizes are right.

  Args:
    source: for a row of DATASETS, the original archive or the folder unpacked from it, or None to download it; for any
      other name, a folder of images.
    image_size, channels, photographs: for a folder of images, see `folders.survey`.

  Raises:
    Refusal: a bad name, a missing or wrong source, splits of the wrong size, or a folder that cannot be written.
  """
  ready_made = name in datasets.DATASETS
  if ready_made and (image_size, channels, photographs) != (None, None, True):
    raise Refusal(f"--image_size, --channels and --no_flip are for data sets of your own, not for '{name}'.")
  if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == DOWNLOADS:
    raise Refusal(
      f"the name of a data set must be lower-case letters, digits and underscores, starting with a letter, and not"
      f" {DOWNLOADS}; got '{name}'."
    )
  if not ready_made and not source:
    raise Refusal(
      f"no data set '{name}'; choose one of {', '.join(datasets.DATASETS)}, or pass a folder of your own images by"
      " --from."
    )
  data_dir = datasets.resolve_data_dir(data_dir)
  source = source and os.path.abspath(os.path.expanduser(source))
  try:
    if not datasets.prepared(name, data_dir):
      with scratch_folder(name, data_dir) as scratch:
        if not datasets.prepared(name, data_dir):  # by another process, while we waited for it
          write(name, data_dir, scratch, source, image_size, channels, photographs)
  except (OSError, RuntimeError) as error:  # array_record's writer raises a RuntimeError when the disk is full
    raise Refusal(
      f"cannot prepare data set '{name}' in {data_dir} ({first_line(error)}); free some space or choose another"
      " --data_dir."
    ) from error
  return str(datasets.Prepared(name, data_dir).builder().data_dir)


def write(
  name: str,
  data_dir: str,
  scratch: str,
  source: str | None,
  image_size: int | None,
  channels: int | None,
  photographs: bool,
) -> None:
  """Lets TFDS write to `scratch`, checks the result and moves it to its place; other arguments as of `prepare`."""
  import tensorflow_datasets as tfds

  from cpsc_jax.datasets import builders, folders

  if name in datasets.DATASETS:
    spec = datasets.DATASETS[name]
    builder = builders.from_archive(name, scratch, source)
  else:
    found = folders.survey(source, image_size, channels, photographs)
    spec = found.spec
    builder = builders.from_folder(name, scratch, found, image_size)
  downloads = None if source or spec.bundled else os.path.join(data_dir, DOWNLOADS)
  tfds.display_progress_bar(False)
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(download_dir=downloads)
  datasets.check(builder, spec)
  final = os.path.join(data_dir, os.path.relpath(builder.data_dir, scratch))
  os.makedirs(os.path.dirname(final), exist_ok=True)
  os.rename(builder.data_dir, final)


@contextlib.contextmanager
def scratch_folder(name: str, data_dir: str) -> Iterator[str]:
  """An empty folder in `data_dir` for preparing `name`, one process at a time; what a killed one left is deleted.

  If `data_dir` is made here and nothing comes into it, it is removed again.
  """
  new = not os.path.isdir(data_dir)
  os.makedirs(data_dir, exist_ok=True)
  scratch, lock = (os.path.join(data_dir, f".{name}.{kind}") for kind in ("partial", "lock"))
  try:
    with lock_file(lock):
      shutil.rmtree(scratch, ignore_errors=True)
      os.mkdir(scratch)
      try:
        yield scratch
      finally:
        shutil.rmtree(scratch, ignore_errors=True)
  finally:
    if new:
      with contextlib.suppress(OSError):  # it is not empty
        os.rmdir(data_dir)


@contextlib.contextmanager
def lock_file(path: str) -> Iterator[None]:
  """Waits for the lock on a file, which is released even if its process is killed; the file is deleted afterwards."""
  while True:
    with open(path, "w") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      try:
        removed = not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
      except FileNotFoundError:
        removed = True
      if removed:  # by the process that had the lock before
        continue
      try:
        yield
      finally:
        os.unlink(path)
      return


@contextlib.contextmanager
def report_time(text: str) -> Iterator[None]:
  """Prints `text` and the seconds since the start, every few seconds, until the block ends."""
  done, out, start = threading.Event(), sys.stdout, time.monotonic()  # TFDS's own output is redirected elsewhere

  def report() -> None:
    while not done.wait(SECONDS_BETWEEN_LINES):
      print(f"{text} ({time.monotonic() - start:.0f} s)", file=out, flush=True)

  thread = threading.Thread(target=report, daemon=True)
  thread.start()
  try:
    yield
  finally:
    done.set()
    thread.join()


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command with the arguments `argv` (None: those of the process) and returns the exit code."""
  flags = Flags(prog="cpsc-jax prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  flags.add_argument("name", help=f"one of {', '.join(datasets.DATASETS)}, or a new name for your own images")
  flags.add_argument("--data_dir", default="", help="where to write (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
  flags.add_argument("--from", dest="source", help="the original archive, the folder unpacked from it, or your folder")
  own = flags.add_argument_group("for your own images")
  own.add_argument("--image_size", type=int, help="resize and centre-crop to this many pixels a side")
  own.add_argument("--channels", type=int, choices=(1, 3), help="default: 1 if all images are greyscale, else 3")
  own.add_argument("--no_flip", action="store_true", help="no horizontal flips in training: they change the class")
  return run_command(run, flags, argv)


def run(args: argparse.Namespace) -> None:
  """Prepares what the flags name and prints what it is."""
  existing = datasets.prepared(args.name, datasets.resolve_data_dir(args.data_dir))
  if existing:
    print(f"{args.name} is prepared already; delete {existing.data_dir} to prepare it again.")
  else:
    print(f"preparing {args.name} ...", flush=True)
  with report_time(f"preparing {args.name} ..."):
    folder = prepare(args.name, args.data_dir, args.source, args.image_size, args.channels, not args.no_flip)
  spec = datasets.find(args.name, args.data_dir).spec
  images = ", ".join(f"{size:,} {split}" for split, size in spec.sizes.items())
  print(f"{folder}: {spec.num_classes} classes, {spec.image_size}x{spec.image_size}x{spec.channels}, {images} images")


if __name__ == "__main__":
  sys.exit(main())
