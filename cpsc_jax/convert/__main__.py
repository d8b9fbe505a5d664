"""Makes a teacher of a PyTorch checkpoint.

    python -m cpsc_jax.convert resnet20.th --out teachers/resnet20 --check cifar10 --data_dir D

Family and architecture are recognised by keys and shapes. Nothing in the file is executed, and nothing is written
unless every key is used and every parameter filled.
"""

import math
import pathlib
import sys

import jax
import jax.numpy as jnp

from cpsc_jax import checkpoint, datasets, evaluate, nets, saved
from cpsc_jax.command import Flags, carry_out
from cpsc_jax.convert import families, mapping, torch_files
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import make_mesh
from cpsc_jax.progress import say

CHECK_BATCH = 250


def main(argv=None):
  """Parses flags, converts, prints what was recognised; returns the exit code."""
  return carry_out(convert, parser(), argv)


def parser():
  flags = Flags(prog="python -m cpsc_jax.convert", description=__doc__.split("\n")[0])
  numbers = lambda text: [float(number) for number in text.split(",")]
  numbers.__name__ = "comma-separated numbers"
  flags.add_argument("source", help="a PyTorch checkpoint or a .safetensors file")
  flags.add_argument("--out", required=True, help="the folder to write; config.teacher.checkpoint takes it")
  flags.add_argument("--arch", help="what the file must be, by a name of cpsc_jax.nets, such as wrn_40_2")
  flags.add_argument("--num_classes", type=int, help="how many classes the file must have")
  flags.add_argument("--mean", type=numbers, help="per channel, of inputs in [0, 1] (default: the family's customary)")
  flags.add_argument("--std", type=numbers, help="likewise")
  flags.add_argument("--image_size", type=int, help="height and width of the inputs (default: the family's usual)")
  flags.add_argument("--check", metavar="DATASET", help="measure the accuracy on this data set's test split first")
  flags.add_argument("--data_dir", default="", help="where it is prepared (default: $TFDS_DATA_DIR or TFDS's own)")
  return flags


def convert(args):
  """Reads args.source and writes args.out, whole or not at all; returns the card.

  Raises:
    Refusal: args.out exists, the file is not acceptable, or it does not fit what the flags say.
  """
  out = pathlib.Path(args.out)
  if out.exists():
    raise Refusal(f"{out} exists; choose another --out or remove it first.")
  if args.check:
    datasets.require(args.check, args.data_dir)
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
    raise Refusal(f"{args.source} was taken for {name} ({family.title}), but {refusal}") from refusal
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
  say(f"written to {out}" + ("" if name in nets.GENERATORS else f"; use it by --config.teacher.checkpoint={out}"))
  return card


def customary_data(facts):
  """The first data set of photographs with as many classes and channels, or None."""
  wanted = (facts["num_classes"], facts["channels"])
  rows = datasets.DATASETS.items()
  return next((name for name, row in rows if row.photographs and (row.num_classes, row.channels) == wanted), None)


def image_size(args, family, data):
  """Height and width of the inputs: as the flags say, else as usual for the family or the data set."""
  of_data = datasets.describe(data, args.data_dir).image_size if data else 32
  usual = of_data if args.check else family.image_size or of_data
  size = usual if args.image_size is None else args.image_size
  if not 8 <= size <= 1024:
    raise Refusal(f"--image_size {size} cannot be; from 8 to 1024 pixels can.")
  return size


def normalisation(args, family, facts, data):
  """mean, std and where they are from."""
  if bool(args.mean) != bool(args.std):
    raise Refusal("--mean and --std belong together; give both or neither.")
  advice = "if the training used another, give --mean and --std"
  if args.mean:
    mean, std, origin = args.mean, args.std, "as given"
  elif family.normalisation:
    (mean, std), origin = family.normalisation, f"customary for this family; {advice}"
  elif data and datasets.describe(data, args.data_dir).mean:
    spec = datasets.describe(data, args.data_dir)
    mean, std, origin = spec.mean, spec.std, f"that of '{data}', as is customary; {advice}"
  else:
    raise Refusal(f"no normalisation is customary for {facts['num_classes']} classes; give --mean and --std.")
  if not len(mean) == len(std) == facts["channels"] or not all(map(math.isfinite, mean)) or not min(std) > 0:
    raise Refusal(f"{facts['channels']} channels need as many finite --mean and positive --std.")
  return {"mean": list(mean), "std": list(std), "normalisation": origin}


def shapes_of(net, inputs):
  shapes = jax.eval_shape(lambda *x: net.init(jax.random.key(0), *x, train=True), *inputs)
  return {"params": shapes["params"], "batch_stats": shapes["batch_stats"]}


def check_flags(args, card):
  """Raises a Refusal where the flags contradict what the file holds."""
  if args.num_classes not in (None, card["num_classes"]):
    raise Refusal(f"{args.source} has {card['num_classes']} classes, not the {args.num_classes} of --num_classes.")
  if card["num_classes"] < 2:
    raise Refusal(f"{args.source} has one output; a classifier has two classes or more.")
  if args.image_size not in (None, card["image_size"]):
    raise Refusal(
      f"{args.source} makes images of {card['image_size']} pixels, not the {args.image_size} of --image_size."
    )
  if args.check and card["net"] in nets.GENERATORS:
    raise Refusal(f"{args.source} is a generator; --check is for classifiers.")
  for key in ("num_classes", "image_size", "channels") if args.check else ():
    wanted = getattr(datasets.describe(args.check, args.data_dir), key)
    if card[key] != wanted:
      raise Refusal(
        f"--check {args.check} has {key} {wanted}, but {args.source} {card[key]}; leave it out or change it."
      )


def accuracy(args, net, variables, card):
  """Test accuracy on the data set of --check, printed and returned."""
  test = datasets.load_test(args.check, args.data_dir)
  classify = evaluate.compile_classifier(net, card["mean"], card["std"], CHECK_BATCH, make_mesh())
  correct = int(jnp.sum(classify(variables, test.images) == test.labels))
  say(f"  accuracy       {correct / len(test):.4f} ({correct:,} of the {len(test):,} test images of '{args.check}')")
  return correct / len(test)


def listed(numbers):
  return ", ".join(f"{number:g}" for number in numbers)


if __name__ == "__main__":
  sys.exit(main())
