"""What the commands of this folder share."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from cpsc_jax.errors import Refusal
from cpsc_jax.record import write_whole


def flags_of_runs(rest: Sequence[str]) -> list[str]:
  """What a command does not know itself, which are flags of the runs that it starts.

  Raises:
    Refusal: one of them is none.
  """
  if wrong := [flag for flag in rest if not flag.startswith("--config.")]:
    raise Refusal(f"{wrong[0]} is not an option; flags of every run are written as --config.KEY=VALUE.")
  return list(rest)


def report(found: dict[str, Any], out: pathlib.Path | None) -> None:
  """Prints what was measured as JSON, and writes it into a file if one is given."""
  text = json.dumps(found, indent=2)
  print(text)
  if out:
    write_whole(out, (text + "\n").encode())
