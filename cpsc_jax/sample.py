"""Draws fresh samples from the generator of a finished run, one row per class.

python -m cpsc_jax.sample WORKDIR --classes 3,5 --per_class 16 --out grid.png
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import datasets, report, saved
from cpsc_jax.command import Flags, carry_out
from cpsc_jax.errors import Refusal
from cpsc_jax.progress import say

LARGEST_ROW = 100  # images in a row of a picture


def sample(workdir, classes, per_class, seed, out):
  """Writes `per_class` samples of each class (all of them where `classes` is None) to the new file `out`.

  A .png is a picture with the classes' names; an .npz has images (C, n, H, W, K) in [0, 1] and labels (C,). A class's
  samples depend on the seed and on nothing else that is asked for.

  Raises:
    Refusal: no finished run or no generator, a class that it does not have, or an `out` that cannot be written.
  """
  kind = pathlib.Path(out).suffix
  most = LARGEST_ROW if kind == ".png" else np.inf
  if kind not in (".png", ".npz"):
    raise Refusal(f"--out {out} must end in .png (a picture) or .npz (arrays).")
  if not 1 <= per_class <= most:
    raise Refusal(f"--per_class {per_class} is not between 1 and {LARGEST_ROW}; an --out FILE.npz takes any number.")
  if not 0 <= seed < 2**32:
    raise Refusal(f"--seed {seed} is not between 0 and 2**32 - 1.")
  with saved.new_file(out) as scratch:
    generator = saved.load(saved.find(workdir, default="generator"))
    if not generator.is_generator:
      raise Refusal(f"{workdir} holds a {generator.card['net']}, not a generator.")
    card = generator.card
    if classes is not None and not card.get("conditional", True):
      raise Refusal(f"the generator in {workdir} knows no classes; leave --classes out.")
    classes = range(card["num_classes"]) if classes is None else classes
    for label in classes:
      if not 0 <= label < card["num_classes"]:
        raise Refusal(f"no class {label}: the generator in {workdir} has 0 to {card['num_classes'] - 1}.")
    images = datasets.denormalise(draw(generator, classes, per_class, seed), card["mean"], card["std"])
    if kind == ".npz":
      np.savez(scratch, images=images, labels=np.asarray(classes))
    else:
      names = saved.class_names(card) if card.get("conditional", True) else [""] * card["num_classes"]
      title = f"{card['net']} generator, seed {seed}: fresh samples"
      report.draw_samples(scratch, images, [names[label] for label in classes], title)
  say(f"{out}: {per_class} samples of each of {len(classes)} classes")


def draw(generator, classes, per_class, seed):
  """Samples (C, n, H, W, K) of a `SavedNet` in evaluation mode, in the teacher's normalised space."""

  def of_class(label):
    z = jax.random.normal(jax.random.fold_in(jax.random.key(seed), label), (per_class, generator.card["latent_dim"]))
    return generator.net.apply(generator.variables, z, jnp.full((per_class,), label), train=False)

  return jax.device_get(jax.jit(lambda labels: jax.lax.map(of_class, labels))(jnp.asarray(classes)))


def main(argv=None):
  """Parses flags and draws; returns the exit code."""
  integers = lambda text: [int(part) for part in text.split(",")]
  integers.__name__ = "comma-separated integers"
  flags = Flags(prog="python -m cpsc_jax.sample", description=__doc__.split("\n")[0])
  flags.add_argument("workdir", help="of a finished run, or a folder that holds a generator")
  flags.add_argument("--classes", type=integers, help="such as 3,5 (default: all)")
  flags.add_argument("--per_class", type=int, default=16, help="samples of each (default: %(default)s)")
  flags.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
  flags.add_argument("--out", required=True, help="FILE.png or FILE.npz; it must not exist yet")
  work = lambda args: sample(args.workdir, args.classes, args.per_class, args.seed, args.out)
  return carry_out(work, flags, argv)


if __name__ == "__main__":
  sys.exit(main())
