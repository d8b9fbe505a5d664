"""Checksums of files, as `sha256sum --check` reads them: of a checkpoint, and of what a finished run leaves."""

import hashlib
import pathlib
from collections.abc import Collection, Mapping

from cpsc_jax.errors import Refusal, first_line

NAME = "files.sha256"


def write(folder: pathlib.Path, files: Mapping[str, pathlib.Path]) -> None:
  """Writes the sha256 of files, {name relative to `folder`: where it is now}, to the file NAME there."""
  lines = [f"{_sha256(path)}  {name}\n" for name, path in sorted(files.items())]
  scratch = folder / f"{NAME}.partial"
  scratch.write_text("".join(lines))
  scratch.replace(folder / NAME)


def verify(folder: pathlib.Path, names: Collection[str] | None = None) -> str | None:
  """What differs between files in `folder` and their checksums, in words; None if nothing does.

  Args:
    names: all files that there are; None: those whose checksums were written, whatever else is there.

  Raises:
    OSError: a file is there but cannot be read, which does not say that it is damaged.
  """
  try:
    want = dict(reversed(line.split("  ", 1)) for line in (folder / NAME).read_text().split("\n")[:-1])
    there = [name for name in want if (folder / name).exists()] if names is None else names
    have = {name: _sha256(folder / name) for name in there}
  except (FileNotFoundError, ValueError) as error:
    return f"{NAME}: {first_line(error)}"
  differ = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
  listed = ", ".join(differ[:3]) + (f" and {len(differ) - 3} more" if len(differ) > 3 else "")
  return f"not as in {NAME}: {listed}" if differ else None


def check_finished(workdir: pathlib.Path) -> None:
  """Raises a Refusal that names the files of a finished run that are not as it left them.

  A run of an earlier version, which wrote no checksums, passes.
  """
  damage = verify(workdir) if (workdir / NAME).exists() else None
  if damage:
    raise Refusal(
      f"{workdir} is finished, but was changed since ({damage}); restore that, or delete {workdir / 'results.json'} and"
      " repeat the command of the run, which makes its files again without training."
    )


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
