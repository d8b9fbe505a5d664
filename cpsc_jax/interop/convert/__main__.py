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
import numpy as np

from cpsc_jax import checkpoint, datasets, evaluate, nets, saved
from cpsc_jax.command import Flags, comma_separated, run_command
from cpsc_jax.errors import Refusal
from cpsc_jax.interop.convert import families, mapping, normalisations, torch_files
from cpsc_jax.mesh import make_mesh
from cpsc_jax.progress import say

CHECK_BATCH, CHECK_PIXELS = 250, 2**24  # images, and their pixels, that are classified together
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
    "--mean",
    type=numbers,
    help="per channel, of inputs in [0, 1] (default: what fits the images of --check or --images best; without images"
    " what is customary for the family or data set)",
  )
  flags.add_argument("--std", type=numbers, help="per channel, like --mean")
  flags.add_argument(
    "--image_size", type=int, help="height and width of the inputs (default: customary for the family or data set)"
  )
  flags.add_argument("--check", metavar="DATASET", help="measure the accuracy on the test split of this data set first")
  flags.add_argument(
    "--images", metavar="FOLDER", help="images like those it was trained on, unlabelled, to tell its normalisation by"
  )
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
  check_flags(args, card)
  chosen, doubts = normalisation(args, family, card, data, net, variables)
  card |= chosen

  say(f"{args.source}: {family.title}")
  parameters = nets.count_parameters(variables["params"])
  say(f"  net            {name}, {card['num_classes']} classes, {parameters:,} parameters")
  say(f"  images         {card['image_size']} x {card['image_size']} x {card['channels']}")
  say(f"  normalisation  mean {listed(card['mean'])}, std {listed(card['std'])}")
  say(f"                 {card['normalisation']}")
  for line in doubts:
    say(f"  WARNING        {line}")
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
  args: argparse.Namespace, family: families.Family, card: dict[str, Any], data: str | None, net: Any, variables: Any
) -> tuple[dict[str, Any], list[str]]:
  """({"mean", "std", "normalisation"} of the inputs, what is doubtful about them); the last says where they come from.

  Flags always win. Else, with images at hand, what fits the statistics best that the net has stored; else what is
  customary.

  Raises:
    Refusal: one of --mean and --std without the other, numbers that do not fit, or none given and none customary.
  """
  if bool(args.mean) != bool(args.std):
    raise Refusal("--mean and --std must be given together; add the other one or remove both.")
  channels = card["channels"]
  spec = datasets.find(data, args.data_dir).spec if data else None
  own = {
    "--mean and --std": (args.mean, args.std) if args.mean else None,
    "this family": None if family.normalisation == families.CIFAR and data == "cifar100" else family.normalisation,
    f"'{data}'": (spec.mean, spec.std) if spec and spec.mean else None,
  }
  for mean, std in filter(None, [own["--mean and --std"]]):
    if not len(mean) == len(std) == channels or not all(map(math.isfinite, [*mean, *std])) or not min(std) > 0:
      raise Refusal(f"--mean and --std must be {channels} finite numbers each, one per channel, and --std positive.")
    if max(map(abs, [*mean, *std])) > datasets.LARGEST_STATISTIC:
      raise Refusal("--mean and --std must be of pixels in [0, 1]: divide by 255 what is of pixels up to 255.")
  customary = next(((name, found) for name, found in own.items() if found and len(found[0]) == channels), None)
  tried = normalisations.candidates(channels, own)
  images = None if card["net"] in nets.GENERATORS else at_hand(args, card)
  matches = normalisations.rank(net, variables, images, tried) if images is not None else []
  if not customary and not matches:
    raise Refusal(
      f"no normalisation is customary for a net of {card['num_classes']} classes; give --mean and --std, or --images."
    )
  sure = bool(matches) and normalisations.is_sure(matches)
  if args.mean:
    better = sure and not normalisations.same((matches[0].mean, matches[0].std), (args.mean, args.std))
    doubts = [f"that of {matches[0].name} fits the images better: {ranking(matches)}"] if better else []
    origin = "from --mean and --std" if matches else "from --mean and --std, not compared with what the net has stored"
    return _chosen(args.mean, args.std, origin), doubts
  if sure:
    best = matches[0]
    return _chosen(best.mean, best.std, f"{best.name}: fits what the net has stored ({ranking(matches)})"), []
  if not customary:
    raise Refusal(f"no normalisation fits the images well ({ranking(matches)}); give --mean and --std.")
  if matches:
    doubts = [f"no normalisation fits the images well, or two do ({ranking(matches)}); give --mean and --std"]
  elif images is not None or card["net"] in nets.GENERATORS:
    doubts = []  # without batch norm there is nothing to compare
  else:
    doubts = ["not compared with what the net has stored: give --check, --images FOLDER, or --mean and --std"]
  return _chosen(*customary[1], f"customary for {customary[0]}"), doubts


def _chosen(mean: Sequence[float], std: Sequence[float], origin: str) -> dict[str, Any]:
  return {"mean": list(mean), "std": list(std), "normalisation": origin}


def at_hand(args: argparse.Namespace, card: dict[str, Any]) -> np.ndarray | None:
  """Images to tell the normalisation by, of --images or --check; None without either."""
  if args.images:
    return normalisations.images_below(args.images, card["image_size"], card["channels"])
  return normalisations.images_of(args.check, args.data_dir) if args.check else None


def ranking(matches: Sequence[normalisations.Match]) -> str:
  """The distances of the best four."""
  return ", ".join(f"{match.name} {match.distance:.4f}" for match in matches[:4])


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
  for flag in ("check", "images") if card["net"] in nets.GENERATORS else ():
    if getattr(args, flag):
      raise Refusal(f"{args.source} is a generator, and --{flag} is for classifiers; remove it.")
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
  batch = max(1, min(CHECK_BATCH, CHECK_PIXELS // card["image_size"] ** 2))
  classify = evaluate.compile_classifier(net, card["mean"], card["std"], batch, make_mesh())
  correct = int(jnp.sum(classify(variables, test.images).labels == test.labels))
  say(f"  accuracy       {correct / len(test):.4f} ({correct:,} of the {len(test):,} test images of '{args.check}')")
  return correct / len(test)


def listed(numbers: Iterable[float]) -> str:
  """Numbers as the user would write them, with commas."""
  return ", ".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
  sys.exit(main())
