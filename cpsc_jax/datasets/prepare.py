"""Prepares a data set once, as array_record files that TFDS reads without TensorFlow.

    python -m cpsc_jax.datasets.prepare cifar10 --data_dir D [--from ARCHIVE_OR_FOLDER]
    python -m cpsc_jax.datasets.prepare flowers --data_dir D --from FOLDER [--image_size 64]

The first form takes the original archive or the folder unpacked from it; without --from TFDS downloads the archive. The
second takes any folder with test/CLASS/*.png|jpg|jpeg and, where a teacher is to be trained, train/CLASS/* of the same
classes; the name is free. A killed preparation leaves nothing that looks finished.
"""

import argparse
import contextlib
import fcntl
import io
import os
import re
import shutil
import sys

from cpsc_jax import datasets
from cpsc_jax.command import Flags, carry_out
from cpsc_jax.errors import Refusal, first_line

DOWNLOADS = "downloads"


def prepare(name, data_dir, source=None, image_size=None, channels=None, photographs=True):
  """Writes data set `name` under `data_dir` and returns its folder; a no-op where it is there already.

  The files are written to a scratch folder beside their place and moved there when split sizes are right.

  Args:
    source: of a row of DATASETS the original archive or the folder unpacked from it, None to download it; of any
      other name a folder of images.
    image_size, channels, photographs: of a folder of images; `folders.survey` explains them.

  Raises:
    Refusal: a bad name, a missing or wrong source, splits of the wrong size, or a place that cannot be written.
  """
  ready_made = name in datasets.DATASETS
  if ready_made and (image_size, channels, photographs) != (None, None, True):
    raise Refusal(f"'{name}' is as it is; --image_size, --channels and --no_flip are for data sets of your own.")
  if not re.fullmatch("[a-z][a-z0-9_]*", name) or name == DOWNLOADS:
    raise Refusal(f"'{name}' cannot name a data set; take small letters, digits and underscores, a letter first.")
  if not ready_made and not source:
    raise Refusal(
      f"no data set '{name}'; choose one of {', '.join(datasets.DATASETS)}, or name a folder of your own images with"
      " --from."
    )
  data_dir = datasets.resolve_data_dir(data_dir)
  source = source and os.path.abspath(os.path.expanduser(source))
  try:
    if not datasets.prepared(name, data_dir):
      with scratch_folder(name, data_dir) as scratch:
        if not datasets.prepared(name, data_dir):  # by another process, while we waited for it
          write(name, data_dir, scratch, source, image_size, channels, photographs)
  except (OSError, RuntimeError) as error:  # array_record's writer raises the latter where a disk is full
    raise Refusal(
      f"cannot prepare data set '{name}' in {data_dir} ({first_line(error)}); make room or choose another --data_dir."
    ) from error
  return datasets.require(name, data_dir).data_dir


def write(name, data_dir, scratch, source, image_size, channels, photographs):
  """Lets TFDS write to `scratch`, checks what came out and moves it to its place; arguments as of `prepare`."""
  import tensorflow_datasets as tfds

  from cpsc_jax.datasets import builders, folders

  if name in datasets.DATASETS:
    spec = datasets.describe(name, data_dir)
    builder = builders.from_archive(name, scratch, source)
  else:
    found = folders.survey(source, image_size, channels, photographs)
    spec = found[0]
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
def scratch_folder(name, data_dir):
  """A fresh folder in `data_dir` for one preparation of `name` at a time; what a killed one left there is removed."""
  os.makedirs(data_dir, exist_ok=True)
  scratch, lock = (os.path.join(data_dir, f".{name}.{kind}") for kind in ("partial", "lock"))
  with lock_file(lock):
    shutil.rmtree(scratch, ignore_errors=True)
    os.mkdir(scratch)
    try:
      yield scratch
    finally:
      shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def lock_file(path):
  """Waits for the file's lock, which ends with its process however that ends; the file is removed afterwards."""
  while True:
    with open(path, "w") as file:
      fcntl.flock(file, fcntl.LOCK_EX)
      try:
        removed = not os.path.samestat(os.fstat(file.fileno()), os.stat(path))
      except FileNotFoundError:
        removed = True
      if removed:  # by its last holder, while we waited
        continue
      try:
        yield
      finally:
        os.unlink(path)
      return


def main(argv=None):
  """Carries out a command line and returns the exit code."""
  flags = Flags(
    prog="python -m cpsc_jax.datasets.prepare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  flags.add_argument("name", help=f"one of {', '.join(datasets.DATASETS)}, or any other for images of your own")
  flags.add_argument("--data_dir", default="", help="where to write (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
  flags.add_argument("--from", dest="source", help="the original archive or what was unpacked from it; or your folder")
  own = flags.add_argument_group("for images of your own")
  own.add_argument("--image_size", type=int, help="resize and centre-crop to so many pixels a side")
  own.add_argument("--channels", type=int, choices=(1, 3), help="default: 1 if all images are greyscale, else 3")
  own.add_argument("--no_flip", action="store_true", help="horizontal flips would change the class, as with digits")
  return carry_out(report, flags, argv)


def report(args):
  """Prepares what the flags ask for and says what is there then."""
  there = datasets.prepared(args.name, datasets.resolve_data_dir(args.data_dir))
  if there:
    print(f"{args.name} is there already; delete {there.data_dir} to prepare it anew.")
  else:
    print(f"preparing {args.name} ...", flush=True)
  folder = prepare(args.name, args.data_dir, args.source, args.image_size, args.channels, not args.no_flip)
  spec = datasets.describe(args.name, args.data_dir)
  images = ", ".join(f"{size:,} {split}" for split, size in spec.sizes.items())
  print(f"{folder}: {spec.num_classes} classes, {spec.image_size}x{spec.image_size}x{spec.channels}, {images} images")


if __name__ == "__main__":
  sys.exit(main())
