"""Hostile and damaged input for every command that reads files, and what each command makes of it.

Each `Case` writes its input into an empty folder and gives the arguments of a command. `attempt` carries it out in this
process and observes: exit code, what was printed and written, programs started, connections opened, memory. All cases
are made from fixed seeds.
"""

import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import pathlib
import random
import resource
import shutil
import signal
import socket
import struct
import sys
import tarfile
import time
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from cpsc_jax import checkpoint, main, sample, saved
from cpsc_jax.datasets import prepare
from cpsc_jax.interop import export
from cpsc_jax.interop.convert import __main__ as convert

MOST_MEMORY = 10**9  # bytes over the size of the input
MOST_SECONDS = 60.0
BEGUN = {
  "w",
  "w/config.json",
  "w/origin.json",
  "w/.lock",
}  # what a run leaves that could not load its teacher: no result


class Case(NamedTuple):
  """One input.

  Attributes:
    command: convert, prepare, resume, export or sample.
    kind: what is done to the input, for the table.
    write: (folder for the input, folder for the output) -> arguments of the command.
    whole: (folder of the output) -> raises unless what an accepted input led to is whole; None: it must be refused.
  """

  command: str
  kind: str
  write: Callable[[pathlib.Path, pathlib.Path], list]
  whole: Callable[[pathlib.Path], None] | None = None


class Seen(NamedTuple):
  """What came of a case: "refused" or "accepted", or else what is wrong; seconds; bytes of memory over the input's."""

  outcome: str
  seconds: float
  memory: int
  said: str


COMMANDS = {
  "convert": convert.main,
  "prepare": prepare.main,
  "resume": lambda argv: main.main(["main", *argv]),
  "export": export.main,
  "sample": sample.main,
}


# Observing.

_events: list[str] | None = None
_STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect", "pty.spawn")


def _audit(event: str, arguments: tuple) -> None:
  if _events is not None and (event in _STARTS or event == "import" and arguments[0] == "antigravity"):
    _events.append(f"{event} {arguments}"[:200])


def watch() -> None:
  """Begins to observe programs started and connections opened, for the rest of this process."""
  sys.addaudithook(_audit)


def _memory(field: str) -> int:
  with open("/proc/self/status") as file:
    return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _size(folder: pathlib.Path) -> int:
  return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def _tree(folder: pathlib.Path) -> list[str]:
  return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _too_long(*_: Any) -> None:
  raise TimeoutError(f"more than {MOST_SECONDS:.0f} s")


def attempt(case: Case, folder: pathlib.Path) -> Seen:
  """Carries out a case in an empty folder, which is removed afterwards."""
  global _events
  source, out = folder / "in", folder / "out"
  source.mkdir(parents=True)
  out.mkdir()
  here = os.getcwd()
  try:
    argv = [str(part) for part in case.write(source, out)]
    before, size = (_tree(source), _tree(out)), _size(source)
    with open("/proc/self/clear_refs", "w") as file:
      file.write("5")  # the peak starts anew
    start, resident, _events = time.monotonic(), _memory("VmRSS"), []
    shown, error = io.StringIO(), io.StringIO()
    raised = ""
    os.chdir(out)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_memory("VmSize") + 4 * MOST_MEMORY, limits[1]))
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(int(MOST_SECONDS))
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(error):
      try:
        code = COMMANDS[case.command](argv)
      except BaseException:
        code, raised = None, traceback.format_exc()
      finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    events, _events = _events, None
    seconds, memory = time.monotonic() - start, _memory("VmHWM") - resident - size
    said = raised or error.getvalue()
    wrong = []
    if events:
      wrong.append(f"executed: {events}")
    if raised or "Traceback" in said:
      wrong.append("traceback")
    if code == 2 and not (said.startswith("cpsc_jax: ") and said.count("\n") == 1 and said[:-1].isprintable()):
      wrong.append("not one sentence")
    if code == 2:
      more = (set(_tree(out)) - BEGUN) ^ set(before[1]) or set(_tree(source)) ^ set(before[0])
      wrong += [f"partial output: {more}"] if more else []
    if code == 0 and case.whole is None:
      wrong.append("accepted")
    if code == 0 and case.whole is not None:
      try:
        case.whole(out)
      except Exception as failure:
        wrong.append(f"partial output: {failure!r}")
    if code not in (0, 2, None):
      wrong.append(f"exit code {code}")
    if memory > MOST_MEMORY:
      wrong.append(f"memory: {memory / 1e6:,.0f} MB")
    if seconds > MOST_SECONDS:
      wrong.append(f"{seconds:.0f} s")
    outcome = "; ".join(wrong) or ("refused" if code == 2 else "accepted")
    return Seen(outcome, seconds, memory, said)
  finally:
    os.chdir(here)
    _events = None
    shutil.rmtree(folder)


# Damaging bytes.


def _truncated(rng: random.Random, data: bytes) -> bytes:
  return data[: rng.randrange(len(data))]


def _flipped(rng: random.Random, data: bytes) -> bytes:
  changed = bytearray(data)
  for _ in range(rng.choice((1, 1, 3, 30))):
    changed[rng.randrange(len(data))] ^= rng.randrange(1, 256)
  return bytes(changed)


def _inserted(rng: random.Random, data: bytes) -> bytes:
  at = rng.randrange(len(data))
  return data[:at] + rng.randbytes(rng.choice((1, 7, 1000))) + data[at:]


def _deleted(rng: random.Random, data: bytes) -> bytes:
  at = rng.randrange(len(data))
  return data[:at] + data[at + rng.choice((1, 7, 500)) :]


def _zeroed(rng: random.Random, data: bytes) -> bytes:
  at = rng.randrange(len(data))
  return (data[:at] + bytes(rng.choice((4, 64, 2000))) + data[at:])[: len(data)]


def _repeated(rng: random.Random, data: bytes) -> bytes:
  a, b = sorted(rng.randrange(len(data)) for _ in range(2))
  return data[:b] + data[a:b] * rng.choice((1, 5)) + data[b:]


def _huge_number(rng: random.Random, data: bytes) -> bytes:
  at, wide = rng.randrange(len(data)), rng.choice((b"\xff\xff\xff\x7f", b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8)))
  return data[:at] + wide + data[at + len(wide) :]


DAMAGES = {
  "cut short": _truncated,
  "bytes flipped": _flipped,
  "bytes inserted": _inserted,
  "bytes missing": _deleted,
  "zeros written over": _zeroed,
  "parts repeated": _repeated,
  "huge numbers written over": _huge_number,
}


def damaged(data: bytes, number: int, seed: int) -> Iterator[tuple[str, bytes]]:
  """(kind, bytes): `number` damaged copies for each of DAMAGES."""
  for kind, change in DAMAGES.items():
    for i in range(number):
      rng = random.Random(f"{kind} {seed} {i}")
      changed = change(rng, data)
      if changed != data:
        yield kind, changed


def file(name: str, content: bytes | Callable[[pathlib.Path], Any]) -> Callable[[pathlib.Path], pathlib.Path]:
  """(folder) -> the path of a file there with these bytes, or that a function writes."""

  def write(folder: pathlib.Path) -> pathlib.Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    return path

  return write


def sparse(path: pathlib.Path, size: int = 10**12, start: bytes = b"") -> None:
  """A file of a terabyte that takes no room."""
  with path.open("wb") as out:
    out.write(start)
    out.truncate(size)


def socket_at(path: pathlib.Path) -> None:
  with socket.socket(socket.AF_UNIX) as own:
    here = os.getcwd()
    os.chdir(path.parent)
    own.bind(path.name)
    os.chdir(here)


# What no file is: (name, how it is made).
STRANGE = {
  "a pipe": os.mkfifo,
  "a socket": socket_at,
  "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
  "a link to itself": lambda path: path.symlink_to(path),
  "a link to nothing": lambda path: path.symlink_to("nowhere"),
  "a folder": lambda path: path.mkdir(),
  "a terabyte of zeros": sparse,
}


# convert


def whole_teacher(out: pathlib.Path) -> None:
  saved.load(out / "net")


def convert_cases(valid: dict[str, bytes], number: int) -> Iterator[Case]:
  """Checkpoints; `valid` has {file name: bytes} of files that convert."""

  def case(kind, write, *flags):
    return Case("convert", kind, lambda source, out: [write(source), "--out", out / "net", *flags], whole_teacher)

  for seed, (name, data) in enumerate(valid.items()):
    for kind, changed in damaged(data, 4 * number, seed):
      yield case(kind, file(name, changed))
  for kind, make in STRANGE.items():
    for name in ("x.pth", "x.safetensors"):
      yield case(kind, file(name, make))
  yield case(
    "a terabyte of zeros", file("x.safetensors", lambda path: sparse(path, start=struct.pack("<Q", 10**8) + b"{"))
  )
  yield case("a terabyte of zeros", file("x.pth", lambda path: sparse(path, start=valid["zip.pth"])))
  yield case("a terabyte of zeros", file("x.pth", lambda path: sparse(path, start=valid["legacy.pth"])))
  for seed in range(4 * number):
    yield case("false headers of safetensors", file("x.safetensors", false_header(random.Random(seed))))
  arrays = {"a": np.zeros(3), "b": np.asarray([{"an": "object"}, print], dtype=object)}
  stored = io.BytesIO()
  np.savez(stored, **{k: v for k, v in arrays.items() if k == "a"})
  objects = io.BytesIO()
  np.save(objects, np.asarray([{"an": "object"}, None], dtype=object), allow_pickle=True)
  for content in (stored.getvalue(), objects.getvalue()):
    for name in ("x.npz", "x.pth", "x.safetensors"):
      yield case("arrays of objects", file(name, content))
  for change in (_encrypted, _with_comment, _renamed_twice, _linked, _nested, _zip64, _streamed):
    yield case("tricks of zip", file("x.pth", change(valid["zip.pth"])))
  for name in ("zip.pth", "legacy.pth", "x.safetensors"):
    for packed in (gzip.compress(valid[name]), lzma.compress(valid[name])):
      yield case("packed once more", file(name, packed))
  for name in ("new\nline.pth", "\x1b[31m.pth", "a" * 200 + ".pth", b"\xff\xfe.pth".decode("utf8", "surrogateescape")):
    yield case("odd names", file(name, valid["zip.pth"][:-30]))
  for kind, make in STRANGE.items():
    yield case(f"--images: {kind}", _with_images(valid["zip.pth"], make), "--images", "images")


def _with_images(data, make):
  def write(folder):
    os.symlink(folder / "images", folder.parent / "out" / "images")
    for number in range(60):
      file(f"images/{number}.png", png(8, seed=number))(folder)
    file("images/0.jpg", make)(folder)
    return file("x.pth", data)(folder)

  return write


def false_header(rng: random.Random) -> bytes:
  """A safetensors file whose header says what its data are not."""
  keys, entries, at = ["l1.0.weight", "l1.0.bias", "conv_blocks0_0.running_mean"], {}, 0
  for key in keys:
    shape, end = [rng.choice((0, 1, 2, 8, 2**31, 2**62, -1)) for _ in range(rng.choice((0, 1, 2, 2, 9)))], at + 64
    entries[key] = {"dtype": rng.choice(("F32", "F32", "F16", "I8", "F4", "")), "shape": shape}
    entries[key]["data_offsets"] = [at, end]
    at = end
  broken = entries[rng.choice(keys)]
  trick = rng.randrange(9)
  if trick == 0:
    broken["data_offsets"] = broken["data_offsets"][::-1]
  elif trick == 1:
    broken["data_offsets"] = [0, 2**63]
  elif trick == 2:
    broken["data_offsets"] = [-4, 4]
  elif trick == 3:
    broken["data_offsets"] = "all"
  elif trick == 4:
    entries["__metadata__"] = {"format": ["pt"] * 10, "x": "y" * 10**6}
  elif trick == 5:
    broken["shape"] = 64
  elif trick == 6:
    del broken["dtype"]
  elif trick == 7:
    entries |= {f"more.{i}": {"dtype": "F32", "shape": [0], "data_offsets": [at, at]} for i in range(20_000)}
  text = json.dumps(entries).encode()
  length = rng.choice((len(text), len(text), len(text), len(text) - 1, 0, 2**40))
  return struct.pack("<Q", length) + text + bytes(rng.choice((at, at - 1, at + 1, 0)))


def _rezipped(data: bytes, change: Callable[[str, bytes], Iterator[tuple[Any, bytes]]]) -> bytes:
  packed = io.BytesIO()
  with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(packed, "w") as new:
    for name in old.namelist():
      for entry, content in change(name, old.read(name)):
        new.writestr(entry, content)
  return packed.getvalue()


def _encrypted(data: bytes) -> bytes:
  changed, at = bytearray(data), data.index(b"PK\x01\x02")
  changed[at + 8] |= 1
  return bytes(changed)


def _with_comment(data: bytes) -> bytes:
  packed = io.BytesIO(_rezipped(data, lambda name, content: [(name, content)]))
  with zipfile.ZipFile(packed, "a") as archive:
    archive.comment = b"PK\x05\x06" * 10_000
  return packed.getvalue()[:-7]


def _renamed_twice(data: bytes) -> bytes:
  import warnings

  with warnings.catch_warnings(action="ignore"):
    return _rezipped(data, lambda name, content: [(name, content)] * 2)


def _linked(data: bytes) -> bytes:
  def link(name, content):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    yield entry, b"/etc/passwd" if "data/" in name else content

  return _rezipped(data, link)


def _nested(data: bytes) -> bytes:
  return _rezipped(data, lambda name, content: [(name, data if "data/0" in name else content)])


def _zip64(data: bytes) -> bytes:
  changed, at = bytearray(data), data.index(b"PK\x01\x02")
  changed[at + 20 : at + 28] = b"\xff" * 8
  return bytes(changed)


def _streamed(data: bytes) -> bytes:
  return _rezipped(data, lambda name, content: [(f"archive/../{name}", content)])


# prepare: folders of images


def _chunk(kind: bytes, data: bytes) -> bytes:
  return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(side: int, seed: int = 0, mode: str = "RGB", **options: Any) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
  buffer = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(buffer, "PNG", **options)
  return buffer.getvalue()


def jpeg(side: int, mode: str = "RGB", **options: Any) -> bytes:
  buffer = io.BytesIO()
  Image.open(io.BytesIO(png(side))).convert(mode).save(buffer, "JPEG", **options)
  return buffer.getvalue()


def other_format(kind: str) -> bytes:
  buffer = io.BytesIO()
  Image.open(io.BytesIO(png(8))).save(buffer, kind)
  return buffer.getvalue()


def png_of(
  width: int, height: int, depth: int = 8, colour: int = 2, interlaced: int = 0, packed: bytes = zlib.compress(b"")
) -> bytes:
  """A PNG whose header says this, whatever its packed pixels are."""
  head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
  parts = _chunk(b"IHDR", head) + _chunk(b"IDAT", packed) + _chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + parts


def png_with(kind: bytes, data: bytes) -> bytes:
  """A small PNG with one more chunk."""
  whole = png(8)
  return whole[:33] + _chunk(kind, data) + whole[33:]


@functools.cache
def zlib_bomb(megabytes: int) -> bytes:
  packer = zlib.compressobj(1)
  return b"".join(packer.compress(bytes(2**20)) for _ in range(megabytes)) + packer.flush()


def jpeg_of(width: int, height: int) -> bytes:
  """A JPEG whose header says this, with the data of 8 x 8 pixels."""
  whole = bytearray(jpeg(8))
  at = whole.index(b"\xff\xc0")
  whole[at + 5 : at + 9] = struct.pack(">HH", height, width)
  return bytes(whole)


def images(folder: pathlib.Path, classes: tuple[str, ...] = ("aster", "rose"), side: int = 8) -> pathlib.Path:
  """A folder of images that can be prepared."""
  for split in ("train", "test"):
    for number, name in enumerate(classes):
      for i in range(2):
        file(f"{split}/{name}/{i}.png", png(side, seed=number + 2 * i))(folder)
  return folder


def whole_data(out: pathlib.Path) -> None:
  from cpsc_jax import datasets

  data = datasets.find("flowers", str(out / "d"))
  for split in (data.load_train("test"), data.load_evaluation("test")):
    assert split.images.dtype == np.uint8 and len(split) >= 4, len(split)
  assert sorted(path.name for path in (out / "d").iterdir()) == ["flowers"]


def picture_cases(number: int) -> Iterator[Case]:
  """Folders of images, one of which is not what it seems."""

  def case(kind, name, content, *flags):
    def write(source, out):
      path = images(source / "f") / "test" / "rose" / name
      if path.exists():
        path.unlink()
      file(path.name, content)(path.parent)
      return ["flowers", "--data_dir", out / "d", "--from", source / "f", *flags]

    return Case("prepare", f"image: {kind}", write, whole_data)

  sources = {"0.png": png(8), "0.jpg": jpeg(8, quality=90), "1.png": png(8, mode="P"), "1.jpg": jpeg(8, mode="CMYK")}
  for seed, (name, data) in enumerate(sources.items()):
    for kind, changed in damaged(data, number, seed):
      yield case(kind, name, changed)
  for kind, make in STRANGE.items():
    yield case(kind, "0.png", make)
    yield case(kind, "2.jpg", make)
  for width, height in ((2**31 - 1, 2**31 - 1), (60_000, 60_000), (10**6, 8), (8, 10**6), (0, 0), (8191, 8191)):
    for flags in ((), ("--image_size", 8)):
      yield case("false sizes", "0.png", png_of(width, height), *flags)
      yield case("false sizes", "0.png", png_of(width, height, interlaced=1), *flags)
      if max(width, height) < 2**16:
        yield case("false sizes", "0.jpg", jpeg_of(width, height), *flags)
  yield case("false sizes", "0.jpg", jpeg_of(65_535, 65_535))
  for side in (4_000, 8_000):
    for colour, each in ((0, 1), (2, 3), (6, 4)):

      def blank(path, side=side, colour=colour, each=each):
        content = zlib_bomb(-(-side * (side * each + 1) // 2**20))
        path.write_bytes(png_of(side, side, colour=colour, packed=content))

      yield case("large and blank", "0.png", blank, "--image_size", 8)
  for depth, colour in ((16, 0), (16, 2), (16, 4), (16, 6), (1, 0), (2, 0), (4, 0), (3, 3), (9, 9)):
    yield case("depths", "0.png", png_of(8, 8, depth, colour, packed=zlib.compress(bytes(8 * 200))))
  for kind in (b"zTXt", b"iTXt", b"iCCP"):
    middle = b"\x00\x01\x00\x00\x00" if kind == b"iTXt" else b"\x00\x00"

    def bomb(path, kind=kind, middle=middle):
      path.write_bytes(png_with(kind, b"x" + middle + zlib_bomb(1_500)))

    yield case("bombs in chunks", "0.png", bomb)
  yield case("bombs in chunks", "0.png", lambda path: path.write_bytes(png_of(8, 8) + zlib_bomb(100)))
  yield case("bombs in chunks", "0.png", png_with(b"tEXt", b"x\x00" + b"y" * 10**7))
  yield case("bombs in chunks", "0.png", png_with(b"eXIf", b"MM\x00\x2a\x00\x00\x00\x08\xff\xff" + bytes(1000)))
  yield case("bombs in chunks", "0.png", png_with(b"acTL", struct.pack(">II", 2**31 - 1, 0)))
  exif = b"Exif\x00\x00II\x2a\x00\x08\x00\x00\x00\x01\x00\x12\x01\x03\x00\x01\x00\x00\x00"
  for orientation in (0, 9, 255, 65535):
    yield case("false EXIF", "0.jpg", jpeg(8, exif=exif + struct.pack("<HHI", orientation, 0, 0)))
  for kind in ("GIF", "BMP", "TIFF", "WEBP", "ICO", "PPM", "PDF", "EPS", "TGA"):
    yield case("another format", "0.png", other_format(kind))
  for text in (
    b"<svg/>",
    b"%!PS\nsystem",
    b"<!DOCTYPE html>",
    b"push graphic-context",
    b"P7 332\n",
    b"\x89PNG\r\n\x1a\n",
  ):
    yield case("another format", "0.png", text)


def folder_cases() -> Iterator[Case]:
  """Folders that are not what is expected."""

  def case(kind, change, *flags):
    def write(source, out):
      change(images(source / "f"))
      return ["flowers", "--data_dir", out / "d", "--from", source / "f", *flags]

    return Case("prepare", kind, write)

  def classes(*names):
    def change(folder):
      shutil.rmtree(folder)
      images(folder, names)

    return change

  names = (
    *(("rose", "rose "), ("rose", "Rose"), ("rose", "ro\nse"), ("rose", " rose"), ("rose", "ro\u00a0se", "ro se")),
    *(("a", "\uff41"), ("e\u0301", "\u00e9"), ("a", "a\u200b"), ("a", "\x1b[2J"), ("a", "\u202etxt"), ("a", "a\tb")),
    *(("a", b"\xff".decode("utf8", "surrogateescape")), ("a", "a\r"), ("stra\u00dfe", "STRASSE")),
  )
  for pair in names:
    yield case("class names", classes(*pair))
  for kind, make in STRANGE.items():
    if kind != "a folder":
      yield case(f"class: {kind}", lambda folder, make=make: make(folder / "test" / "third"))

    def replace(folder, make=make):
      shutil.rmtree(folder / "train")
      make(folder / "train")

    yield case(f"split: {kind}", replace)
  yield case("links", lambda folder: (folder / "test" / "up").symlink_to(".."))
  yield case("links", lambda folder: [(folder / split / "again").symlink_to("..") for split in ("train", "test")])
  yield case("links", lambda folder: (folder / "test" / "rose" / "etc.png").symlink_to("/etc/passwd"))
  yield case("other files", lambda folder: (folder / "test" / "rose" / "x.zip").write_bytes(b"PK"))
  yield case("other files", lambda folder: (folder / "test" / "x.png").write_bytes(png(8)))
  for flags in (("--image_size", n) for n in (-1, 0, 4097, 10**9, 10**30)):
    yield case("--image_size", lambda folder: None, *flags)


# prepare: archives, made of few images that pass for CIFAR-10


def tar(path: pathlib.Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w:gz") -> None:
  with tarfile.open(path, mode) as archive:
    for info, data in members:
      archive.addfile(info, io.BytesIO(data))


def member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
  info = tarfile.TarInfo(name)
  info.size = len(data)
  for key, value in fields.items():
    setattr(info, key, value)
  return info, data


def gzip_bomb(path: pathlib.Path, head: bytes, megabytes: int, tail: bytes = b"") -> None:
  """A tar.gz of `head`, so many megabytes of zeros, and `tail`; the zeros are one packed piece, many times."""
  piece = gzip.compress(bytes(2**23), 9)
  with path.open("wb") as out:
    out.write(gzip.compress(head))
    for _ in range(megabytes // 8):
      out.write(piece)
    out.write(gzip.compress(tail + bytes(1024)))


def whole_cifar(out: pathlib.Path) -> None:
  from cpsc_jax import datasets

  data = datasets.find("cifar10", str(out / "d"))
  assert len(data.load_train("test")) == 100 and len(data.load_evaluation("test")) == 20


def archive_cases(files: dict[str, bytes], number: int) -> Iterator[Case]:
  """Archives in place of CIFAR-10's; `files` has the parts that pass for its own."""
  prefix = "cifar-10-batches-bin/"
  rows = [member(prefix + name, data) for name, data in files.items()]
  one = rows[0][0].name

  def case(kind, name, content):
    def write(source, out):
      return ["cifar10", "--data_dir", out / "d", "--from", file(name, content)(source)]

    return Case("prepare", f"archive: {kind}", write, whole_cifar)

  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as archive:
    for info, data in rows:
      archive.addfile(info, io.BytesIO(data))
  plain = buffer.getvalue()
  for kind, changed in damaged(gzip.compress(plain), number, 0):
    yield case(kind, "c.tar.gz", changed)
  for kind, changed in damaged(plain, number, 1):
    yield case(kind, "c.tar.gz", gzip.compress(changed, 1))
  zipped = io.BytesIO()
  with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
    for info, data in rows:
      archive.writestr(info.name, data)
  for kind, changed in damaged(zipped.getvalue(), number, 2):
    yield case(kind, "c.zip", changed)

  def tampered(*extra):
    return lambda path: tar(path, [*extra, *rows])

  for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
    for target in ("/etc/passwd", "../../../etc/passwd", "/dev/zero", one):
      yield case("links", "c.tar.gz", tampered(member(one, type=kind, linkname=target)))
      yield case(
        "links", "c.tar.gz", lambda path, k=kind, t=target: tar(path, [member(one, type=k, linkname=t), *rows[1:]])
      )
  for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE):
    yield case("devices and pipes", "c.tar.gz", lambda path, k=kind: tar(path, [member(one, type=k), *rows[1:]]))
  for name in (
    "/etc/evil",
    "../../evil",
    f"{prefix}../../evil",
    "C:\\evil",
    f"{prefix}{'a/' * 3000}b",
    f"{prefix}\x1b[2J",
  ):
    yield case("paths", "c.tar.gz", tampered(member(name, b"evil")))
  yield case("names twice", "c.tar.gz", tampered(member(one, b"other")))
  yield case("names twice", "c.tar.gz", lambda path: tar(path, [*rows, member(one, b"other")]))
  yield case("many members", "c.tar.gz", tampered(*(member(f"{prefix}{i}") for i in range(30_000))))

  def header(name, size, kind=b"0"):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)

  def bomb(head, megabytes):
    return lambda path: gzip_bomb(path, head, megabytes)

  size = 3_000 * 2**20
  for name in (one, f"{prefix}more", "elsewhere"):
    yield case("bombs", "c.tar.gz", bomb(header(name, size), 3_000))
  for kind in (b"x", b"g", b"L", b"K", b"X"):  # headers of headers, which tarfile reads whole
    yield case("bombs", "c.tar.gz", bomb(header("x", size, kind), 3_000))
  yield case("bombs", "c.tar.gz", bomb(b"", 3_000))
  yield case("bombs", "c.tar.xz", lambda path: path.write_bytes(lzma.compress(bytes(2**28), preset=0)))
  for name in ("c.tar", "c.tar.gz"):
    yield case("a terabyte of zeros", name, lambda path: sparse(path, start=header(one, 10**12)))
  for how in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
    yield case(
      "bombs of zip", "c.zip", lambda path, how=how: _zip_bomb(path, [r for r in rows if r[0].name != one], one, how)
    )
  for kind, make in STRANGE.items():
    yield case(kind, "c.tar.gz", make)
  for kind, make in STRANGE.items():

    def folder(path, make=make):
      for name, data in files.items():
        file(name, data)(path)
      (path / "data_batch_1.bin").unlink()
      make(path / "data_batch_1.bin")

    yield case(f"unpacked: {kind}", "c", folder)
  for kind, changed in damaged(files["batches.meta.txt"], number, 3):

    def edited(path, changed=changed):
      for name, data in {**files, "batches.meta.txt": changed}.items():
        file(name, data)(path)

    yield case(f"unpacked: {kind}", "c", edited)


def _zip_bomb(path, rows, name, how):
  with zipfile.ZipFile(path, "w", how) as archive:
    for info, data in rows:
      archive.writestr(info.name, data)
    with archive.open(name, "w", force_zip64=True) as entry:
      for _ in range(1_500 if how == zipfile.ZIP_DEFLATED else 300):
        entry.write(bytes(2**20))


# Cards and saved nets: resume (as a teacher), export and sample

VALUES = (
  *(
    None,
    True,
    -1,
    0,
    1,
    2**31,
    10**30,
    0.5,
    -0.0,
    1e300,
    "",
    "x",
    "\x1b[2J",
    "../../etc",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
  ),
  *([0.5] * 7, ["a", "b"], float("nan"), float("inf"), [float("nan")], [1e400], "a" * 5_000, [0.0]),
)
NAMES = (
  *(
    "wrn_1000000_1",
    "wrn_10_1000000",
    "wrn_16_1",
    "cifar_resnet8",
    "cifar_resnet6000002",
    "resnet18",
    "dcgan",
    "pixels",
  ),
  *("wrn_9" + "9" * 5_000 + "_1", "wrn_\u0661\u0660_1", "wrn_10_1\n", "cifar", "__class__", "wrn_10_0"),
)


def edits(card: dict, seed: int) -> Iterator[tuple[str, dict]]:
  """(kind, card): every key removed and set to values that it cannot have, or that are another net's."""
  rng = random.Random(seed)
  for key, value in card.items():
    yield "key removed", {k: v for k, v in card.items() if k != key}
    for bad in rng.sample([v for v in VALUES if v != value or type(v) is not type(value)], 6):
      yield "value changed", {**card, key: bad}
  for name in NAMES:
    if name != card["net"]:
      yield "name changed", {**card, "net": name}
  for key in ("mean", "std"):
    yield "value changed", {**card, key: [v + 1e-3 for v in card[key]]}


TEXTS = (b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * 100_000, b"\xff\xfe", b"\x00" * 100, b'"' + b"x" * 10**7)


def net_cases(command: str, runs: pathlib.Path, digits: str, smoke: str, number: int) -> Iterator[Case]:
  """The teacher or the generator of a finished run in `runs`, its card or its files changed.

  An edited card must be refused. A card that was also sealed anew is a forgery, which must lead to no harm.
  """
  name = "generator" if command == "sample" else "teacher"
  card = json.loads((runs / name / checkpoint.CARD).read_text())
  files = sorted(p.relative_to(runs / name) for p in (runs / name / "variables").rglob("*") if p.is_file())

  def case(kind, change, harmless=False):
    def write(source, out):
      net = source / name
      shutil.copytree(runs / name, net)
      change(net)
      return {
        "resume": [
          smoke,
          f"--workdir={out / 'w'}",
          f"--config.dataset.data_dir={digits}",
          f"--config.teacher.checkpoint={net}",
        ],
        "export": [net, "--out", out / "net.safetensors"],
        "sample": [net, "--out", out / "samples.npz", "--per_class", "2"],
      }[command]

    whole = {"resume": lambda out: None}.get(command, whole_output)  # a run is ended once it has its teacher
    return Case(command, kind, write, whole if harmless else None)

  def write_card(text):
    return lambda net: (net / checkpoint.CARD).write_bytes(text)

  for kind, edited in edits(card, len(command)):
    yield case(f"card: {kind}", write_card(json.dumps(edited).encode()))
    if checkpoint.SEAL in edited and edited[checkpoint.SEAL] == card[checkpoint.SEAL]:
      forged = json.dumps(checkpoint.sealed(edited)).encode()
      yield case(f"card: {kind}, sealed anew", write_card(forged), harmless=True)
  for kind, changed in damaged((runs / name / checkpoint.CARD).read_bytes(), number, 4):
    yield case(f"card: {kind}", write_card(changed))
  for text in TEXTS:
    yield case("card: no JSON of a card", write_card(text))
  for kind, make in STRANGE.items():

    def strange(net, make=make):
      (net / checkpoint.CARD).unlink()
      make(net / checkpoint.CARD)

    yield case(f"card: {kind}", strange)
  for seed, path in enumerate(files):
    for kind, change in DAMAGES.items():

      def spoil(net, path=path, change=change, seed=seed):
        data = (net / path).read_bytes()
        (net / path).write_bytes(change(random.Random(seed), data or b"x"))

      yield case(f"weights: {kind}", spoil, harmless=True)
    yield case("weights: file removed", lambda net, path=path: (net / path).unlink(), harmless=True)
    for kind, make in STRANGE.items():

      def replace(net, path=path, make=make):
        (net / path).unlink()
        make(net / path)

      yield case(f"weights: {kind}", replace, harmless=True)


def run_cases(command: str, runs: pathlib.Path, number: int) -> Iterator[Case]:
  """config.json and results.json of a finished run, changed."""

  def case(kind, which, text):
    def write(source, out):
      shutil.copytree(runs, source / "w", ignore=shutil.ignore_patterns("checkpoints", "events", "*.png", "teacher_*"))
      (source / "w" / which).write_bytes(text)
      return [source / "w", "--out", out / ("net.safetensors" if command == "export" else "samples.npz")]

    return Case(command, f"{which}: {kind}", write, whole_output)

  config = json.loads((runs / "config.json").read_text())
  for key in ("name", "arm", "teacher", "generator"):
    yield case("key removed", "config.json", json.dumps({k: v for k, v in config.items() if k != key}).encode())
    for bad in VALUES[::4]:
      yield case("value changed", "config.json", json.dumps({**config, key: bad}).encode())
  for which in ("config.json", "results.json"):
    for text in TEXTS:
      yield case("no JSON", which, text)
    for kind, changed in damaged((runs / which).read_bytes(), number, 5):
      yield case(kind, which, changed)


def whole_output(out: pathlib.Path) -> None:
  from safetensors.numpy import load_file

  (path,) = out.iterdir()
  content = load_file(path) if path.suffix == ".safetensors" else dict(np.load(path, allow_pickle=False))
  assert all(np.isfinite(array).all() for array in content.values())
