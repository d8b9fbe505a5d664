"""Scalars for TensorBoard, written by the calling thread, so that a disk that is full raises here and now."""

import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar


class Events:
  """An event file in `folder` that replaces what earlier files there say from `first_step` on."""

  def __init__(self, folder, first_step):
    folder.mkdir(parents=True, exist_ok=True)
    self._writer = EventsWriter(str(folder / "events"))
    self._writer.write_event(
      Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
    )

  def add(self, step, scalars):
    """Appends {name: value} of one step and hands it to the disk."""
    for name, value in scalars.items():
      self._writer.write_event(Event(wall_time=time.time(), step=step, summary=scalar(name, value)))
    self._writer.flush()
