"""Runs as a few files of bounded size: what the next call needs when it is made on another machine.

  python -m benchmarks.parcel pack runs/gpu FOLDER [--limit 60MiB] [--part 15MiB]
  python -m benchmarks.parcel unpack FOLDER runs/gpu

Of every run below the first folder, in this order as far as the limit goes: the records of all runs; teachers; students
of finished runs; the last checkpoint of unfinished ones. What is left out is named: such a run begins again. The parts
are a tar archive cut into pieces, with the sha256 of the whole; an archive of which a piece is missing or damaged is
refused.
"""

import argparse
import hashlib
import io
import json
import pathlib
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence

from cpsc_jax.errors import Refusal
from cpsc_jax.record import write_whole

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
INDEX = "parcel.json"
RECORDS = ("*.json", "events")  # of a run; its command and commit lie beside it, in NAME.origin.json


def pack(root: pathlib.Path, folder: pathlib.Path, limit: int, part: int) -> list[str]:
  """Packs the runs below `root` into `folder`, at most `limit` bytes in pieces of at most `part`.

  Returns:
    What was left out, relative to `root`.
  """
  whole, left_out = io.BytesIO(), []
  with tarfile.open(fileobj=whole, mode="w") as archive:
    for group in groups(root):
      files = [file for path in group for file in (path, *path.rglob("*"))]
      size = sum(2048 + (file.stat().st_size if file.is_file() else 0) for file in files)  # with headers and padding
      if whole.tell() + size > limit - 20480:  # an archive ends with up to so much padding
        left_out += [str(path.relative_to(root)) for path in group]
        continue
      for path in group:
        archive.add(path, str(path.relative_to(root)))
  content = whole.getvalue()
  folder.mkdir(parents=True, exist_ok=True)
  pieces = [content[start : start + part] for start in range(0, len(content), part)]
  names = [f"parcel.{number:02}" for number in range(len(pieces))]
  for name, piece in zip(names, pieces, strict=True):
    write_whole(folder / name, piece)
  index = {"parts": names, "sha256": hashlib.sha256(content).hexdigest(), "left_out": left_out}
  write_whole(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
  return left_out


def groups(root: pathlib.Path) -> Iterator[list[pathlib.Path]]:
  """What is packed together or not at all, most needed first."""
  runs = sorted(path.parent for path in root.rglob("config.json"))
  done = {run: (run / "results.json").exists() for run in runs}
  yield sorted(root.glob("*.json"))  # tables, and what is wrong on this machine
  for run in runs:
    yield [*(path for pattern in RECORDS for path in sorted(run.glob(pattern))), *run.parent.glob(f"{run.name}.*.json")]
  yield from ([run / "teacher"] for run in runs if (run / "teacher").exists())
  yield from ([run / "student"] for run in runs if done[run] and (run / "student").exists())
  for run in runs:
    training = "checkpoints" if (run / "teacher").exists() or not (run / "teacher_training").exists() else ""
    checkpoints = run / (training or "teacher_training/checkpoints")
    if not done[run] and checkpoints.exists():
      yield [checkpoints]


def unpack(folder: pathlib.Path, root: pathlib.Path) -> list[str]:
  """Unpacks what `pack` has left into `root`, where no run may lie yet; returns what it had left out.

  Raises:
    Refusal: there is no parcel, a piece of it is missing or damaged, or `root` is not empty.
  """
  if root.exists() and any(root.iterdir()):
    raise Refusal(f"{root} is not empty; a parcel is unpacked into a new folder.")
  try:
    index = json.loads((folder / INDEX).read_text())
    content = b"".join((folder / name).read_bytes() for name in index["parts"])
  except OSError as error:
    raise Refusal(f"the parcel in {folder} is not whole: {error.filename} is missing.") from None
  if hashlib.sha256(content).hexdigest() != index["sha256"]:
    raise Refusal(f"the parcel in {folder} is damaged: its sha256 is not that in {INDEX}; copy its files again.")
  with tarfile.open(fileobj=io.BytesIO(content)) as archive:
    archive.extractall(root, filter="data")
  return index["left_out"]


def size_of(text: str) -> int:
  """Bytes of "60MiB". Raises Refusal for any other form."""
  found = re.fullmatch(r"(\d+)([KMG]iB)", text)
  if not found:
    raise Refusal(f"a size is '{text}'; expected a number and KiB, MiB or GiB, such as 60MiB.")
  return int(found[1]) * UNITS[found[2]]


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.parcel", description=__doc__.split("\n")[0])
  parser.add_argument("what", choices=("pack", "unpack"))
  parser.add_argument("source", type=pathlib.Path)
  parser.add_argument("target", type=pathlib.Path)
  parser.add_argument("--limit", default="60MiB", help="of all parts together (default: %(default)s)")
  parser.add_argument("--part", default="15MiB", help="of one part (default: %(default)s)")
  flags = parser.parse_args(argv)
  try:
    if flags.what == "pack":
      left_out = pack(flags.source, flags.target, size_of(flags.limit), size_of(flags.part))
    else:
      left_out = unpack(flags.source, flags.target)
  except Refusal as refusal:
    print(f"benchmarks.parcel: {refusal}", file=sys.stderr)
    return 2
  for path in left_out:
    print(f"not in the parcel, as it does not fit: {path}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
