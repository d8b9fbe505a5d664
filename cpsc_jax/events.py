"""Scalars for TensorBoard, written by the calling thread, so that an error such as a full disk is raised there."""

import pathlib
import time
from collections.abc import Mapping

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
  """An event file in `folder` that supersedes the earlier files there from step `first_step` on."""

  def __init__(self, folder: pathlib.Path, first_step: int):
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"))
    self._writer.write_event(
      Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
    )

  def add(self, step: int, scalars: Mapping[str, float]) -> None:
    """Appends {tag: value} of one step and flushes it to disk."""
    for tag, value in scalars.items():
      self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(tag, value)))
    self._writer.flush()
