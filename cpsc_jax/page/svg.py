"""Charts as inline SVG: they scale, print, and follow the colours that `templates/base.html` gives by class."""

import dataclasses
import math
from collections.abc import Sequence

from markupsafe import Markup

WIDTH, HEIGHT = 360, 200  # of a chart, in its own units: about the pixels of a phone
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 8, 22  # margins
LONGEST = 11  # letters of a name beside a heatmap
COLOURS = 8  # classes c0, c1, ... of the page


@dataclasses.dataclass(frozen=True)
class Curve:
  """A curve of a chart.

  Attributes:
    name: in the legend.
    points: (x, y) pairs, both finite, x increasing.
    colour: number of its colour; equal numbers, equal colours.
    dashed: whether the line is broken.
  """

  name: str
  points: Sequence[tuple[float, float]]
  colour: int = 0
  dashed: bool = False


def chart(
  curves: Sequence[Curve],
  label: str,
  level: tuple[float, str] | None = None,
  span: tuple[float, float] | None = None,
  height: int = HEIGHT,
) -> Markup:
  """Curves over epochs.

  Args:
    label: what the picture shows, for those who do not see it.
    level: a horizontal line and its name, such as the teacher's accuracy.
    span: of the y axis; None: of the values.
  """
  curves = [curve for curve in curves if curve.points]
  xs = [x for curve in curves for x, _ in curve.points] or [0, 1]
  ys = [y for curve in curves for _, y in curve.points] + ([level[0]] if level else []) or [0, 1]
  low, high = span or (min(ys), max(ys))
  if high - low <= 1e-6 * max(abs(high), abs(low)):
    around = abs(high) / 10 or 1.0
    low, high = low - around, high + around
  first, last = min(xs), max(xs)

  def place(x: float, y: float) -> tuple[float, float]:
    across = (x - first) / (last - first) if last > first else 0.5
    up = (y - low) / (high - low)
    return LEFT + across * (WIDTH - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

  parts = []
  for tick in _ticks(low, high):
    _, y = place(first, tick)
    parts.append(
      Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
    )
    parts.append(Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 4, y + 4, _short(tick)))
  for x, side in ((first, "start"), (last, "end")) if last > first else ((first, "middle"),):
    parts.append(
      Markup('<text class="{}" x="{:.1f}" y="{}">{}</text>').format(side, place(x, low)[0], height - 6, _short(x))
    )
  if level:
    _, y = place(first, level[0])
    parts.append(
      Markup('<line class="level" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"><title>{} {:.4f}</title></line>').format(
        LEFT, WIDTH - RIGHT, y, y, level[1], level[0]
      )
    )
  for curve in curves:
    places = [place(x, y) for x, y in curve.points]
    classes = f"line c{curve.colour % COLOURS}{' dashed' if curve.dashed else ''}"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts.append(
      Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(classes, path, curve.name)
    )
    if len(places) <= 20:
      parts += [
        Markup('<circle class="dot c{}" cx="{:.1f}" cy="{:.1f}" r="2.2"><title>{}: {} at {}</title></circle>').format(
          curve.colour % COLOURS, x, y, curve.name, _short(value), _short(epoch)
        )
        for (x, y), (epoch, value) in zip(places, curve.points, strict=True)
      ]
  return _picture(WIDTH, height, label, parts)


def heatmap(values: Sequence[Sequence[float]], names: Sequence[str], label: str, signed: bool = False) -> Markup:
  """A square table of numbers as shades: of shares 0 to 1, or, `signed`, of -1 (one colour) to 1 (another).

  Numbers stand in the cells where there are at most 12 rows.
  """
  number = len(names)
  written = number <= 12
  cell = (WIDTH - 70) / max(number, 1)
  parts = []
  for row, name in enumerate(names):
    y = row * cell
    if number <= 30:
      parts.append(
        Markup('<text class="end" x="64" y="{:.1f}">{}</text>').format(y + cell / 2 + 4, _cut(name, LONGEST))
      )
    for column, other in enumerate(names):
      value = float(values[row][column])
      shade, x = abs(value) if math.isfinite(value) else 0.0, 68 + column * cell
      kind = "minus" if signed and value < 0 else "plus"
      shown = f"{value:.2f}" if math.isfinite(value) else "-"
      parts.append(
        Markup(
          '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" style="opacity:{:.3f}">'
          "<title>{} / {}: {}</title></rect>"
        ).format(kind, x, y, cell - 1, cell - 1, min(shade, 1.0), name, other, shown)
      )
      if written and (signed or value >= 0.005):
        small = " small" if number > 6 else ""
        parts.append(
          Markup('<text class="middle{}{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
            " on" if shade > 0.55 else "",
            small,
            x + cell / 2,
            y + cell / 2 + 4,
            shown if signed else shown.removeprefix("0"),
          )
        )
  bottom = number * cell
  if number <= 30:
    for column, name in enumerate(names):
      x = 68 + (column + 0.5) * cell
      parts.append(
        Markup('<text class="end" transform="translate({:.1f},{:.1f}) rotate(-60)">{}</text>').format(
          x + 4, bottom + 10, _cut(name, LONGEST)
        )
      )
  longest = max((len(_cut(name, LONGEST)) for name in names), default=0)
  return _picture(WIDTH, bottom + (16 + 6 * longest if number <= 30 else 4), label, parts)


def reliability(counts: Sequence[float], confidence: Sequence[float], accuracy: Sequence[float], label: str) -> Markup:
  """A reliability diagram: accuracy by confidence, and the diagonal of a calibrated predictor."""
  side = WIDTH - LEFT - RIGHT
  height, total = side * 0.7, max(sum(counts), 1)

  def place(x: float, y: float) -> tuple[float, float]:
    return LEFT + x * side, 12 + (1 - y) * height

  (x1, y1), (x2, y2) = place(0, 0), place(1, 1)
  parts = [Markup('<line class="level" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(x1, y1, x2, y2)]
  for tick in (0.0, 0.5, 1.0):
    x, y = place(tick, tick)
    parts.append(Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 4, y + 4, tick))
    parts.append(Markup('<text class="middle" x="{:.1f}" y="{:.1f}">{}</text>').format(x, 12 + height + 16, tick))
  for count, sure, right in zip(counts, confidence, accuracy, strict=True):
    if count:
      x, y = place(float(sure), float(right))
      parts.append(
        Markup('<circle class="dot c0" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>').format(
          x, y, 2.5 + 9 * (count / total) ** 0.5, f"{int(count)} images: confidence {sure:.3f}, accuracy {right:.3f}"
        )
      )
  return _picture(WIDTH, 12 + height + 22, label, parts)


def bars(values: Sequence[float], names: Sequence[str], label: str) -> Markup:
  """A bar for every named number, none negative."""
  top = max([float(value) for value in values if math.isfinite(value)] or [1.0]) or 1.0
  step = (WIDTH - LEFT - RIGHT) / max(len(names), 1)
  parts = []
  for tick in (0.0, top):
    y = TOP + (1 - tick / top) * 130
    parts.append(
      Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, WIDTH - RIGHT, y, y)
    )
    parts.append(Markup('<text class="end" x="{}" y="{:.1f}">{}</text>').format(LEFT - 4, y + 4, _short(tick)))
  for i, (value, name) in enumerate(zip(values, names, strict=True)):
    tall = 130 * (float(value) / top if math.isfinite(value) else 0.0)
    parts.append(
      Markup(
        '<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}: {}</title></rect>'
      ).format(LEFT + i * step + step * 0.1, TOP + 130 - tall, step * 0.8, tall, name, _short(float(value)))
    )
  return _picture(WIDTH, TOP + 136, label, parts)


def _picture(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
  return Markup('<svg viewBox="0 0 {:.0f} {:.0f}" role="img" aria-label="{}">{}</svg>').format(
    width, height, label, Markup("").join(parts)
  )


def _ticks(low: float, high: float) -> list[float]:
  """Two to six round numbers from low to high."""
  raw = (high - low) / 5
  unit = 10.0 ** math.floor(math.log10(raw))
  step = next(factor * unit for factor in (1, 2, 5, 10) if raw <= factor * unit)
  return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
  text = f"{value:.3g}"
  return text.replace("e+0", "e").replace("e-0", "e-") if "e" in text else text


def _cut(text: str, length: int) -> str:
  return text if len(text) <= length else text[: length - 1] + "…"
