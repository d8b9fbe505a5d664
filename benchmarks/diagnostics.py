"""What diagnoses cost at a config's cadence, as a share of the epochs that they cover, alternating in one process.

  python -m benchmarks.diagnostics [--config digits --config cifar10:cpu] [--rounds 5] [--epochs 2] [--out FILE.json]
    [--config.KEY=VALUE ...]

Of each config, with a teacher and test images at random, since only time is asked for: a round is some epochs of the
student, an evaluation, and a diagnosis with its arrays on the host and in their file, each timed. `share` is the median
over rounds of the seconds of a diagnosis over those of evaluate.diagnostics_every epochs with their evaluations; GOAL
is what it may be. A first round compiles; its seconds are written down, and not counted. The page, which a thread
writes beside the training, is left out.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.command import flags_of_runs, report
from cpsc_jax import checkpoint, datasets, nets, run, streams
from cpsc_jax.environment import hardware
from cpsc_jax.errors import Refusal
from cpsc_jax.main import parse
from cpsc_jax.mesh import make_mesh, replicate
from cpsc_jax.streams import Stream
from cpsc_jax.teach import Teacher

GOAL = 0.05


def data_like(spec: datasets.Dataset) -> datasets.Data:
  """Random test images (N, H, W, K) of a data set's size, with its classes in turn."""
  number = spec.sizes[spec.test_split]
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (number, *spec.image_shape), dtype=np.uint8)
  return datasets.InMemory(spec, images, np.arange(number) % spec.num_classes, name="random")


def teacher_like(name: str, spec: datasets.Dataset) -> Teacher:
  """A teacher of random weights; `name` is its net's."""
  net = nets.classifier(name, spec.num_classes)
  variables = nets.init(net, streams.key(streams.root(0), Stream.TEACHER), jnp.zeros((2, *spec.image_shape)))
  card = {key: getattr(spec, key) for key in ("num_classes", "image_size", "channels")}
  card |= {"net": name, "mean": list(spec.mean), "std": list(spec.std), "digest": checkpoint.digest(variables)}
  return Teacher(net, replicate(variables, make_mesh()), card)


@contextlib.contextmanager
def ready(flags: Sequence[str]) -> Iterator[run.Begun]:
  """The run of these flags, about to train, on random images with a random teacher, in a folder of its own."""
  c, *_ = parse(["benchmarks.diagnostics", *flags])
  if c.dataset.name not in datasets.DATASETS:
    raise Refusal(f"config.dataset.name is '{c.dataset.name}'; choose one of {', '.join(datasets.DATASETS)}.")
  if not c.evaluate.diagnostics_every:
    raise Refusal(
      "config.evaluate.diagnostics_every is 0, so that there are no diagnoses to time; set it to 1 or more."
    )
  data = data_like(datasets.DATASETS[c.dataset.name])
  given = teacher_like(c.teacher.net, data.spec)
  c.teacher.checkpoint, c.evaluate.split = "random", "test"
  c, card = run.resolved(c, data, given)
  with tempfile.TemporaryDirectory() as folder, run.begun(c, None, make_mesh(), data, given, card) as begun:
    results = {"class_names": data.class_names()}
    with run.record.journal(pathlib.Path(folder), results, begun.setup, data.spec.num_classes, False) as journal:
      yield dataclasses.replace(begun, plan=dataclasses.replace(begun.plan, journal=journal))


def seconds(function: Callable[..., Any], *inputs: Any) -> tuple[float, Any]:
  """(the time of a call and of everything that it computes, what it returns)."""
  began = time.perf_counter()
  found = jax.block_until_ready(function(*inputs))
  return time.perf_counter() - began, found


def diagnosed(begun: run.Begun, state: Any, epoch: int) -> dict:
  """A diagnosis as the training loop has it: its arrays on the host and in a file."""
  arrays = jax.device_get(begun.plan.diagnose(state, epoch))
  begun.plan.journal([{"epoch": epoch, "terms": {}, "totals": {}}], arrays)
  return arrays


def share_of(diagnosis: float, epoch: float, evaluation: float, cadence: int, every: int) -> float:
  """The seconds of a diagnosis over those of the `cadence` epochs that it covers and their evaluations, all in seconds.

  Args:
    cadence: epochs from one diagnosis to the next.
    every: epochs from one evaluation to the next.
  """
  return diagnosis / (cadence * epoch + cadence / every * evaluation)


def measure(flags: Sequence[str], rounds: int, epochs: int) -> dict:
  """Carries out all rounds of one config; returns what the benchmark reports of it."""
  found: dict[str, list[float]] = {"epoch": [], "evaluation": [], "diagnosis": [], "share": []}
  first: dict[str, float] = {}
  with ready(flags) as begun:
    evaluate, state = begun.config.evaluate, jax.tree.map(jnp.copy, begun.state)
    for number in range(rounds + 1):
      parts = {"epoch": 0.0}
      for _ in range(epochs):
        taken, (state, _) = seconds(begun.plan.epoch, state)
        parts["epoch"] += taken / epochs
      parts["evaluation"], _ = seconds(begun.plan.measure, state)
      parts["diagnosis"], _ = seconds(diagnosed, begun, state, number)
      if not number:
        first = parts
        continue
      parts["share"] = share_of(**parts, cadence=evaluate.diagnostics_every, every=evaluate.every)
      for name, value in parts.items():
        found[name].append(value)
      print(f"{begun.config.name}, round {number}: a diagnosis takes {parts['share']:.1%} of its epochs", flush=True)
    return {
      "config": begun.config.name,
      "flags": list(flags),
      "diagnostics_every": evaluate.diagnostics_every,
      "gradients": evaluate.gradients,
      "seconds": found,
      "first": first,
      "share": statistics.median(found["share"]),
      "goal": GOAL,
    }


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.diagnostics", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  parser.add_argument("--config", action="append", help="one or several (default: digits and cifar10:cpu)")
  parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
  parser.add_argument("--epochs", type=int, default=2, help="timed in a round (default: %(default)s)")
  parser.add_argument("--out", type=pathlib.Path, help="a file for the numbers")
  options, rest = parser.parse_known_args(argv)
  try:
    rest = flags_of_runs(rest)
    for name in ("rounds", "epochs"):
      if getattr(options, name) < 1:
        raise Refusal(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    configs = options.config or ["digits", "cifar10:cpu"]
    rows = [measure([f"--config={config}", *rest], options.rounds, options.epochs) for config in configs]
  except Refusal as refusal:
    print(f"benchmarks.diagnostics: {refusal}", file=sys.stderr)
    return 2
  report({"rows": rows, "hardware": hardware()}, options.out)
  return 0


if __name__ == "__main__":
  sys.exit(main())
