"""python -m benchmarks.onnx_integers QUANTISED FLOAT [--threads 1]

A quantised network and the float one it was made of, each a WORKDIR or the folder of a saved net, as ONNX files in
onnxruntime: their sizes, and the time of a batch, float / quantised, as the median of ratios of alternating calls
within one run. Above 1 the quantised network is faster.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np
import onnxruntime

from cpsc_jax import saved
from cpsc_jax.errors import Refusal
from cpsc_jax.interop import export

BATCHES, ROUNDS, SECONDS = (1, 16, 128), 15, 0.05


def session(net: saved.SavedNet, path: pathlib.Path, threads: int) -> onnxruntime.InferenceSession:
  export.write_onnx(path, net)
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads, options.log_severity_level = threads, 3
  return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def seconds(runs: onnxruntime.InferenceSession, images: np.ndarray) -> float:
  """Of one call, as the mean over as many as take SECONDS."""
  calls, start = 0, time.perf_counter()
  while time.perf_counter() - start < SECONDS or not calls:
    runs.run(None, {"images": images})
    calls += 1
  return (time.perf_counter() - start) / calls


def measure(quantised: saved.SavedNet, plain: saved.SavedNet, threads: int) -> dict[str, float]:
  """{"bytes, float", "bytes, quantised", "ratio, batch N"}."""
  with tempfile.TemporaryDirectory() as folder:
    paths = {name: pathlib.Path(folder, f"{name}.onnx") for name in ("float", "quantised")}
    nets = {"float": plain, "quantised": quantised}
    runs = {name: session(net, paths[name], threads) for name, net in nets.items()}
    found = {f"bytes, {name}": path.stat().st_size for name, path in paths.items()}
  shape = (plain.card["channels"], plain.card["image_size"], plain.card["image_size"])
  for batch in BATCHES:
    images = np.random.default_rng(0).standard_normal((batch, *shape), np.float32)
    for each in runs.values():
      each.run(None, {"images": images})
    taken = [{name: seconds(each, images) for name, each in runs.items()} for _ in range(ROUNDS)]
    found[f"ratio, batch {batch}"] = statistics.median(each["float"] / each["quantised"] for each in taken)
    found[f"ms, float, batch {batch}"] = 1000 * statistics.median(each["float"] for each in taken)
  return found


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.onnx_integers", description=__doc__.split("\n")[2])
  parser.add_argument("quantised", type=pathlib.Path)
  parser.add_argument("float", type=pathlib.Path)
  parser.add_argument("--threads", type=int, default=1)
  options = parser.parse_args(argv)
  try:
    nets = [saved.load(saved.find(folder)) for folder in (options.quantised, options.float)]
    if "quantised" not in nets[0].card or "quantised" in nets[1].card:
      raise Refusal("the first network must be quantised and the second not; give them in this order.")
  except Refusal as refusal:
    print(f"benchmarks.onnx_integers: {refusal}", file=sys.stderr)
    return 2
  for name, value in measure(*nets, options.threads).items():
    print(f"{name:>24} {value:,.0f}" if "bytes" in name else f"{name:>24} {value:.3f}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
