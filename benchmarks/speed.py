"""One generator and one student step of CPSC-DFKD: this package against PyTorch, side by side in one run.

  python -m benchmarks.speed [--pairs wrn_16_1:wrn_10_1,wrn_40_2:wrn_16_2] [--batch 64] [--rounds 5] [--out FILE.json]

CIFAR-10 shapes, float32, one process, all cores. PyTorch is eager, channels last, with the parameters that a step does
not move frozen. Both start from the same weights, and the run ends with an error unless both losses are the same on one
batch. Rounds alternate; a figure is the median over rounds. `ratio` is ours over PyTorch's: below 1 we are faster.
PyTorch's nets are those that the tests compare with, in tests/torch_zoo.py.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from cpsc_jax.configs import cifar10
from torch.nn import functional as F

from cpsc_jax import algorithm, config, datasets, experiment, initial, mesh, nets
from cpsc_jax.interop import convert
from cpsc_jax.nets import onednn
from cpsc_jax.record import cpu_model
from cpsc_jax.setup import Setup
from cpsc_jax.state import Batch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
import torch_zoo as zoo

STEPS = 4  # of ours in one call, as in training, where an epoch is one program
TOLERANCE = 1e-3  # of the losses' difference
PAIRS = "wrn_16_1:wrn_10_1,wrn_40_2:wrn_16_2"


def twin(name: str) -> torch.nn.Module:
  """PyTorch's version of a net of ours. Raises ValueError for one that the benchmark does not know."""
  if name.startswith("wrn_"):
    return zoo.WideResNet(*map(int, name.split("_")[1:]), 10)
  counts = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
  if name not in counts:
    raise ValueError(f"no PyTorch version of '{name}' here; choose wrn_D_K, resnet18 or resnet34")
  return zoo.ResNet(counts[name], 10)


def kl(t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
  """KL(teacher || student) of logits (N, C), averaged over the batch."""
  log_t, log_s = t.log_softmax(1), s.log_softmax(1)
  return (log_t.exp() * (log_t - log_s)).sum(1).mean()


def descend(optimiser: torch.optim.Optimizer, loss: torch.Tensor) -> float:
  """One step of PyTorch's optimiser; returns the loss before it."""
  optimiser.zero_grad()
  loss.backward()
  optimiser.step()
  return loss.item()


class Torch:
  """Both steps in PyTorch, eager and channels last, on weights that `ours` converts."""

  def __init__(self, teacher: str, student: str, setup: Setup, width: int, latent_dim: int):
    torch.manual_seed(0)
    last = torch.channels_last
    self.teacher = zoo.randomise(twin(teacher), 1).eval().requires_grad_(False).to(memory_format=last)
    self.student = zoo.randomise(twin(student), 2).to(memory_format=last)
    self.generator = zoo.randomise(zoo.CifarGenerator(latent_dim, width, 32, 3, 10), 3).to(memory_format=last)
    self.weights = setup.weights
    self.adam = torch.optim.Adam(self.generator.parameters(), 1e-3, betas=(0.5, 0.999))
    self.sgd = torch.optim.SGD(self.student.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    self.seen: list[tuple[torch.nn.Module, torch.Tensor]] = []
    for layer in self.teacher.modules():
      if isinstance(layer, torch.nn.BatchNorm2d):
        layer.register_forward_pre_hook(lambda layer, x: self.seen.append((layer, x[0])))

  def generator_loss(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    w = self.weights["generator"]
    self.seen.clear()
    x = self.generator(z, y)
    t, ft = self.teacher(x)
    bn = sum(
      (v.mean((0, 2, 3)) - m.running_mean).norm() + (v.var((0, 2, 3), unbiased=False) - m.running_var).norm()
      for m, v in self.seen
    )
    s, fs = self.student(x)
    rows, twice = torch.cat([fs, ft]), torch.cat([y, y])
    eye = torch.eye(len(rows), dtype=torch.bool)
    log_p = (rows @ rows.T / 0.07).masked_fill(eye, float("-inf")).log_softmax(1)
    positive = (twice[:, None] == twice[None]) & ~eye
    scl = -(log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    ikd = F.mse_loss(s, t.detach())
    return (
      -w["adversarial"] * kl(t, s) - w["ikd"] * ikd + w["bn"] * bn + w["scl"] * scl + w["ce"] * F.cross_entropy(t, y)
    )

  def generator_step(self, z: torch.Tensor, y: torch.Tensor) -> float:
    self.student.eval().requires_grad_(False)
    return descend(self.adam, self.generator_loss(z, y))

  def student_loss(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    w = self.weights["student"]
    with torch.no_grad():
      self.seen.clear()
      x = self.generator(z, y)
      t, _ = self.teacher(x)
    s, _ = self.student(x)
    return w["kd"] * kl(t, s) + w["l2"] * F.mse_loss(s, t) + w["ce"] * F.cross_entropy(s, y)

  def student_step(self, z: torch.Tensor, y: torch.Tensor) -> float:
    self.student.train().requires_grad_(True)
    return descend(self.sgd, self.student_loss(z, y))


def build(teacher: str, student: str, batch: int) -> tuple[Setup, Torch, Any, Any]:
  """(setup, PyTorch's side, teacher variables, state) of a pair, from the same weights."""
  c = cifar10.get_config()
  with c.unlocked():
    c.teacher.net, c.student.net, c.schedule.batch_size, c.loss.ikd_form = teacher, student, batch, "mse"
    c.generator.label_limit = 0
  spec, devices = datasets.DATASETS["cifar10"], mesh.make_mesh()
  c = config.resolve(c, spec, devices)
  net = nets.classifier(teacher, 10)
  setup = experiment.build(c, spec, net, {"mean": spec.mean, "std": spec.std}, devices)
  theirs = Torch(teacher, student, setup, c.generator.width, c.generator.latent_dim)
  state = initial.state(setup, jax.random.key(0), spec.image_shape)
  variables = {
    "teacher": convert.classifier_from_torch(zoo.arrays(theirs.teacher), shapes(net)),
    "student": convert.classifier_from_torch(zoo.arrays(theirs.student), state.student.variables),
    "generator": convert.generator_from_torch(zoo.arrays(theirs.generator), state.generator.variables),
  }
  filled = {name: getattr(state, name).replace(**arrays(variables[name])) for name in ("generator", "student")}
  return setup, theirs, mesh.replicate(arrays(variables["teacher"]), devices), state.replace(**filled)


def arrays(tree: Any) -> Any:
  return jax.tree.map(jnp.asarray, tree)


def shapes(net: Any) -> Any:
  return jax.eval_shape(lambda key: nets.init(net, key, jnp.zeros((2, 32, 32, 3))), jax.random.key(0))


def check(setup: Setup, theirs: Torch, teacher: Any, state: Any, z: torch.Tensor, y: torch.Tensor) -> None:
  """Raises SystemExit unless both sides have the same losses on one batch."""
  batch = jnp.asarray(z.numpy()), jnp.asarray(y.numpy(), jnp.int32)
  key = jax.random.key(1)

  def ours(state: Any) -> tuple[jax.Array, jax.Array]:
    loss = algorithm.generator_loss(setup, teacher, state)
    stats = {"generator": state.generator.batch_stats, "student": state.student.batch_stats}
    of_generator = loss({"generator": state.generator.params}, stats, batch, None, key)[0]
    x, _ = nets.forward(setup.generator.net, state.generator.variables, *batch, train=True)
    t = setup.teacher.apply(teacher, x, train=False)
    loss = algorithm.student_loss(setup, state.hyper.student)
    return of_generator, loss(state.student.params, state.student.batch_stats, Batch(x, batch[1]), t, key)[0]

  found = [float(value) for value in jax.jit(ours)(state)]
  with torch.no_grad():
    theirs.student.eval()
    wanted = [theirs.generator_loss(z, y).item()]
    theirs.student.train()
    wanted.append(theirs.student_loss(z, y).item())
  if not np.allclose(found, wanted, rtol=TOLERANCE):
    raise SystemExit(f"the two sides do not compute the same: losses {found} here, {wanted} in PyTorch")


def seconds(call: Callable[[], Any]) -> float:
  started = time.perf_counter()
  jax.block_until_ready(call())
  return time.perf_counter() - started


def measure(teacher: str, student: str, batch: int, rounds: int) -> dict[str, Any]:
  """Milliseconds of a step of each player, here and in PyTorch, and seconds to compile ours."""
  setup, theirs, variables, state = build(teacher, student, batch)
  z = torch.randn(batch, setup.method.noise.latent_dim)
  y = torch.randint(0, 10, (batch,))
  check(setup, theirs, variables, state, z, y)
  keys, found = jax.random.split(jax.random.key(2), STEPS), {}
  for player, of in (("generator", algorithm.generator_step), ("student", algorithm.student_step)):

    def steps(state: Any, keys: jax.Array, of: Callable = of) -> Any:
      return jax.lax.scan(of(setup, variables), state, keys)[0]

    program = jax.jit(steps)
    compiled = seconds(lambda program=program: program(state, keys))
    torch_step = getattr(theirs, f"{player}_step")
    torch_step(z, y)
    here, there = [], []
    for _ in range(rounds):
      here.append(seconds(lambda program=program: program(state, keys)) / STEPS)
      there.append(sum(seconds(lambda step=torch_step: step(z, y)) for _ in range(STEPS)) / STEPS)
    ms = [1000 * statistics.median(times) for times in (here, there)]
    found[player] = {"ms": ms[0], "torch_ms": ms[1], "ratio": ms[0] / ms[1], "first_call_s": compiled}
  both = [sum(found[player][kind] for player in found) for kind in ("ms", "torch_ms")]
  return {"pair": f"{teacher} -> {student}", "batch": batch, **found, "ratio": both[0] / both[1]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--pairs", default=PAIRS)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--out")
  flags = parser.parse_args()
  device = jax.devices()[0].device_kind
  about = {
    "device": f"{cpu_model()}, {torch.get_num_threads()} cores" if device == "cpu" else device,
    "jax": jax.__version__,
    "torch": torch.__version__,
    "onednn": onednn.version(),
    "rows": [],
  }
  print(f"{about['device']}; jax {about['jax']}, torch {about['torch']}, oneDNN {about['onednn']}")
  print("| pair | batch | generator step, ms | student step, ms | PyTorch, ms | ratio | first calls, s |")
  print("|---" * 7 + "|")
  for pair in flags.pairs.split(","):
    row = measure(*pair.split(":"), flags.batch, flags.rounds)
    about["rows"].append(row)
    g, s = row["generator"], row["student"]
    print(
      f"| {row['pair']} | {row['batch']} | {g['ms']:.0f} | {s['ms']:.0f} | {g['torch_ms']:.0f}, {s['torch_ms']:.0f} |"
      f" {row['ratio']:.2f} ({g['ratio']:.2f}, {s['ratio']:.2f}) | {g['first_call_s']:.0f}, {s['first_call_s']:.0f} |",
      flush=True,
    )
    if flags.out:
      pathlib.Path(flags.out).write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
  main()
