"""What a run makes of its teacher: the tasks by name. A new one is a file here, a row, its keys, and a config."""

from typing import Any

from cpsc_jax.tasks import quantise
from cpsc_jax.tasks.base import Task

TASKS: dict[str, Task] = {"distil": Task(), "quantise": quantise.TASK}


def of(config: Any) -> Task:
  """The task that a config names."""
  return TASKS[config.task]


__all__ = ["TASKS", "Task", "of"]
