"""What the commands of this folder share."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from cpsc_jax import config, datasets, experiment
from cpsc_jax.errors import Refusal
from cpsc_jax.record import write_whole
from cpsc_jax.setup import Setup


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


def built(given: config.Config, spec: datasets.Dataset, devices: jax.sharding.Mesh) -> tuple[config.Config, Setup]:
  """A config resolved on these devices, and what a run would build of it; the teacher is that of the config's name."""
  c = config.resolve(given, spec, devices)
  card = {"net": c.teacher.net, "num_classes": spec.num_classes, "mean": spec.mean, "std": spec.std}
  return c, experiment.build(c, spec, experiment.build_teacher(c, card), card, devices)
