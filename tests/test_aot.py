"""launch/aot.py: the program it lowers, loops counted as often as they run, the memory of the blockwise contrast."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import REPOSITORY, SMOKE, command

from cpsc_jax import losses, mesh

AOT = REPOSITORY / "launch" / "aot.py"


@pytest.fixture(scope="module")
def aot():
  pytest.importorskip("libtpu", reason="pip install libtpu==0.0.51 with jax 0.10.2")
  sys.path.insert(0, str(AOT.parent))
  import aot

  return aot


def compile_for(devices, function, *arguments):
  """`function` compiled for devices; arguments are (shape, dtype, whether split along the batch)."""
  grid = mesh.make_mesh(devices)
  placements = {True: mesh.batch_sharding(grid), False: mesh.replicated(grid)}
  arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=placements[split]) for shape, dtype, split in arguments]
  return jax.jit(function).lower(*arguments).compile()


def test_loops_count_as_often_as_they_run(aot):
  steps, side, width = 7, 8, 128

  def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

  def train(x, w):
    def inner(w, _):
      return w - jax.grad(lambda w: jnp.mean(jnp.square(conv(jnp.tanh(conv(x, w)), w))))(w), None

    return jax.lax.scan(lambda w, _: jax.lax.scan(inner, w, length=steps), w, length=3)[0]

  images, kernel = ((32, side, side, width), jnp.float32, True), ((3, 3, width, width), jnp.float32, False)
  compiled = compile_for(aot.devices_of("v5e:2x2"), train, images, kernel)
  text = compiled.as_text()
  once, cost = aot.program_cost(text, loops_once=True), aot.program_cost(text)
  assert once.flops == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)
  assert cost.flops == pytest.approx(3 * steps * once.flops, rel=0.02)
  taps = (3 * side - 2) ** 2  # of a 3x3 kernel on one image, without padding; 2 passes forward, 3 back
  assert once.flops == pytest.approx(5 * 2 * 8 * taps * width**2, rel=0.02)
  (kind, (count, size)), *more = cost.collectives.items()
  assert (kind, count, size, more) == ("all-reduce", 3 * steps, 3 * steps * 4 * 9 * width**2, [])
  assert cost.traffic <= 3 * steps * compiled.cost_analysis()["bytes accessed"]


def test_what_does_not_fit_says_by_how_much(aot):
  devices = aot.devices_of("v5e:1x1")
  with pytest.raises(jax.errors.JaxRuntimeError) as error:
    compile_for(devices, lambda x: jnp.cumsum(x), ((6 * 2**30,), jnp.float32, False))
  assert aot.missing(error.value) > 8 * 2**30


WIDTH = (
  2048  # of ResNet-50's features; what is smaller than 128 MiB the compiler keeps out of HBM, and counts as nothing
)


def contrast_memory(aot, devices, samples, form):
  loss = {
    "dense": losses.supervised_contrast,
    "blockwise": lambda x, y: losses.supervised_contrast_blockwise(
      x,
      y,
      block=1024,
      split=mesh.batch_sharding(mesh.make_mesh(devices)),
      whole=mesh.replicated(mesh.make_mesh(devices)),
    ),
  }[form]
  views, labels = ((samples, 2, WIDTH), jnp.float32, True), ((samples,), jnp.int32, True)
  memory = compile_for(devices, jax.value_and_grad(loss), views, labels).memory_analysis()
  return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


@pytest.mark.slow
def test_blockwise_memory_grows_with_the_batch(aot):
  devices = aot.devices_of("v5e:16x16")
  sizes = (32768, 65536, 131072)
  blockwise = [contrast_memory(aot, devices, samples, "blockwise") for samples in sizes]
  print({samples: f"{size / 2**20:.0f} MiB" for samples, size in zip(sizes, blockwise, strict=True)})
  for smaller, larger in zip(blockwise, blockwise[1:], strict=False):
    assert larger <= 2.2 * smaller
  try:
    dense = contrast_memory(aot, devices, 65536, "dense")
  except jax.errors.JaxRuntimeError as error:
    print(f"dense, 65536: exceeds a chip by {aot.missing(error) / 2**30:.1f} GiB")
  else:
    print(f"dense, 65536: {dense / 2**20:.0f} MiB")
    assert dense > 10 * blockwise[1]


@pytest.mark.slow
def test_digits_on_four_chips(aot, tmp_path):
  config = [f"--config={REPOSITORY / 'configs' / 'digits.py'}:smoke", "--sweep=v5e:1x1,v5e:2x2"]
  done = subprocess.run([sys.executable, AOT, *config, f"--json={tmp_path / 'a'}"], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  one, four = json.loads((tmp_path / "a").read_text())
  assert (
    (one["chips"], four["chips"]) == (1, 4) and not one["collectives"] and four["collectives"]["all-reduce"]["count"]
  )
  flops = [row["per_epoch_and_chip"]["flops"] for row in (one, four)]
  assert flops[1] == pytest.approx(flops[0] / 4, rel=0.1)
  assert "v5e:2x2" in done.stdout and "chip-hours" in done.stdout


def run_aot(*argv):
  return subprocess.run([sys.executable, AOT, *argv], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_dry_run_and_refusals():
  digits = "--config=configs/digits.py"
  dry = run_aot(digits, "--sweep=v5e:1x1,v5e:4x4", "--dry-run")
  assert dry.returncode == 0 and dry.stdout.count("would compile") == 2
  refused = run_aot(digits, "--topology=v5e")
  assert refused.returncode == 2 and "give one such as v5e:4x4" in refused.stderr


SAME_PROGRAM = """
import re
import sys

import jax

sys.path.insert(0, "launch")
import aot
from cpsc_jax import algorithm, main

workdir, teacher, *flags = sys.argv[1:]
compile_epoch, programs = algorithm.compile_epoch, []


class Watched:
  def __init__(self, *arguments):
    self.program = compile_epoch(*arguments)

  def note(self, *inputs):
    text = str(self.program.trace(*inputs).jaxpr)
    programs.append(re.sub("0x[0-9a-f]+", "", text))  # addresses of functions

  def __call__(self, *inputs):
    self.note(*inputs)
    return self.program(*inputs)

  def lower(self, *inputs):
    self.note(*inputs)
    return self.program.lower(*inputs)


algorithm.compile_epoch = Watched
assert main.main(["main", f"--workdir={workdir}", *flags, teacher]) == 0
options, config = aot.parse(["--topology=v5e:2x2", *flags])
before = config.to_json()
lowered, resolved = aot.lower(config, jax.devices())
assert config.to_json() == before
assert resolved.name == "digits_smoke" and "stablehlo.convolution" in lowered.as_text()
run, ahead = programs
assert run == ahead
"""


@pytest.mark.slow
def test_what_is_lowered_is_what_a_run_compiles(finished, digits_dir, tmp_path):
  """Traced for the devices of this machine; to compile it for others takes libtpu."""
  teacher = f"--config.teacher.checkpoint={finished / 'teacher'}"
  flags = command("", digits_dir, "--config.schedule.epochs=1")[3:]
  argv = [sys.executable, "-c", SAME_PROGRAM, str(tmp_path / "w"), teacher, SMOKE, *flags]
  done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
