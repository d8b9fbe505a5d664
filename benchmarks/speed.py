"""One generator and one student step of CPSC-DFKD: this package against PyTorch, side by side in one run.

  python -m benchmarks.speed [--pairs wrn_16_1:wrn_10_1,wrn_40_2:wrn_16_2] [--batch 64] [--rounds 5]
    [--precision bfloat16] [--compile] [--out FILE.json]
  python -m benchmarks.speed --scaling [--out FILE.json]

CIFAR-10 shapes, one process, all cores or the first GPU. PyTorch is eager, or with --compile also compiled; channels
last, with the parameters that a step does not move frozen; in bfloat16 by its autocast. Both start from the same
weights, and the run ends with an error unless both losses are the same on one batch in float32. Rounds alternate; a
figure is the median over rounds. `ratio` is ours over PyTorch's: below 1 we are faster. FLOP are counted by XLA in the
program before it is optimised, and their rate is compared with that of a large matrix product in the same precision.
PyTorch's nets are those that the tests compare with, in tests/torch_zoo.py. --scaling measures our student step alone,
by the image: against the batch, the size of images and the number of classes.
"""

import argparse
import dataclasses
import functools
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

from benchmarks.command import built
from cpsc_jax import algorithm, config, datasets, initial, mesh, nets
from cpsc_jax.environment import cpu_model
from cpsc_jax.interop import convert
from cpsc_jax.nets import onednn
from cpsc_jax.setup import Setup
from cpsc_jax.state import Batch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests"))
import torch_zoo as zoo

STEPS = 4  # of ours in one call, as in training, where an epoch is one program
TOLERANCE = 1e-3  # of the losses' difference, in float32
PAIRS = "wrn_16_1:wrn_10_1,wrn_40_2:wrn_16_2"
SCALING = {"batch": (16, 32, 64, 128, 256), "image_size": (32, 64), "num_classes": (10, 100)}


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
  """Both steps in PyTorch, eager and channels last, on weights that `ours` converts; `amp` is the type of autocast."""

  def __init__(self, teacher: str, student: str, setup: Setup, width: int, latent_dim: int):
    torch.manual_seed(0)
    last, self.amp, self.device = torch.channels_last, None, "cpu"
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

  def move(self, device: str, amp: torch.dtype | None) -> None:
    """To where steps are measured; before, the weights are read and losses compared on the CPU."""
    self.device, self.amp = device, amp
    for net in (self.teacher, self.student, self.generator):
      net.to(device)

  def autocast(self) -> torch.autocast:
    return torch.autocast(self.device, self.amp or torch.bfloat16, enabled=self.amp is not None)

  def generator_loss(self, z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    w = self.weights["generator"]
    self.seen.clear()
    with self.autocast():
      x = self.generator(z, y)
      t, ft = self.teacher(x)
      s, fs = self.student(x)
    bn = 0.0
    for m, v in self.seen:
      v = v.float()
      bn += (v.mean((0, 2, 3)) - m.running_mean).norm() + (v.var((0, 2, 3), unbiased=False) - m.running_var).norm()
    t, ft, s, fs = (v.float() for v in (t, ft, s, fs))
    rows, twice = torch.cat([fs, ft]), torch.cat([y, y])
    eye = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
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
    with self.autocast():
      with torch.no_grad():
        self.seen.clear()
        x = self.generator(z, y)
        t, _ = self.teacher(x)
      s, _ = self.student(x)
    t, s = t.float(), s.float()
    return w["kd"] * kl(t, s) + w["l2"] * F.mse_loss(s, t) + w["ce"] * F.cross_entropy(s, y)

  def student_step(self, z: torch.Tensor, y: torch.Tensor) -> float:
    self.student.train().requires_grad_(True)
    return descend(self.sgd, self.student_loss(z, y))


def build_ours(
  teacher: str, student: str, batch: int, precision: str, image_size: int = 32, num_classes: int = 10
) -> tuple[config.Config, Setup, datasets.Dataset]:
  """(config, setup, data set) of a pair of nets on images as those of CIFAR-10."""
  c = cifar10.get_config()
  with c.unlocked():
    c.teacher.net, c.student.net, c.schedule.batch_size, c.loss.ikd_form = teacher, student, batch, "mse"
    c.generator.label_limit, c.precision = 0, precision
  spec, devices = datasets.DATASETS["cifar10"], mesh.make_mesh()
  spec = dataclasses.replace(spec, image_size=image_size, num_classes=num_classes)
  return *built(c, spec, devices), spec


def build(teacher: str, student: str, batch: int, precision: str) -> tuple[Setup, Torch, Any, Any]:
  """(setup, PyTorch's side, teacher variables, state) of a pair, from the same weights."""
  c, setup, spec = build_ours(teacher, student, batch, precision)
  devices, net = setup.mesh, nets.classifier(teacher, 10)
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
  """Of one call, until devices of either side have done their work."""
  started = time.perf_counter()
  jax.block_until_ready(call())
  if torch.cuda.is_available():
    torch.cuda.synchronize()
  return time.perf_counter() - started


def program_of(setup: Setup, variables: Any, state: Any, of: Callable, keys: jax.Array) -> tuple[Any, float, dict]:
  """(program of STEPS steps, seconds to compile it, what XLA says of it) of one player's step.

  XLA's GPU backend does not count FLOP: they are None there.
  """

  def steps(state: Any, keys: jax.Array) -> Any:
    return jax.lax.scan(of(setup, variables), state, keys)[0]

  with onednn.disabled():  # whose calls XLA does not see into
    flops = (jax.jit(of(setup, variables)).lower(state, keys[0]).cost_analysis() or {}).get("flops")
  started = time.perf_counter()
  compiled = jax.jit(steps).lower(state, keys).compile()
  spent, memory = time.perf_counter() - started, compiled.memory_analysis()
  needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
  return compiled, spent, {"flop": flops, "peak_mib": needed / 2**20}


def matmul_peak(precision: str) -> float:
  """FLOP/s of a large matrix product on the first device."""
  side = 1024 if jax.devices()[0].platform == "cpu" else 8192
  dtype = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[precision]
  x = jax.random.normal(jax.random.key(0), (side, side), dtype)
  product = jax.jit(lambda a: a @ a)
  jax.block_until_ready(product(x))
  return 2 * side**3 / min(seconds(lambda: product(x)) for _ in range(10))


def measure(
  teacher: str, student: str, batch: int, rounds: int, precision: str = "float32", compiled: bool = False
) -> dict[str, Any]:
  """Milliseconds of a step of each player, here and in PyTorch, with what it takes and seconds to compile ours."""
  setup, theirs, variables, state = build(teacher, student, batch, precision)
  z = torch.randn(batch, setup.method.noise.latent_dim)
  y = torch.randint(0, 10, (batch,))
  alike = (setup, theirs, variables, state)
  with jax.default_matmul_precision("highest"):
    check(*(alike if precision == "float32" else build(teacher, student, batch, "float32")), z, y)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  theirs.move(device, torch.bfloat16 if precision == "bfloat16" else None)
  z, y, peak = z.to(device), y.to(device), matmul_peak(precision)
  keys, found = jax.random.split(jax.random.key(2), STEPS), {}
  for player, of in (("generator", algorithm.generator_step), ("student", algorithm.student_step)):
    program, spent, about = program_of(setup, variables, state, of, keys)
    eager = getattr(theirs, f"{player}_step")
    sides = {"ms": lambda program=program: program(state, keys), "torch_ms": lambda step=eager: repeat(step, z, y)}
    if compiled:
      sides["torch_compile_ms"] = functools.partial(repeat, torch.compile(eager), z, y)
    for call in sides.values():
      seconds(call)
    times = {name: [] for name in sides}
    for _ in range(rounds):
      for name, call in sides.items():
        times[name].append(seconds(call) / STEPS)
    found[player] = {name: 1000 * statistics.median(values) for name, values in times.items()}
    rate = about["flop"] and about["flop"] / found[player]["ms"] * 1000
    found[player] |= {"ratio": found[player]["ms"] / found[player]["torch_ms"], "compile_s": spent} | about
    found[player] |= {
      "images_per_s": batch / found[player]["ms"] * 1000,
      "flop_per_s": rate,
      "of_peak": rate and rate / peak,
    }
  both = [sum(found[player][kind] for player in found) for kind in ("ms", "torch_ms")]
  row = {"pair": f"{teacher} -> {student}", "batch": batch, "precision": precision, "matmul_flop_per_s": peak}
  return row | found | {"ratio": both[0] / both[1]}


def repeat(step: Callable[[torch.Tensor, torch.Tensor], float], z: torch.Tensor, y: torch.Tensor) -> None:
  for _ in range(STEPS):
    step(z, y)


def scaling(rounds: int) -> list[dict[str, Any]]:
  """Our student step, WRN-16-1 -> WRN-10-1 in float32: what an image costs against one size at a time."""
  usual, rows = {"batch": 64, "image_size": 32, "num_classes": 10}, []
  for size, values in SCALING.items():
    for value in values:
      sizes = usual | {size: value}
      _, setup, spec = build_ours("wrn_16_1", "wrn_10_1", precision="float32", **sizes)
      state = initial.state(setup, jax.random.key(0), spec.image_shape)
      variables = nets.init(setup.teacher, jax.random.key(1), jnp.zeros((2, *spec.image_shape)))
      keys = jax.random.split(jax.random.key(2), STEPS)
      program, spent, about = program_of(setup, variables, state, algorithm.student_step, keys)
      seconds(lambda program=program, state=state, keys=keys: program(state, keys))
      times = [seconds(lambda p=program, s=state, k=keys: p(s, k)) / STEPS for _ in range(rounds)]
      image = statistics.median(times) / sizes["batch"]
      rows.append({"against": size, **sizes, "us_per_image": 1e6 * image, "compile_s": spent, **about})
      print(f"| {size} {value} | {1e6 * image:.0f} | {spent:.0f} | {about['peak_mib']:.0f} |", flush=True)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--pairs", default=PAIRS)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
  parser.add_argument("--compile", action="store_true", help="a third column: PyTorch's own compiler")
  parser.add_argument("--scaling", action="store_true", help="what an image costs against sizes")
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
  if flags.scaling:
    print("| size | us an image | compiling, s | memory, MiB |\n|---|---|---|---|")
    about["rows"] = scaling(flags.rounds)
  else:
    head = ("pair", "batch", "generator step, ms", "student step, ms", "PyTorch, ms", "ratio", "of the matmul peak")
    print(f"| {' | '.join((*head, 'MiB', 'compiling, s'))} |\n{'|---' * 9}|")
    for pair in flags.pairs.split(","):
      about["rows"].append(measure(*pair.split(":"), flags.batch, flags.rounds, flags.precision, flags.compile))
      print(line(about["rows"][-1]), flush=True)
  if flags.out:
    pathlib.Path(flags.out).write_text(json.dumps(about, indent=2) + "\n")


def line(row: dict[str, Any]) -> str:
  """A pair's row as Markdown: generator before student."""
  g, s = row["generator"], row["student"]
  cells = (
    row["pair"],
    str(row["batch"]),
    f"{g['ms']:.0f}",
    f"{s['ms']:.0f}",
    f"{g['torch_ms']:.0f}, {s['torch_ms']:.0f}",
    f"{row['ratio']:.2f} ({g['ratio']:.2f}, {s['ratio']:.2f})",
    ", ".join("not counted" if of["of_peak"] is None else f"{of['of_peak']:.2f}" for of in (g, s)),
    f"{g['peak_mib']:.0f}, {s['peak_mib']:.0f}",
    f"{g['compile_s']:.0f}, {s['compile_s']:.0f}",
  )
  return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
  main()
