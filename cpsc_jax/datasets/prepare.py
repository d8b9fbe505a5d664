"""Prepares a data set once, from its original archive, as array_record files that TFDS reads without TensorFlow.

    python -m cpsc_jax.datasets.prepare cifar10 --data_dir D --from cifar-10-binary.tar.gz

Without --from the archive is downloaded by TFDS. A killed preparation leaves nothing that looks finished.
"""

import argparse
import contextlib
import io
import os
import shutil
import sys
import tempfile

from cpsc_jax import datasets
from cpsc_jax.errors import Refusal


def prepare(name, data_dir, archive=None):
  """Writes data set `name` under `data_dir` and returns the folder; a no-op where it is there already.

  The files are written to a temporary folder beside their place and moved there when split sizes are right.

  Raises:
    Refusal: unknown name, missing or wrong archive, or splits of the wrong size.
  """
  import tensorflow_datasets as tfds

  spec = datasets.describe(name)
  data_dir = datasets.resolve_data_dir(data_dir)
  final = datasets._builder(name, data_dir)
  if final.is_prepared():
    return final.data_dir
  try:
    os.makedirs(data_dir, exist_ok=True)
    scratch = tempfile.mkdtemp(prefix=f".{name}-", dir=data_dir)
  except OSError as error:
    raise Refusal(f"cannot write to {data_dir} ({error.strerror}); choose another --data_dir.") from error
  try:
    builder = datasets._builder(name, scratch)
    builder.archive = os.path.abspath(archive) if archive else None
    tfds.display_progress_bar(False)
    with contextlib.redirect_stdout(io.StringIO()):
      builder.download_and_prepare(file_format="array_record")
    datasets._check_sizes(builder, name, spec, archive or data_dir)
    os.makedirs(os.path.dirname(final.data_dir), exist_ok=True)
    try:
      os.rename(builder.data_dir, final.data_dir)
    except OSError:
      if not datasets._builder(name, data_dir).is_prepared():  # else another process was first
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return final.data_dir


def main(argv=None):
  parser = argparse.ArgumentParser(prog="python -m cpsc_jax.datasets.prepare", description=__doc__.split("\n")[0])
  parser.add_argument("name", help=f"one of {', '.join(datasets.DATASETS)}")
  parser.add_argument(
    "--data_dir", default="", help="where to write (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
  )
  parser.add_argument("--from", dest="archive", help="the original archive (SVHN: the folder of .mat files)")
  args = parser.parse_args(argv)
  try:
    print(f"preparing {args.name} ...", flush=True)
    print(f"{args.name} is ready in {prepare(args.name, args.data_dir, args.archive)}")
  except Refusal as refusal:
    sys.exit(f"cpsc_jax: {refusal}")


if __name__ == "__main__":
  main()
