"""Takes a net out of a finished run: its weights for PyTorch, or the whole network for other runtimes.

    python -m cpsc_jax.export WORKDIR --format onnx --out student.onnx

What was written is read back and held against the JAX net before the file gets its name.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from safetensors import numpy as safetensors

from cpsc_jax import checkpoint, convert, nets, saved
from cpsc_jax.command import Flags, carry_out
from cpsc_jax.errors import Refusal
from cpsc_jax.progress import say

TOLERANCE = 1e-4  # of the largest output
BATCHES = (1, 2, 7)
PLATFORMS = ("cpu", "cuda", "tpu")


def export(workdir, which, name, out):
  """Writes a net of `workdir` in the format called `name` to the new file `out` and returns the largest difference.

  That is the largest absolute difference between the file's outputs and the JAX net's on random inputs, as a fraction
  of the largest output; 0 for weights, which must come back bit for bit.

  Raises:
    Refusal: a missing package, an unfinished run, a damaged net, an `out` that cannot be written, or a file that says
      something else than the net. Nothing is left then.
  """
  form = FORMATS[name]
  missing = [package for package in form.packages if not importlib.util.find_spec(package)]
  if missing:
    raise Refusal(f"--format {name} needs {' and '.join(missing)}; run: pip install 'cpsc_jax[{form.extra}]'")
  # On the CPU: elsewhere float32 products may be rounded to less, and differ by more than the file is to blame for.
  with saved.new_file(out) as scratch, jax.default_device(jax.devices("cpu")[0]):
    net = saved.load(saved.find(workdir, which))
    difference = form.write(scratch, net)
    if not difference <= TOLERANCE:
      raise Refusal(
        f"the {name} file differs from the net by {difference:.1e} of its largest output, more than {TOLERANCE:.0e};"
        " nothing was written."
      )
  parameters = nets.count_parameters(net.variables["params"])
  held = "its weights come back bit for bit"
  if name not in WEIGHTS:
    held = f"it differs from the JAX net by at most {difference:.1e} of the largest output"
  say(f"{out}: {net.card['net']}, {parameters:,} parameters; {held}")
  say(f"images are (pixels / 255 - mean) / std with mean {net.card['mean']} and std {net.card['std']}")
  return difference


def write_torch(path, net):
  import torch

  state_dict = convert.to_torch(net.card["net"], net.variables)
  torch.save({key: torch.from_numpy(array.copy()) for key, array in state_dict.items()}, path)
  back = torch.load(path, weights_only=True)
  return weights_differ(net, {key: tensor.numpy() for key, tensor in back.items()})


def write_safetensors(path, net):
  state_dict = convert.to_torch(net.card["net"], net.variables)
  contiguous = {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in state_dict.items()}
  path.write_bytes(safetensors.save(contiguous, metadata(net.card)))
  return weights_differ(net, safetensors.load(path.read_bytes()))


def write_onnx(path, net):
  import onnx
  import onnxruntime

  from cpsc_jax import onnx_graph

  inputs, output, call = signature(net)
  model = onnx_graph.build(call, net.variables, inputs, output, metadata(net.card))
  onnx.save(model, path)
  session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
  first = lambda x: x.transpose(0, 3, 1, 2) if x.ndim == 4 else x

  def run(*arrays):
    (result,) = session.run([output], dict(zip(inputs, map(first, arrays), strict=True)))
    return result.transpose(0, 2, 3, 1) if result.ndim == 4 else result

  return largest_difference(net, run)


def write_stablehlo(path, net):
  inputs, _, call = signature(net)
  (batch,) = jax.export.symbolic_shape("batch")
  specs = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in inputs.values()]
  exported = jax.export.export(jax.jit(lambda *arrays: call(net.variables, *arrays)), platforms=PLATFORMS)(*specs)
  path.write_bytes(exported.serialize())
  return largest_difference(net, jax.export.deserialize(path.read_bytes()).call)


class Format(NamedTuple):
  """The packages that a format needs, the extra of pyproject.toml that brings them, and (path, net) -> difference."""

  packages: tuple[str, ...]
  extra: str
  write: Callable


FORMATS = {
  "torch": Format(("torch",), "torch", write_torch),
  "safetensors": Format((), "", write_safetensors),
  "onnx": Format(("onnx", "onnxruntime"), "onnx", write_onnx),
  "stablehlo": Format(("flatbuffers",), "stablehlo", write_stablehlo),
}
WEIGHTS = ("torch", "safetensors")


def signature(net):
  """({name: (shape of one sample, dtype)} of the inputs, name of the output, (variables, *inputs) -> output)."""
  card = net.card
  if net.is_generator:
    inputs = {"latent": ((card["latent_dim"],), np.float32), "labels": ((), np.int32)}
    return inputs, "images", lambda variables, z, labels: net.net.apply(variables, z, labels, train=False)
  shape = (card["image_size"], card["image_size"], card["channels"])
  return {"images": (shape, np.float32)}, "logits", lambda v, x: net.net.apply(v, x, train=False).logits


def metadata(card):
  """{str: str} of what one has to know to use the weights; everything but the net's name is JSON."""
  facts = {key: card[key] for key in ("num_classes", "image_size", "channels", "mean", "std")}
  facts["class_names"] = saved.class_names(card)
  return {"net": card["net"], "digest": card["digest"], **{key: json.dumps(value) for key, value in facts.items()}}


def weights_differ(net, state_dict):
  """0.0 if a state dict that was read back gives the net's variables bit for bit, else infinity."""
  back = convert.from_torch(net.card["net"], state_dict, net.variables)
  return 0.0 if checkpoint.digest(back) == net.card["digest"] else float("inf")


def largest_difference(net, run):
  """Between run(*inputs) on batches of several sizes and the JAX net, as a fraction of the net's largest output."""
  inputs, _, call = signature(net)
  random, size, classes = np.random.default_rng(0), max(BATCHES), net.card["num_classes"]
  arrays = [
    random.standard_normal((size, *shape), dtype) if shape else random.integers(classes, size=size, dtype=dtype)
    for shape, dtype in inputs.values()
  ]
  ours = np.asarray(jax.jit(call)(net.variables, *arrays))
  theirs = [np.asarray(run(*(a[:n] for a in arrays))) for n in BATCHES]
  if any(t.shape != ours[:n].shape for n, t in zip(BATCHES, theirs, strict=True)):
    return float("inf")
  differences = [np.max(np.abs(t - ours[:n])) for n, t in zip(BATCHES, theirs, strict=True)]
  return float(np.max(differences) / np.max(np.abs(ours)))  # a NaN stays one


def main(argv=None):
  """Parses flags, exports, says what came of it; returns the exit code."""
  flags = Flags(prog="python -m cpsc_jax.export", description=__doc__.split("\n")[0])
  flags.add_argument("workdir", help="of a finished run, or a folder that holds one net")
  flags.add_argument("--format", required=True, choices=tuple(FORMATS))
  flags.add_argument("--out", required=True, help="the file to write; it must not exist yet")
  flags.add_argument("--which", choices=saved.WHICH, help="which net of the run (default: student)")
  return carry_out(lambda args: export(args.workdir, args.which, args.format, args.out), flags, argv)


if __name__ == "__main__":
  sys.exit(main())
