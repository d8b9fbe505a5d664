"""Compiles the program that training runs for TPUs that are not present, and estimates what it takes there.

  python launch/aot.py --config configs/cifar100.py --topology v5e:4x4 [--config.schedule.batch_size=1024 ...]
  python launch/aot.py --config configs/cifar100.py --sweep v5e:1x1,v5e:2x2,v5e:4x4,v5e:16x16 --json aot.json

Needs pip install libtpu==0.0.51 with jax 0.10.2, and takes minutes per topology. What is compiled is one epoch of the
distillation, cpsc_jax.algorithm.compile_epoch of the config's setup, as cpsc_jax.run calls it; training a teacher and
measuring are not in it. Times are a roofline: the largest of compute, memory and interconnect time at the chip's
published peaks, so a run takes at least that long. `--dry-run` prints what would be compiled.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

# So that libtpu neither looks for TPUs nor locks them; must be set before jax is imported.
os.environ.update(
  JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost", ALLOW_MULTIPLE_LIBTPU_LOAD="1"
)
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")

import jax
import ml_collections
from hlo_cost import program_cost
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from cpsc_jax import algorithm, datasets, experiment, initial, main, mesh, nets, streams, teach
from cpsc_jax import config as configs
from cpsc_jax.errors import Refusal
from cpsc_jax.streams import Stream

HOP_SECONDS = 1e-6  # of a message to the neighbouring chip


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peaks of one chip as Google Cloud's pages on its TPU versions state them.

  Attributes:
    hbm: bytes of memory. flops: bfloat16 FLOP/s, at which float32 products run too, by JAX's default precision.
    bandwidth: bytes/s of HBM. link: bytes/s of one interconnect link in one direction. ring: an axis of the slice
      that is a multiple of this many chips closes to a ring.
  """

  hbm: float
  flops: float
  bandwidth: float
  link: float
  ring: int
  options: dict = dataclasses.field(default_factory=dict)


CHIPS = {
  "v4": Chip(32 * 2**30, 275e12, 1.2e12, 50e9, 4, {"chip_config_name": "megacore"}),
  "v5e": Chip(16 * 2**30, 197e12, 0.82e12, 50e9, 16),
  "v5p": Chip(95 * 2**30, 459e12, 2.76e12, 100e9, 4),
  "v6e": Chip(32 * 2**30, 918e12, 1.64e12, 100e9, 16),
}


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
  """(this program's flags, the config) of a command line; raises a Refusal for a topology that cannot be read."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument("--topology", help="such as v5e:4x4; chips: " + ", ".join(CHIPS))
  where.add_argument("--sweep", help="several, comma-separated; shows how well they scale")
  parser.add_argument("--json", metavar="FILE", help="write the figures there too")
  parser.add_argument("--hlo", metavar="FOLDER", help="keep the text of the compiled programs there")
  parser.add_argument("--dry-run", action="store_true", help="print what would be compiled, and compile nothing")
  options, rest = parser.parse_known_args(argv)
  config, _ = main.parse(["aot", *rest])
  options.topologies = (options.topology or options.sweep).split(",")
  for name in options.topologies:
    if not re.fullmatch(rf"({'|'.join(CHIPS)}):\d+(x\d+)+", name):
      raise Refusal(f"cannot read topology '{name}'; give one such as v5e:4x4, with a chip of {', '.join(CHIPS)}.")
  return options, config


def devices_of(topology: str) -> Sequence[jax.Device]:
  """The devices of a slice, which are not present.

  Raises:
    Refusal: libtpu is missing or does not support such a slice.
  """
  chip = CHIPS[topology.split(":")[0]]
  try:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology, **chip.options).devices
  except Exception as error:  # plugins raise various types
    raise Refusal(
      f"libtpu cannot describe {topology} ({str(error).splitlines()[0][:200]}); pip install libtpu==0.0.51 with jax"
      " 0.10.2, and name a slice that exists."
    ) from error


def lower(
  config: configs.Config, devices: Sequence[jax.Device]
) -> tuple[jax.stages.Lowered, ml_collections.FrozenConfigDict]:
  """The epoch program of a config, lowered for `devices`, and its resolved config.

  Raises:
    Refusal: the config does not fit itself or the devices.
  """
  grid, data = mesh.make_mesh(devices), datasets.find(config.dataset.name, config.dataset.data_dir)
  spec, card = data.spec, teach.describe_teacher(config, data)
  config = ml_collections.ConfigDict(config.to_dict())
  config.teacher.checkpoint = config.teacher.checkpoint or "some folder"  # no teacher is trained here
  config = configs.resolve(config, spec, grid, nets.classifier(card["net"], spec.num_classes))
  teacher_net = experiment.build_teacher(config, card)
  setup = experiment.build(config, spec, teacher_net, card, grid)

  def shapes() -> tuple[Any, Any]:
    key = streams.key(streams.root(config.seed), Stream.DISTILLATION)
    teacher = nets.init(teacher_net, key, jax.numpy.zeros((2, *spec.image_shape)))
    return initial.state(setup, key, spec.image_shape), teacher

  state, teacher = jax.eval_shape(shapes)
  state, teacher = placed(state, initial.shardings(setup)), placed(teacher, mesh.replicated(grid))
  return algorithm.compile_epoch(setup, config.schedule.iterations).lower(state, teacher), config


def placed(shapes: Any, shardings: Any) -> Any:
  """A tree of shapes as arrays would be placed by a prefix tree of shardings."""

  def place(sharding: jax.sharding.Sharding, part: Any) -> Any:
    return jax.tree.map(lambda shape: shape.update(sharding=sharding), part)

  return jax.tree.map(place, shardings, shapes)


def measure(config: ml_collections.ConfigDict, topology: str, hlo_folder: str | None = None) -> dict[str, Any]:
  """What the epoch program of `config` takes on `topology`: a row of the table, as a dict.

  Raises:
    Refusal: see `devices_of` and `lower`.
  """
  chip, devices = CHIPS[topology.split(":")[0]], devices_of(topology)
  row = {"topology": topology, "chips": len(devices), "batch_size": config.schedule.batch_size}
  lowered, config = lower(config, devices)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    return {**row, "fits": False, "missing_bytes": missing(error)}
  text = compiled.as_text()
  if hlo_folder:
    os.makedirs(hlo_folder, exist_ok=True)
    with open(os.path.join(hlo_folder, topology.replace(":", "_") + ".txt"), "w") as file:
      file.write(text)
  memory = compiled.memory_analysis()
  cost = program_cost(text)
  kinds = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "program": memory.generated_code_size_in_bytes,
  }
  bandwidth, hops = interconnect(topology, chip)
  count, size = (sum(values) for values in zip((0, 0), *cost.collectives.values(), strict=True))
  # An all-reduce sends everything twice, other collectives once; each passes all hops.
  passes = {kind: 2 if kind == "all-reduce" else 1 for kind in cost.collectives}
  seconds = {
    "compute": cost.flops / chip.flops,
    "memory": cost.traffic / chip.bandwidth,
    "interconnect": sum(
      passes[kind] * (number * hops * HOP_SECONDS + volume / bandwidth)
      for kind, (number, volume) in cost.collectives.items()
    )
    if len(devices) > 1
    else 0.0,
  }
  binds = max(seconds, key=seconds.get)
  hours = seconds[binds] * config.schedule.epochs / 3600
  return {
    **row,
    "fits": True,
    "memory_bytes": {**kinds, "total": sum(kinds.values()), "of": chip.hbm},
    "per_epoch_and_chip": {"flops": cost.flops, "hbm_bytes": cost.traffic, "collectives": count, "sent_bytes": size},
    "collectives": {kind: {"count": n, "bytes": b} for kind, (n, b) in cost.collectives.items()},
    "roofline_seconds_per_epoch": {**seconds, "total": seconds[binds]},
    "binds": binds,
    "epochs": config.schedule.epochs,
    "hours": hours,
    "chip_hours": hours * len(devices),
  }


def interconnect(topology: str, chip: Chip) -> tuple[float, int]:
  """(bytes/s that a chip can send over all its links, hops to the farthest chip) of a slice.

  A ring sends both ways, an open row one way at a time.
  """
  sides = [int(n) for n in topology.split(":")[1].split("x") if int(n) > 1]
  rings = {side: side % chip.ring == 0 for side in sides}
  bandwidth = sum(chip.link * (2 if rings[side] else 1) for side in sides)
  return bandwidth or math.inf, sum(side // 2 if rings[side] else side - 1 for side in sides)


def missing(error: jax.errors.JaxRuntimeError) -> float:
  """By how many bytes a program is too large, from the compiler's message; other errors are raised again."""
  size = r"([\d.]+[KMGT]?)"
  if found := re.search(rf"Exceeded hbm capacity by {size}", str(error)):
    return in_bytes(found.group(1))
  if found := re.search(rf"\({size}\) exceeds available HBM \({size}\)", str(error)):
    return in_bytes(found.group(1)) - in_bytes(found.group(2))
  raise error


def in_bytes(text: str) -> float:
  """A size as the compiler prints it, such as 1.5G."""
  return float(text.rstrip("KMGT")) * 1024 ** " KMGT".index(text[-1] if text[-1] in "KMGT" else " ")


def print_table(rows: Sequence[dict[str, Any]], console: Console) -> None:
  table = Table(title_justify="left")
  columns = ("slice", "chips", "batch", "memory GiB", "TFLOP", "HBM GB", "collectives", "sent GB")
  seconds = ("compute s", "memory s", "network s", "binds", "hours", "chip-hours", "efficiency")
  for column in (*columns, *seconds):
    table.add_column(column, justify="left" if column in ("slice", "binds") else "right")
  fitting = [row for row in rows if row["fits"]]
  for row in rows:
    head = (row["topology"], str(row["chips"]), str(row["batch_size"]))
    if not row["fits"]:
      table.add_row(*head, f"{row['missing_bytes'] / 2**30:.1f} too much")
      continue
    each, time, memory = row["per_epoch_and_chip"], row["roofline_seconds_per_epoch"], row["memory_bytes"]
    table.add_row(
      *head,
      f"{memory['total'] / 2**30:.2f} of {memory['of'] / 2**30:.0f}",
      f"{each['flops'] / 1e12:.1f}",
      f"{each['hbm_bytes'] / 1e9:.0f}",
      f"{each['collectives']:,}",
      f"{each['sent_bytes'] / 1e9:.2f}",
      *(f"{time[part]:.2f}" for part in ("compute", "memory", "interconnect")),
      row["binds"],
      f"{row['hours']:.2f}",
      f"{row['chip_hours']:.1f}",
      f"{fitting[0]['chip_hours'] / row['chip_hours']:.2f}",
    )
  console.print(table)
  for row in fitting:
    parts = ", ".join(f"{kind} {size / 2**20:.0f}" for kind, size in row["memory_bytes"].items() if kind != "of")
    sent = ", ".join(f"{n['count']:,} x {kind} {n['bytes'] / 1e9:.2f} GB" for kind, n in row["collectives"].items())
    console.print(f"{row['topology']}: memory MiB: {parts}; collectives per epoch: {sent or 'none'}")
  console.print("TFLOP to network s: per epoch and chip. hours, chip-hours: of the whole schedule.")
  console.print("efficiency: chip-hours of the first slice divided by those of this one")


def run(argv: Sequence[str] | None = None) -> int:
  """Parses flags, compiles, prints the table; returns the exit code: 1 if a program does not fit."""
  try:
    options, config = parse(argv)
    if options.dry_run:
      for topology in options.topologies:
        print(f"would compile one epoch of {config.name} for {topology}, global batch {config.schedule.batch_size}")
      return 0
    rows = [measure(config, topology, options.hlo) for topology in options.topologies]
  except Refusal as refusal:
    print(f"aot: {refusal}", file=sys.stderr)
    return refusal.exit_code
  print_table(rows, Console(width=None if Console().is_terminal else 180))
  if options.json:
    with open(options.json, "w") as file:
      json.dump(rows, file, indent=2)
  for row in rows:
    if not row["fits"]:
      print(
        f"aot: {row['topology']}: a global batch of {row['batch_size']} exceeds the memory of a chip by"
        f" {row['missing_bytes'] / 2**30:.2f} GiB; use more chips or a smaller config.schedule.batch_size.",
        file=sys.stderr,
      )
  return 0 if all(row["fits"] for row in rows) else 1


if __name__ == "__main__":
  sys.exit(run())
