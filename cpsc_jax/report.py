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
    with np.load(workdir / "samples.npz") as samples:
      draw_samples(workdir / "samples.png", samples["images"], results)


def draw_samples(path, images, results):
  """A grid with one row per class, labelled with the class and its label fidelity."""
  import matplotlib.pyplot as plt

  classes, columns, height, width, channels = images.shape
  fidelity = results["generator"]["label_fidelity_per_class"]
  gap = 0.08
  figure, axes = plt.subplots(
    classes, columns, figsize=(columns * 0.8 + 1.6, classes * 0.8 + 0.7), squeeze=False, layout="constrained"
  )
  figure.get_layout_engine().set(w_pad=gap / 4, h_pad=gap / 4, wspace=0, hspace=0)
  for c in range(classes):
    for column in range(columns):
      axis = axes[c, column]
      axis.imshow(images[c, column].squeeze(), cmap="gray" if channels == 1 else None, vmin=0, vmax=1)
      axis.set(xticks=[], yticks=[])
    axes[c, 0].set_ylabel(f"{c}  {fidelity[c]:.2f}", rotation=0, ha="right", va="center", fontsize=11)
  figure.suptitle(
    f"{results['name']}, {results['arm']}, seed {results['seed']}: fresh samples per class, with label fidelity",
    fontsize=12,
  )
  figure.savefig(path, dpi=80)
  plt.close(figure)


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
    fidelity = f"label fidelity {generator['label_fidelity']:.3f}"
    table.add_row("generator", generator["net"], f"{generator['parameters']:,}", fidelity, "")
  console = Console(width=None if Console().is_terminal else 110)
  console.print(table)
  parts = results["seconds_by_part"]
  console.print(
    f"{results['seconds']:.0f} s in all (teacher {parts['teacher']:.0f} s, student {parts['student']:.0f} s) on"
    f" {results['hardware']['devices']} x {results['hardware']['device']}; {results['test_images']} test images"
  )
