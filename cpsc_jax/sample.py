"""Draws fresh samples from the generator of a finished run, one row per class.

cpsc-jax sample WORKDIR --classes 3,5 --per_class 16 --out grid.png
"""

import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import datasets, report, saved
from cpsc_jax.command import Flags, comma_separated, run_command
from cpsc_jax.errors import Refusal
from cpsc_jax.progress import say

LARGEST_ROW = 100  # images in a row of a picture


def sample(
  workdir: str | pathlib.Path, classes: Sequence[int] | None, per_class: int, seed: int, out: str | pathlib.Path
) -> None:
  """Writes `per_class` samples of each class (of all classes if `classes` is None) to the new file `out`.

  A .png file is a picture with the names of the classes; an .npz file has images (C, n, H, W, K) in [0, 1] and labels
  (C,). Sample i of a class depends on `seed` alone, not on which others are drawn.

  Raises:
    Refusal: no finished run or no generator, a class that it does not have, or an `out` that cannot be written.
  """
  kind = pathlib.Path(out).suffix
  if kind not in (".png", ".npz"):
    raise Refusal(f"--out must end in .png (a picture) or .npz (arrays), got {out}.")
  if per_class < 1:
    raise Refusal(f"--per_class must be at least 1, got {per_class}.")
  if kind == ".png" and per_class > LARGEST_ROW:
    raise Refusal(f"--per_class must be at most {LARGEST_ROW} for a picture, got {per_class}; use --out FILE.npz.")
  if not 0 <= seed < 2**32:
    raise Refusal(f"--seed must be between 0 and 2**32 - 1, got {seed}.")
  folder = saved.find(workdir, default="generator")
  with saved.new_files(out) as (scratch,):
    generator = saved.load(folder)
    card = generator.card
    if not generator.is_generator:
      raise Refusal(f"the net in {workdir} is a {card['net']}, not a generator; give the WORKDIR of a finished run.")
    conditional = card.get("conditional", True)
    if classes is not None and not conditional:
      raise Refusal(f"the generator in {workdir} is not class-conditional; remove --classes.")
    classes = range(card["num_classes"]) if classes is None else classes
    for label in classes:
      if not 0 <= label < card["num_classes"]:
        raise Refusal(f"no class {label}: the generator in {workdir} has classes 0 to {card['num_classes'] - 1}.")
    images = datasets.denormalise(draw(generator, classes, per_class, seed), card["mean"], card["std"])
    if kind == ".npz":
      np.savez(scratch, images=images, labels=np.asarray(classes))
    else:
      names = saved.class_names(card) if conditional else [""] * card["num_classes"]
      title = f"{card['net']} generator, seed {seed}: fresh samples"
      report.draw_samples(scratch, images, [names[label] for label in classes], title)
  say(f"{out}: {per_class} samples of each of {len(classes)} classes")


def draw(generator: saved.SavedNet, classes: Sequence[int], per_class: int, seed: int) -> np.ndarray:
  """Samples (C, n, H, W, K) in evaluation mode, normalised as the teacher's inputs are."""

  def of_class(label):
    z = jax.random.normal(jax.random.fold_in(jax.random.key(seed), label), (per_class, generator.card["latent_dim"]))
    return generator.net.apply(generator.variables, z, jnp.full((per_class,), label), train=False)

  return jax.device_get(jax.jit(lambda labels: jax.lax.map(of_class, labels))(jnp.asarray(classes)))


def main(argv: Sequence[str] | None = None) -> int:
  """Parses flags and draws; returns the exit code."""
  flags = Flags(prog="cpsc-jax sample", description=__doc__.split("\n")[0])
  flags.add_argument("workdir", help="folder of a finished run, or a folder that contains a saved generator")
  flags.add_argument("--classes", type=comma_separated(int, "integers"), help="such as 3,5 (default: all)")
  flags.add_argument("--per_class", type=int, default=16, help="samples of each class (default: %(default)s)")
  flags.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
  flags.add_argument("--out", required=True, help="FILE.png or FILE.npz; it must not exist yet")
  return run_command(lambda a: sample(a.workdir, a.classes, a.per_class, a.seed, a.out), flags, argv)


if __name__ == "__main__":
  sys.exit(main())
