"""What pages are made of: a run's files, numbers that say where they are from, and pictures."""

import base64
import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from cpsc_jax.page import svg

MOST_CLASSES = 20  # rows of a picture of samples
SCORES = ("accuracy", "agreement", "label_fidelity", "pool_fidelity")
Table = dict[str, list]


@dataclasses.dataclass(frozen=True)
class Run:
  """What the files of a run say.

  Attributes:
    name: by which a comparison calls it, such as its folder.
    results: results.json; of a run that goes on, without what is not known yet.
    history: the student's entries in history.json.
    diagnoses: {epoch: arrays} of diagnostics/.
    samples: images (C, n, H, W, K) in [0, 1] of samples.npz, or None.
  """

  name: str
  results: dict[str, Any]
  history: list[dict]
  diagnoses: dict[int, dict[str, np.ndarray]]
  samples: np.ndarray | None = None

  @property
  def finished(self) -> bool:
    return "seconds" in self.results

  @property
  def last_diagnosis(self) -> int | None:
    return max(self.diagnoses, default=None)

  def value(self, path: str) -> Any:
    """What results.json has at a dotted path, in which numbers are places of a list."""
    found = self.results
    for key in path.split("."):
      found = found[int(key) if isinstance(found, list) else key]
    return found

  def of_results(self, path: str, form: str = ".4f", scale: float = 1) -> Markup:
    """The number at a dotted path of results.json."""
    return number(self.value(path), f"{self.name} results {path}", form, scale)

  def of_history(self, index: int, path: str, form: str = ".4f") -> Markup:
    """The number at a path of an entry of the history, steps of which are joined by "|"."""
    value = self.history[index]
    for key in path.split("|"):
      if key not in value:
        return Markup("")
      value = value[key]
    return number(value, f"{self.name} history {self.history[index]['epoch']} {path}", form)

  def of_diagnosis(self, name: str, *index: int, form: str = ".4f") -> Markup:
    """The number in an array of the last diagnosis."""
    array = self.diagnoses[self.last_diagnosis][name]
    place = ",".join(map(str, index))
    return number(array[index], f"{self.name} diagnosis {self.last_diagnosis} {name} {place}".strip(), form)


def number(value: float, source: str, form: str, scale: float = 1) -> Markup:
  """A number as it is shown, with its source; a dash for one that is not finite."""
  value = float(value)
  if not math.isfinite(value):
    return Markup("–")
  shown = significant(scale * value) if form == "g" else format(scale * value, form)
  return Markup('<data value="{}" data-from="{}">{}</data>').format(repr(value), source, shown)


def render(template: str, **values: Any) -> str:
  folder = pathlib.Path(__file__).parent / "templates"
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(folder),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template(template).render(version=version(), **values)


def version() -> str:
  try:
    return metadata.version("cpsc_jax")
  except metadata.PackageNotFoundError:
    return ""


def points_of(run: Run, path: str) -> list[tuple[float, float]]:
  points = []
  for entry in run.history:
    value = entry
    for key in path.split("|"):
      value = value.get(key, {}) if isinstance(value, Mapping) else {}
    if isinstance(value, int | float) and math.isfinite(value):
      points.append((entry["epoch"], value))
  return points


def points_over_classes(run: Run) -> list[tuple[int, float]]:
  """(classes seen so far, accuracy over them) after each phase of a run of several."""
  found = run.results["incremental"]
  return list(zip(np.cumsum(found["sizes"]).tolist(), found["accuracy"], strict=True))


def described(curves: Sequence[svg.Curve], unit: str = "epoch {}") -> str:
  """What curves show, in a sentence; `unit` is how a place along them is called."""
  told = []
  for curve in curves:
    (x1, y1), (x2, y2) = curve.points[0], curve.points[-1]
    first, last = unit.format(f"{x1:g}"), unit.format(f"{x2:g}")
    told.append(f"{curve.name} goes from {significant(y1)} at {first} to {significant(y2)} at {last}")
  return "; ".join(told)


def sheet(run: Run, columns: int) -> dict | None:
  if run.samples is None:
    return None
  images = run.samples[:MOST_CLASSES, :columns]
  names = class_names(run)[: len(images)]
  what = f"{images.shape[1]} samples in each of {len(images)} rows"
  caption = f"Rows from the top: {', '.join(names)}." if len(names) == len(images) else what
  return {**picture(images, f"{what}, {run.name}"), "caption": caption}


def picture(images: np.ndarray, alt: str) -> dict[str, Any]:
  """Images (C, n, H, W, K) in [0, 1] as one PNG, with lines between them."""
  classes, columns, height, width, channels = images.shape
  line = max(1, height // 16)
  cells = np.pad(images, ((0, 0), (0, 0), (0, line), (0, line), (0, 0)), constant_values=1.0)
  grid = cells.swapaxes(1, 2).reshape(classes * (height + line), columns * (width + line), channels)
  pixels = np.round(255 * np.clip(grid, 0, 1)).astype(np.uint8)
  picture, png = Image.fromarray(pixels[..., 0] if channels == 1 else pixels), io.BytesIO()
  picture.save(png, "PNG", optimize=True)
  source = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
  return {"src": source, "alt": alt, "width": grid.shape[1], "height": grid.shape[0]}


def class_names(run: Run) -> list[str]:
  return [str(name) for name in run.results.get("class_names", ())]


def plain(value: Any) -> str:
  """A value of a config as text."""
  return "–" if value is None else "(empty)" if value == "" else str(value)


def significant(value: float) -> str:
  """Four significant digits."""
  return f"{value:.4g}"
