"""Scalars, pictures and settings for TensorBoard.

The calling thread writes them, so that an error such as a full disk is raised there.
"""

import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import hparams, image, scalar


class Events:
  """An event file in `folder` that supersedes the earlier files there from step `first_step` on."""

  def __init__(self, folder: pathlib.Path, first_step: int):
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"))
    self._writer.write_event(
      Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
    )

  def set_up(self, settings: Mapping[str, Any]) -> None:
    """Writes {name: value} as the hyper-parameters that TensorBoard compares accuracies by."""
    plain = {
      name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in settings.items()
    }
    for summary in hparams(plain, {"accuracy": None})[:2]:  # the third says that the run has ended
      self._writer.write_event(Event(wall_time=time.time(), step=0, summary=summary))

  def add(self, step: int, scalars: Mapping[str, float], pictures: Mapping[str, np.ndarray]) -> None:
    """Appends {tag: value} and {tag: images (rows, columns, H, W, K) uint8} of one step and flushes them to disk."""
    summaries = [scalar(tag, value) for tag, value in scalars.items()]
    for tag, images in pictures.items():
      rows, columns, height, width, channels = images.shape
      grid = images.swapaxes(1, 2).reshape(rows * height, columns * width, channels)
      summaries.append(image(tag, np.repeat(grid, 3 // channels, axis=-1), dataformats="HWC"))
    for summary in summaries:
      self._writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
    self._writer.flush()
