"""What to run first on a GPU, in one call: is it right, and how fast is it.

  python -m benchmarks.gpu --out FILE.json [--budget 9m] [--pairs wrn_40_2:wrn_16_2] [--methods cpsc,fast] [--toy]

1. Speed of both pairs against PyTorch with its autocast (benchmarks/speed.py), in bfloat16 at batch 512.
2. One iteration of three steps of each player, for every method and for quantisation, on the accelerator and on the CPU
   of the same machine, from the same weights and random numbers: losses and what became of the student, in float32 with
   exact products, and in bfloat16 against float32.

FILE is written again after each part, so that a call that is cut short leaves what it measured. Nothing is begun after
the budget. --pairs= leaves speed out, and --methods= the methods, which may be compared beside other work. --toy is the
same path with small nets and batches, for a rehearsal on a CPU.
"""

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import speed
from benchmarks.command import built
from benchmarks.plan import seconds_of
from cpsc_jax import algorithm, datasets, initial, mesh, nets, tasks
from cpsc_jax.main import parse
from cpsc_jax.methods import METHODS
from cpsc_jax.record import write_whole

PAIRS, TOY_PAIRS = "wrn_40_2:wrn_16_2,resnet34:resnet18", "wrn_10_1:wrn_10_1"
STEPS = 3  # of each player
QUANTISE = "quantise"  # a task, checked as the methods are
# The largest relative difference in float32 and in bfloat16 of first losses, before anything has moved; of all losses,
# where rounding has been through Adam; and of the student's change.
LIMITS = {"first": (1e-3, 0.05), "all": (0.05, 0.5), "student": (0.05, 0.5)}


def differences(method: str, batch: int) -> dict[str, dict[str, float]]:
  """How far an iteration on the first device is from the CPU's, relative to that, by precision."""
  with jax.default_matmul_precision("highest"):
    wanted = iterate(method, batch, jax.devices("cpu")[0], "float32")
    exact = iterate(method, batch, jax.devices()[0], "float32")
  return {
    "float32": compare(exact, wanted),
    "bfloat16": compare(iterate(method, batch, jax.devices()[0], "bfloat16"), wanted),
  }


def compare(found: tuple[dict, Any], wanted: tuple[dict, Any]) -> dict[str, float]:
  """The largest relative differences of first losses and of all, and that of the student's change."""
  ours, theirs = (np.stack(list(losses.values())) for losses, _ in (found, wanted))
  apart = np.abs(ours - theirs) / np.abs(theirs)
  change, right = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]) for _, tree in (found, wanted))
  student = np.linalg.norm(change - right) / np.linalg.norm(right)
  return {"first": float(apart[:, 0].max()), "all": float(apart.max()), "student": float(student)}


def iterate(method: str, batch: int, device: jax.Device, precision: str) -> tuple[dict[str, np.ndarray], Any]:
  """({player: its losses (STEPS,)}, change of the student's parameters) in one iteration on one device."""
  name = {"cpsc": "cifar10:cpu", QUANTISE: "quantise_cifar10"}.get(method, f"{method}_cifar10:cpu")
  c, _ = parse(["gpu", f"--config={name}"])
  with c.unlocked():
    if method == QUANTISE:  # an iteration that calibrates, and then one that is compared
      c.generator.warmup_epochs, c.quantise.calibration = 0, 1
      c.schedule.iterations, c.evaluate.every = 1, 1
    c.precision, c.schedule.batch_size, c.pool.batch_size, c.pool.size = precision, batch, batch, 4 * batch
    c.teacher.net = c.student.net = "wrn_10_1"
    c.student.inherit, c.loss.ikd_form, c.generator.width = False, "mse", 8
    c.generator.steps = c.student.steps = STEPS
    if "views" in c.loss:
      c.pool.bank, c.loss.views.negatives = 4 * batch, batch
    if "episodes" in c:
      c.episodes.warmup = 0
  spec, devices = datasets.DATASETS["cifar10"], mesh.make_mesh([device])
  with jax.default_device(jax.devices("cpu")[0]):
    c, setup = built(c, spec, devices)
    teacher = nets.init(setup.teacher, jax.random.key(1), jnp.zeros((2, *spec.image_shape)))
    state = initial.state(setup, jax.random.key(0), spec.image_shape)
    state = tasks.of(c).begin(c, setup, state, spec.image_shape, teacher)
  teacher, state = mesh.replicate(teacher, devices), initial.placed(setup, state)
  iteration = algorithm.iteration(
    setup,
    algorithm.generator_step(setup, teacher),
    algorithm.student_step(setup, teacher),
    algorithm.teach_with(setup, teacher),
  )
  one = jax.jit(iteration)
  if method == QUANTISE:
    state, _ = one(state, None)
  after, losses = one(state, None)
  losses = {player: np.asarray(losses[player].total) for player in ("generator", "student")}
  return losses, jax.tree.map(lambda a, b: np.asarray(b) - np.asarray(a), state.student.params, after.student.params)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
  parser.add_argument("--out", type=pathlib.Path, required=True)
  parser.add_argument("--budget", default="9m", help="(default: %(default)s)")
  parser.add_argument("--pairs", help=f"of nets whose speed is measured (default: {PAIRS})")
  parser.add_argument("--methods", default=",".join((*METHODS, QUANTISE)), help="(default: %(default)s)")
  parser.add_argument("--toy", action="store_true", help="small nets and batches")
  flags = parser.parse_args(argv)
  until, device = time.monotonic() + seconds_of(flags.budget), jax.devices()[0]
  about: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "seconds": {}, "wrong": []}

  def part(name: str, work: Any) -> None:
    if time.monotonic() > until:
      print(f"{name}: not begun, the budget is spent", flush=True)
      return
    began = time.monotonic()
    try:
      about[name] = work()
    except Exception as error:  # one part's failure must not cost the others
      about[name], about["wrong"] = {"error": repr(error)[:500]}, [*about["wrong"], name]
    about["seconds"][name] = time.monotonic() - began
    print(f"{name}: {about['seconds'][name]:.0f} s, {json.dumps(about[name])}", flush=True)
    write_whole(flags.out, (json.dumps(about, indent=2) + "\n").encode())

  def check(method: str) -> dict[str, dict[str, float]]:
    found = differences(method, 8 if flags.toy else 64)
    for number, (precision, values) in enumerate(found.items()):
      for name, value in values.items():
        moved = method == QUANTISE and name == "first"  # by the iteration that calibrates
        limit = LIMITS["all" if moved else name][number]
        if not value < limit:
          about["wrong"].append(f"{method} in {precision}: {name} {value:.3g}, expected below {limit}")
    return found

  usual = TOY_PAIRS if flags.toy else PAIRS
  for pair in [pair.split(":") for pair in (usual if flags.pairs is None else flags.pairs).split(",") if pair]:
    part(f"speed {pair[0]}", lambda pair=pair: speed.measure(*pair, 8 if flags.toy else 512, 3, "bfloat16"))
  for method in filter(None, flags.methods.split(",")):
    part(f"differences {method}", lambda method=method: check(method))
  for problem in about["wrong"]:
    print(f"WRONG {problem}")
  return 1 if about["wrong"] else 0


if __name__ == "__main__":
  sys.exit(main())
