"""What a run would do: read, compute, need and write; nothing is read but cards and nothing is written."""

import pathlib
import time
from typing import Any

import jax
import ml_collections

from cpsc_jax import algorithm, checkpoint, config, datasets, experiment, nets, record, schema, streams, tasks, teach
from cpsc_jax.mesh import device_memory, make_mesh
from cpsc_jax.setup import Setup
from cpsc_jax.state import Tree
from cpsc_jax.streams import Stream
from cpsc_jax.tasks import incremental

MIB = 2**20


def text(c: config.Config, workdir: pathlib.Path) -> str:
  """A few lines for people. One iteration is compiled and carried out twice on random weights, for time and memory.

  Raises:
    Refusal: as a run of this config would, before its work.
  """
  mesh, data = make_mesh(), datasets.find(c.dataset.name, c.dataset.data_dir)
  if tasks.of(c).in_phases:
    c = config.resolve(c, data.spec, mesh)
    return "\n".join([*_about(c, data, workdir), "", *_phases(c, data)])
  card = teach.describe_teacher(c, data)
  c = tasks.of(c).of_teacher(c, card)
  c = config.resolve(c, data.spec, mesh, nets.classifier(card["net"], card["num_classes"]))
  lines = _about(c, data, workdir)
  net = experiment.build_teacher(c, card)
  setup = experiment.build(_without_warmup(c), data.spec, net, card, mesh)
  image = jax.numpy.zeros((2, *data.spec.image_shape))
  variables = nets.init(net, streams.key(streams.root(c.seed), Stream.STUDENT_INIT), image)
  lines += ["", f"teacher    {card['net']}, {_count(variables):,} parameters"]
  lines += [f"student    {c.student.net}, {_count(nets.init(setup.student.net, streams.root(0), image)):,} parameters"]
  if c.arm in schema.REAL_ARMS:
    return "\n".join([*lines, f"the time and memory of arm '{c.arm}' are not estimated"])
  state = experiment.initial_state(c, setup, streams.root(c.seed), data.spec.image_shape, variables)
  lines += (
    [f"generator  {c.generator.net}, {_count(state.generator.variables):,} parameters"] if state.generator else []
  )
  return "\n".join([*lines, "", *_needs(c, setup, state, variables)])


def _about(c: config.Config, data: datasets.Data, workdir: pathlib.Path) -> list[str]:
  """What differs from the default, and what is read and written."""
  finished = record.earlier_results(workdir, c)
  changed = {
    name: value
    for name, value in schema.flatten(c)
    if name not in schema.KEYS or value != schema.KEYS[name].default and name != "name"
  }
  lines = [f"config {c.name}, in which differ from the default:"]
  lines += [f"  {name} = {value!r}" for name, value in sorted(changed.items())] or ["  nothing"]
  lines += ["", *(f"reads   {what}" for what in _reads(c, data))]
  return [*lines, f"writes  {workdir}, {_state_of(workdir, c, finished)}"]


def _phases(c: config.Config, data: datasets.Data) -> list[str]:
  """The phases of class-incremental learning."""
  names, order = data.class_names(), incremental.class_order(c, data.spec.num_classes)
  lines, end = [], 0
  for number, size in enumerate(incremental.sizes(c, data.spec.num_classes), 1):
    new = ", ".join(names[each] for each in order[end : end + size])
    trains = (
      f"trains {c.teacher.net} for {c.teacher.epochs} epochs on" if end == 0 else f"{c.schedule.epochs} epochs on"
    )
    if end == 0 and c.teacher.checkpoint:
      trains = f"is the network in {c.teacher.checkpoint}, of"
    lines.append(f"phase {number}  {trains} {new}" + (f", with arm '{c.arm}' for {end} old classes" if end else ""))
    end += size
  return [*lines, "the time and memory of phases are not estimated"]


def _without_warmup(c: config.Config) -> config.Config:
  """The config with a student that learns from the first iteration on, which is the one that is measured."""
  c = ml_collections.ConfigDict(c.to_dict())
  if "episodes" in c:
    c.episodes.warmup = 0
  c.generator.warmup_epochs = 0
  return c


def _count(variables: Tree) -> int:
  return nets.count_parameters(variables["params"])


def _reads(c: config.Config, data: datasets.Data) -> list[str]:
  sizes = ", ".join(f"{split} {number:,}" for split, number in data.spec.sizes.items())
  place = f" in {c.dataset.data_dir}" if c.dataset.data_dir else ""
  shape = f"{data.spec.image_size} x {data.spec.image_size} x {data.spec.channels}"
  lines = [f"data set {c.dataset.name}{place}: {sizes} images of {shape}, {data.spec.num_classes} classes"]
  if c.teacher.checkpoint:
    card = checkpoint.read_card(c.teacher.checkpoint)
    return [*lines, f"teacher {c.teacher.checkpoint}: {card['net']}, digest {card['digest'][:16]}"]
  return [*lines, f"no teacher: trains {c.teacher.net} for {c.teacher.epochs} epochs first"]


def _state_of(workdir: pathlib.Path, c: config.Config, finished: dict | None) -> str:
  if finished:
    return "in which this run is finished"
  if not workdir.exists():
    return "which is new"
  steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
  return f"which goes on after epoch {max(steps)} of {c.schedule.epochs}" if steps else "which has no checkpoint yet"


def _needs(c: config.Config, setup: Setup, state: Any, teacher: Tree) -> list[str]:
  """Time and memory of the distillation, from one iteration."""
  program = algorithm.compile_epoch(setup, 1)
  began = time.monotonic()
  compiled = program.lower(state, teacher).compile()
  seconds = time.monotonic() - began
  memory = compiled.memory_analysis()
  # Arguments are donated, so that results lie in their place.
  needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  iterations = c.schedule.epochs * c.schedule.iterations
  state, _ = jax.block_until_ready(compiled(state, teacher))
  began = time.monotonic()
  jax.block_until_ready(compiled(state, teacher))
  each = time.monotonic() - began
  device, there = jax.devices()[0], device_memory()
  lines = [
    f"memory     {needed / MIB:,.0f} MiB on each of {jax.device_count()} x {device.device_kind.lower()}"
    + (f", which has {there / MIB:,.0f} MiB" if there else ""),
    f"time       {each * 1000:.0f} ms an iteration, {iterations:,} iterations: {_duration(each * iterations)} and"
    f" {seconds:.0f} s of compiling, without evaluation"
    + ("" if c.teacher.checkpoint else " and the teacher's training"),
  ]
  if there and needed > there:
    lines.append(
      "THIS DOES NOT FIT: make schedule.batch_size or pool.size smaller, or use more devices (docs/scaling.md)."
    )
  return lines


def _duration(seconds: float) -> str:
  minutes, hours = seconds / 60, seconds / 3600
  return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
