"""Converts a PyTorch checkpoint to a teacher.

    cpsc-jax convert resnet20.th --out teachers/resnet20 --check cifar10 --data_dir D

Family and architecture are recognised by keys and shapes. Nothing in the file is executed, and nothing is written
unless every key is used and every parameter is filled.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cpsc_jax import checkpoint, datasets, evaluate, nets, saved
from cpsc_jax.command import Flags, comma_separated, run_command
from cpsc_jax.errors import Refusal
from cpsc_jax.interop.convert import families, mapping, torch_files
from cpsc_jax.mesh import make_mesh
from cpsc_jax.progress import say

CHECK_BATCH = 250
SMALLEST, LARGEST = 8, 1024  # height and width of images in pixels


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags, converts, prints what was recognised; returns the exit code."""
  return run_command(convert, parser(), argv)


def parser() -> Flags:
  """The flags of `cpsc-jax convert`."""
  flags = Flags(prog="cpsc-jax convert", description=__doc__.split("\n")[0])
  numbers = comma_separated(float, "numbers")
  flags.add_argument("source", help="a PyTorch checkpoint or a .safetensors file")
  flags.add_argument("--out", required=True, help="the folder to write, for --config.teacher.checkpoint")
  flags.add_argument("--arch", help="the net that the file must contain, a name of cpsc_jax.nets such as wrn_40_2")
  flags.add_argument("--num_classes", type=int, help="the number of classes that the file must have")
  flags.add_argument(
    "--mean", type=numbers, help="per channel, of inputs in [0, 1] (default: customary for the family or data set)"
  )
  flags.add_argument("--std", type=numbers, help="per channel, like --mean")
  flags.add_argument(
    "--image_size", type=int, help="height and width of the inputs (default: customary for the family or data set)"
  )
  flags.add_argument("--check", metavar="DATASET", help="measure the accuracy on the test split of this data set first")
  flags.add_argument("--data_dir", default="", help="where it is prepared (default: $TFDS_DATA_DIR or TFDS's own)")
  return flags


def convert(args: argparse.Namespace) -> dict[str, Any]:
  """Reads args.source and writes args.out, whole or not at all; returns the card.

  Raises:
    Refusal: args.out exists, the file is not acceptable, or it does not fit the flags.
  """
  out = pathlib.Path(args.out)
  if out.exists():
    raise Refusal(f"{out} already exists; choose another --out or remove it first.")
  if args.check:
    datasets.find(args.check, args.data_dir).require()
  weights, sha256 = torch_files.read(args.source)
  shapes = {key: array.shape for key, array in weights.items()}
  family, name = families.recognise(shapes, args.arch)
  facts = family.measure(shapes)
  data = args.check or customary_data(facts)
  card = {"net": name, "family": family.title, "image_size": image_size(args, family, data), **facts}
  net, inputs = saved.rebuild(card)
  try:
    variables = mapping.from_torch(family.naming, weights, shapes_of(net, inputs))
  except Refusal as refusal:
    raise Refusal(f"{args.source} was recognised as {name} ({family.title}), but {refusal}") from refusal
  card |= normalisation(args, family, facts, data)
  check_flags(args, card)

  say(f"{args.source}: {family.title}")
  parameters = nets.count_parameters(variables["params"])
  say(f"  net            {name}, {card['num_classes']} classes, {parameters:,} parameters")
  say(f"  images         {card['image_size']} x {card['image_size']} x {card['channels']}")
  say(f"  normalisation  mean {listed(card['mean'])}, std {listed(card['std'])}")
  say(f"                 {card['normalisation']}")
  if args.check:
    card |= {"checked_on": args.check, "accuracy": accuracy(args, net, variables, card)}
  card |= {"source": pathlib.Path(args.source).name, "source_sha256": sha256}
  try:
    card = checkpoint.save_net(out, variables, card)
  except OSError as error:
    raise Refusal(f"cannot write {out} ({error.strerror}); choose another --out.") from error
  say(f"  digest         {card['digest']}")
  usage = "" if name in nets.GENERATORS else f"; use it as a teacher with --config.teacher.checkpoint={out}"
  say(f"written to {out}{usage}")
  return card


def customary_data(facts: dict[str, Any]) -> str | None:
  """The first data set of photographs with as many classes and channels, or None."""
  wanted = (facts["num_classes"], facts["channels"])
  rows = datasets.DATASETS.items()
  return next((name for name, row in rows if row.photographs and (row.num_classes, row.channels) == wanted), None)


def image_size(args: argparse.Namespace, family: families.Family, data: str | None) -> int:
  """Height and width of the inputs in pixels: from the flags, else customary for the family or the data set.

  Raises:
    Refusal: an --image_size that no net accepts.
  """
  of_data = datasets.find(data, args.data_dir).spec.image_size if data else 32
  customary = of_data if args.check else family.image_size or of_data
  size = customary if args.image_size is None else args.image_size
  if not SMALLEST <= size <= LARGEST:
    raise Refusal(f"--image_size must be between {SMALLEST} and {LARGEST}, got {size}.")
  return size


def normalisation(
  args: argparse.Namespace, family: families.Family, facts: dict[str, Any], data: str | None
) -> dict[str, Any]:
  """{"mean", "std", "normalisation"} of the inputs; the last says where the numbers come from.

  Raises:
    Refusal: one of --mean and --std without the other, numbers that do not fit, or none given and none customary.
  """
  if bool(args.mean) != bool(args.std):
    raise Refusal("--mean and --std must be given together; add the other one or remove both.")
  advice = "give --mean and --std if this net was trained with another"
  if args.mean:
    mean, std, origin = args.mean, args.std, "from --mean and --std"
  elif family.normalisation:
    (mean, std), origin = family.normalisation, f"customary for this family; {advice}"
  elif data and datasets.find(data, args.data_dir).spec.mean:
    spec = datasets.find(data, args.data_dir).spec
    mean, std, origin = spec.mean, spec.std, f"customary for '{data}'; {advice}"
  else:
    raise Refusal(f"no normalisation is customary for a net of {facts['num_classes']} classes; give --mean and --std.")
  channels = facts["channels"]
  if not len(mean) == len(std) == channels or not all(map(math.isfinite, [*mean, *std])) or not min(std) > 0:
    raise Refusal(f"--mean and --std must be {channels} finite numbers each, one per channel, and --std positive.")
  return {"mean": list(mean), "std": list(std), "normalisation": origin}


def shapes_of(net: Any, inputs: Iterable[jax.Array]) -> dict[str, Any]:
  """The shapes of a net's variables, {"params", "batch_stats"}; nothing is computed."""
  return jax.eval_shape(lambda key, *x: nets.init(net, key, *x), jax.random.key(0), *inputs)


def check_flags(args: argparse.Namespace, card: dict[str, Any]) -> None:
  """Raises a Refusal if the flags contradict the content of the file."""
  if args.num_classes not in (None, card["num_classes"]):
    raise Refusal(f"{args.source} has {card['num_classes']} classes, but --num_classes is {args.num_classes}.")
  if card["num_classes"] < 2:
    raise Refusal(f"{args.source} has one output; a classifier must have two classes or more.")
  if args.image_size not in (None, card["image_size"]):
    raise Refusal(
      f"{args.source} makes images of {card['image_size']} pixels, but --image_size is {args.image_size}; remove it."
    )
  if args.check and card["net"] in nets.GENERATORS:
    raise Refusal(f"{args.source} is a generator, and --check is for classifiers; remove it.")
  for key in ("num_classes", "image_size", "channels") if args.check else ():
    expected = getattr(datasets.find(args.check, args.data_dir).spec, key)
    if card[key] != expected:
      raise Refusal(
        f"--check {args.check}: the data set has {key} {expected}, but {args.source} has {card[key]}; remove --check"
        " or name a data set that fits."
      )


def accuracy(args: argparse.Namespace, net: Any, variables: dict[str, Any], card: dict[str, Any]) -> float:
  """Prints and returns the accuracy on the test split of --check, between 0 and 1."""
  test = datasets.find(args.check, args.data_dir).load_evaluation("test")
  classify = evaluate.compile_classifier(net, card["mean"], card["std"], CHECK_BATCH, make_mesh())
  correct = int(jnp.sum(classify(variables, test.images) == test.labels))
  say(f"  accuracy       {correct / len(test):.4f} ({correct:,} of the {len(test):,} test images of '{args.check}')")
  return correct / len(test)


def listed(numbers: Iterable[float]) -> str:
  """Numbers as the user would write them, with commas."""
  return ", ".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
  sys.exit(main())
