"""Exports a net of a finished run: its weights for PyTorch, or the whole network for other runtimes.

    cpsc-jax export WORKDIR --format onnx --out student.onnx

The written file is read back and compared with the JAX net; if they differ, nothing is left on disk.
"""

import importlib.util
import json
import pathlib
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import numpy as safetensors

from cpsc_jax import checkpoint, datasets, nets, saved
from cpsc_jax.command import Flags, run_command
from cpsc_jax.errors import Refusal
from cpsc_jax.interop import convert, torch_nets, torch_quantised
from cpsc_jax.progress import say

TOLERANCE = 1e-4  # of the largest output
QUANTISED_TOLERANCE = 0.05  # where round-off decides between two levels; `own_difference` may allow more
ROUND_OFF = 1e-6  # relative, of a float32 sum over a thousand terms
BATCHES = (1, 2, 7)
PLATFORMS = ("cpu", "cuda", "tpu")


def export(workdir: str | pathlib.Path, which: str | None, name: str, out: str | pathlib.Path) -> float:
  """`export_net` for a net of the finished run in `workdir`, one of `saved.WHICH`; None means the student."""
  return export_net(saved.load(saved.find(workdir, which)), name, out)


def export_net(net: saved.SavedNet, name: str, out: str | pathlib.Path) -> float:
  """Writes a net to the new file `out` in the format called `name`, compares the two and prints the result.

  Returns:
    The largest absolute difference between the file's outputs and the JAX net's on random inputs, as a fraction of the
    largest output; 0 for weights, which must be bit-identical.

  Raises:
    Refusal: a missing package, an `out` that cannot be written, a net that cannot be written in this format, or a file
      that differs from the net. Nothing is left on disk then.
  """
  form = FORMATS[name]
  missing = [package for package in form.packages if not importlib.util.find_spec(package)]
  if missing:
    raise Refusal(f"--format {name} needs {' and '.join(missing)}; run: pip install 'cpsc_jax[{form.extra}]'")
  quantised = net.card.get("quantised")
  tolerance = QUANTISED_TOLERANCE if quantised else TOLERANCE
  # On the CPU: accelerators may round float32 products to fewer bits, a difference that is not the file's.
  beside = [torch_nets.beside(out)] if name == "torch" else []
  with (
    saved.new_files(out, *beside) as (scratch, *_),
    jax.default_device(jax.local_devices(backend="cpu")[0]),
  ):
    net = net._replace(variables=jax.tree.map(jnp.asarray, jax.device_get(net.variables)))
    difference = form.write(scratch, net)
    if quantised and tolerance < difference < float("inf"):
      tolerance = max(tolerance, 2 * own_difference(net))
    if not difference <= tolerance:
      raise Refusal(
        f"the {name} file differs from the net by {difference:.1e} of its largest output, more than {tolerance:.0e};"
        " nothing was written. Try another --format."
      )
  compared = f"outputs differ from the JAX net's by at most {difference:.1e} of the largest output"
  if name == "safetensors":
    compared = "weights bit-identical to the JAX net's"
  say(f"{out}: {net.card['net']}, {nets.count_parameters(net.variables['params']):,} parameters; {compared}")
  if quantised:
    say(f"{nets.quantised_words(quantised)}; {pathlib.Path(out).stat().st_size:,} bytes")
  if name == "torch":
    say(f"{beside[0]} is its PyTorch module, which normalises images in [0, 1] itself; these lines call it once:")
    for line in torch_nets.lines(net, out):
      say(f"    {line}")
  else:
    say(f"images are (pixels / 255 - mean) / std with mean {net.card['mean']} and std {net.card['std']}")
  return difference


def write_torch(path: pathlib.Path, net: saved.SavedNet) -> float:
  """A PyTorch state dict, as torch.save writes it, and beside it a PyTorch module (`torch_nets`) that loads it.

  Returns the module's `largest_difference`, or infinity if the weights read back differently.
  """
  import torch

  state_dict = state_dict_of(net)
  torch.save({key: torch.from_numpy(array.copy()) for key, array in state_dict.items()}, path)
  back = torch.load(path, weights_only=True)
  differ = weights_differ(net, state_dict, {key: tensor.numpy() for key, tensor in back.items()})
  module = torch_nets.beside(path)
  module.write_text(torch_nets.source(net, path.name), encoding="utf-8")
  model = runpy.run_path(str(module))["load"]()
  mean, std = (np.asarray(net.card[key], np.float32) for key in ("mean", "std"))

  @torch.no_grad()
  def run(*arrays):
    if net.is_generator:
      return model(*map(torch.from_numpy, arrays)).numpy().transpose(0, 2, 3, 1)
    pixels = (arrays[0] * std + mean).transpose(0, 3, 1, 2)
    return model(torch.from_numpy(pixels)).numpy()

  def pixels_of(images):
    return datasets.denormalise(images, mean, std)

  return max(differ, largest_difference(net, run, pixels_of if net.is_generator else np.asarray))


def write_safetensors(path: pathlib.Path, net: saved.SavedNet) -> float:
  """The same state dict as safetensors, with `metadata`; returns 0, or infinity if it reads back differently."""
  state_dict = state_dict_of(net)
  contiguous = {key: np.ascontiguousarray(array).reshape(array.shape) for key, array in state_dict.items()}
  path.write_bytes(safetensors.save(contiguous, metadata(net.card)))
  return weights_differ(net, state_dict, safetensors.load(path.read_bytes()))


def write_onnx(path: pathlib.Path, net: saved.SavedNet) -> float:
  """An ONNX model for any batch size, images (N, K, H, W); returns its `largest_difference` in onnxruntime."""
  import onnx
  import onnxruntime

  from cpsc_jax.interop import onnx_graph, onnx_quantised

  inputs, output, call = signature(net)
  how = onnx_quantised.translation(net.card)
  model = onnx_graph.build(call, net.variables, inputs, output, metadata(net.card), **how)
  onnx.save(model, path)
  session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

  def run(*arrays):
    channels_first = [x.transpose(0, 3, 1, 2) if x.ndim == 4 else x for x in arrays]
    (result,) = session.run([output], dict(zip(inputs, channels_first, strict=True)))
    return result.transpose(0, 2, 3, 1) if result.ndim == 4 else result

  return largest_difference(net, run)


def write_stablehlo(path: pathlib.Path, net: saved.SavedNet) -> float:
  """What jax.export serialises, for any batch size and PLATFORMS; returns its `largest_difference`."""
  inputs, _, call = signature(net)
  (batch,) = jax.export.symbolic_shape("batch")
  specs = [jax.ShapeDtypeStruct((batch, *shape), dtype) for shape, dtype in inputs.values()]
  exported = jax.export.export(jax.jit(lambda *arrays: call(net.variables, *arrays)), platforms=PLATFORMS)(*specs)
  path.write_bytes(exported.serialize())
  return largest_difference(net, jax.export.deserialize(path.read_bytes()).call)


class Format(NamedTuple):
  """A file format.

  Attributes:
    packages: that it needs.
    extra: of pyproject.toml, which installs them.
    write: (path, net) -> the difference that `export_net` returns.
  """

  packages: tuple[str, ...]
  extra: str
  write: Callable[[pathlib.Path, saved.SavedNet], float]


FORMATS = {
  "torch": Format(("torch",), "torch", write_torch),
  "safetensors": Format((), "", write_safetensors),
  "onnx": Format(("onnx", "onnxruntime"), "onnx", write_onnx),
  "stablehlo": Format(("flatbuffers",), "stablehlo", write_stablehlo),
}
SUFFIXES = {".pth": "torch", ".pt": "torch", **{f".{name}": name for name in FORMATS if name != "torch"}}


def format_of(out: str | pathlib.Path) -> str:
  """The format that the suffix of a file name stands for; raises a Refusal if it stands for none."""
  suffix = pathlib.Path(out).suffix
  if suffix not in SUFFIXES:
    raise Refusal(f"cannot tell the format of {out}; end the name in {', '.join(SUFFIXES)}, or give --format.")
  return SUFFIXES[suffix]


def signature(net: saved.SavedNet) -> tuple[dict[str, tuple[tuple[int, ...], Any]], str, Callable]:
  """({name: (shape of one sample, dtype)} of the inputs, name of the output, (variables, *inputs) -> output)."""
  card = net.card

  def images(variables, z, labels):
    return net.net.apply(variables, z, labels, train=False)

  def logits(variables, x):
    return net.net.apply(variables, x, train=False).logits

  if net.is_generator:
    return {"latent": ((card["latent_dim"],), np.float32), "labels": ((), np.int32)}, "images", images
  shape = (card["image_size"], card["image_size"], card["channels"])
  return {"images": (shape, np.float32)}, "logits", logits


def metadata(card: dict[str, Any]) -> dict[str, str]:
  """What a user of the weights has to know; values are JSON except those of "net" and "digest"."""
  facts = {key: card[key] for key in ("num_classes", "image_size", "channels", "mean", "std")}
  facts["class_names"] = saved.class_names(card)
  facts |= {"quantised": card["quantised"]} if "quantised" in card else {}
  return {"net": card["net"], "digest": card["digest"], **{key: json.dumps(value) for key, value in facts.items()}}


def state_dict_of(net: saved.SavedNet) -> dict[str, np.ndarray]:
  """{PyTorch key: array} of a net; of a quantised one as `torch_quantised` says."""
  if isinstance(net.net, nets.Quantised):
    return torch_quantised.state_dict(net)
  return convert.to_torch(net.card["net"], net.variables)


def weights_differ(net: saved.SavedNet, written: dict[str, np.ndarray], read: dict[str, np.ndarray]) -> float:
  """0.0 if a state dict read back is the one that was written and is the net, bit for bit, else infinity."""
  same = written.keys() == read.keys() and all(np.array_equal(array, read[key]) for key, array in written.items())
  if same and not isinstance(net.net, nets.Quantised):
    same = checkpoint.digest(convert.from_torch(net.card["net"], read, net.variables)) == net.card["digest"]
  return 0.0 if same else float("inf")


def own_difference(net: saved.SavedNet) -> float:
  """The largest change of the JAX net's outputs when biases, scales and shifts are perturbed by ROUND_OFF.

  That perturbs what is rounded to levels, but not the levels of the weights. It is the largest of eight draws, as a
  fraction of the largest output.
  """
  inputs, _, call = signature(net)
  arrays, call, random = _random(net, inputs), jax.jit(call), np.random.default_rng(0)
  ours, found = np.asarray(call(net.variables, *arrays)), []

  def perturbed(leaf: jax.Array) -> jax.Array:
    return leaf * (1 + ROUND_OFF * random.standard_normal(leaf.shape)).astype(leaf.dtype) if leaf.ndim == 1 else leaf

  for _ in range(8):
    theirs = call({**net.variables, "params": jax.tree.map(perturbed, net.variables["params"])}, *arrays)
    found.append(np.max(np.abs(np.asarray(theirs) - ours)))
  return float(np.max(found) / np.max(np.abs(ours)))


def _random(net: saved.SavedNet, inputs: dict[str, tuple]) -> list[np.ndarray]:
  """A batch of these inputs, as large as the largest of BATCHES, and the same in every call."""
  random, size, classes = np.random.default_rng(0), max(BATCHES), net.card["num_classes"]
  return [
    random.standard_normal((size, *shape), dtype) if shape else random.integers(classes, size=size, dtype=dtype)
    for shape, dtype in inputs.values()
  ]


def largest_difference(
  net: saved.SavedNet, run: Callable[..., Any], after: Callable[[Any], np.ndarray] = np.asarray
) -> float:
  """Largest |run(*inputs) - after(net(*inputs))| over batches of sizes BATCHES, divided by the largest |after(...)|."""
  inputs, _, call = signature(net)
  arrays = _random(net, inputs)
  ours = after(jax.jit(call)(net.variables, *arrays))
  theirs = [np.asarray(run(*(a[:n] for a in arrays))) for n in BATCHES]
  if any(t.shape != ours[:n].shape for n, t in zip(BATCHES, theirs, strict=True)):
    return float("inf")
  differences = [np.max(np.abs(t - ours[:n])) for n, t in zip(BATCHES, theirs, strict=True)]
  return float(np.max(differences) / np.max(np.abs(ours)))  # a NaN stays one, and is refused


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags and exports; returns the exit code."""
  flags = Flags(prog="cpsc-jax export", description=__doc__.split("\n")[0])
  flags.add_argument("workdir", help="folder of a finished run, or a folder that contains a single saved net")
  flags.add_argument("--format", choices=tuple(FORMATS), help="default: what the suffix of --out stands for")
  flags.add_argument("--out", required=True, help="the file to write; it must not exist yet")
  flags.add_argument("--which", choices=saved.WHICH, help="which net of the run (default: student)")
  return run_command(lambda a: export(a.workdir, a.which, a.format or format_of(a.out), a.out), flags, argv)


if __name__ == "__main__":
  sys.exit(main())
