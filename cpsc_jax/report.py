"""Pictures and tables of a finished run, drawn from the files in its working directory alone."""

import json
import pathlib

import numpy as np
from rich.console import Console
from rich.table import Table

COLUMNS = 12


def draw(workdir, results):
  """Writes curves.png and, where there is a generator, samples.png into `workdir`.

  Reads history.json and samples.npz (images (C, n, H, W, K) in [0, 1]) there.
  """
  import matplotlib

  matplotlib.use("Agg")
  workdir = pathlib.Path(workdir)
  draw_curves(workdir / "curves.png", json.loads((workdir / "history.json").read_text()), results)
  if results["generator"]:
    fidelity = results["generator"]["label_fidelity_per_class"]
    kind = "samples of the pool" if "pool" in results["generator"] else "fresh samples"
    told = "row: class and label fidelity" if fidelity else "the generator knows no classes"
    title = f"{results['name']}, {results['arm']}, seed {results['seed']}: {kind}\n{told}"
    with np.load(workdir / "samples.npz") as samples:
      images = samples["images"]
      rows = [f"{c}   {f:.2f}" for c, f in enumerate(fidelity)] if fidelity else [""] * len(images)
      draw_samples(workdir / "samples.png", images, rows, title)


def draw_samples(path, images, rows, title):
  """A grid of images (C, n, H, W, K) in [0, 1] with one row per class, called as in `rows`."""
  import matplotlib.pyplot as plt

  grid, cell = mosaic(images)
  classes, columns = images.shape[:2]
  figure, axis = plt.subplots(figsize=(columns * 0.6 + 1.6, classes * 0.6 + 0.8), layout="constrained")
  axis.imshow(grid, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
  axis.set_yticks([cell * (c + 0.5) - 0.5 for c in range(classes)], rows, fontsize=12)
  axis.tick_params(length=0)
  axis.set_xticks([])
  axis.spines[:].set_visible(False)
  axis.set_title(title, fontsize=11)
  figure.savefig(path, dpi=80)
  plt.close(figure)


def mosaic(images):
  """(C, n, H, W, K) in [0, 1] -> one picture with white lines between the images, and its rows' height in pixels."""
  classes, columns, height, width, channels = images.shape
  line = max(1, height // 16)
  padding = ((0, 0), (0, 0), (0, line), (0, line), (0, 0))
  cells = np.pad(images, padding, constant_values=1.0)
  grid = cells.swapaxes(1, 2).reshape(classes * (height + line), columns * (width + line), channels)
  return (grid[..., 0] if channels == 1 else grid), height + line


def draw_curves(path, history, results):
  """Test accuracy and label fidelity, then every term of generator and student, over the epochs."""
  import matplotlib.pyplot as plt

  student = history["student"]
  terms = sorted({name for entry in student for name in entry["terms"]})
  players = sorted({name.split("/")[0] for name in terms})
  figure, axes = plt.subplots(1, 1 + len(players), figsize=(5.2 * (1 + len(players)), 4.2), layout="constrained")
  scored = [entry for entry in student if "accuracy" in entry]
  epochs = [entry["epoch"] for entry in scored]
  for name in ("accuracy", "agreement", "label_fidelity"):
    if scored and name in scored[0]:
      axes[0].plot(epochs, [entry[name] for entry in scored], label=name.replace("_", " "))
  teacher = results["teacher"]["accuracy"]
  axes[0].axhline(teacher, color="black", linestyle="--", linewidth=1, label=f"teacher {teacher:.4f}")
  last, best = results["student"]["last"], results["student"]["best"]
  axes[0].set(
    title=f"student: last {last['accuracy']:.4f}, best {best['accuracy']:.4f} (epoch {best['epoch']})", ylim=(0, 1.02)
  )
  for axis, player in zip(axes[1:], players, strict=True):
    for name in terms:
      if name.startswith(player + "/"):
        rows = [(entry["epoch"], entry["terms"][name]) for entry in student if name in entry["terms"]]
        axis.plot(*zip(*rows, strict=True), label=name.split("/")[1])
    axis.set(title=f"{player} terms (unweighted)", yscale="symlog")
  for axis in axes:
    axis.set_xlabel("epoch")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)
  figure.savefig(path, dpi=90)
  plt.close(figure)


def print_table(results):
  """The short table that ends a run."""
  teacher, student, generator = results["teacher"], results["student"], results["generator"]
  table = Table(title=f"{results['name']}: {results['arm']}, seed {results['seed']}", title_justify="left")
  for column, justify in (
    ("", "left"),
    ("net", "left"),
    ("parameters", "right"),
    ("accuracy", "right"),
    ("agreement", "right"),
  ):
    table.add_column(column, justify=justify)
  table.add_row("teacher", teacher["net"], f"{teacher['parameters']:,}", f"{teacher['accuracy']:.4f}", "")
  for which in ("last", "best"):
    row = student[which]
    label = f"student, {which} epoch ({row['epoch']})" + ("  <- headline" if which == results["headline"] else "")
    table.add_row(
      label, student["net"], f"{student['parameters']:,}", f"{row['accuracy']:.4f}", f"{row['agreement']:.4f}"
    )
  if generator:
    known = generator["label_fidelity"] is not None
    fidelity = f"label fidelity {generator['label_fidelity']:.3f}" if known else "no classes"
    table.add_row("generator", generator["net"], f"{generator['parameters']:,}", fidelity, "")
  console = Console(width=None if Console().is_terminal else 110)
  console.print(table)
  parts = results["seconds_by_part"]
  console.print(
    f"{results['seconds']:.0f} s in all (teacher {parts['teacher']:.0f} s, student {parts['student']:.0f} s) on"
    f" {results['hardware']['devices']} x {results['hardware']['device']}; {results['test_images']} test images"
  )
