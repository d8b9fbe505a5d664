"""What a run makes of its teacher: the tasks by name. A new one is a file here, a row, its keys, and a config."""

from typing import Any

from cpsc_jax import methods
from cpsc_jax.errors import Refusal
from cpsc_jax.tasks import incremental, quantise
from cpsc_jax.tasks.base import Task

TASKS: dict[str, Task] = {"distil": Task(), "quantise": quantise.TASK, "incremental": incremental.TASK}


def of(config: Any) -> Task:
  """The task that a config names.

  Raises:
    Refusal: there is none of this name.
  """
  if config.task not in TASKS:
    raise Refusal(f"config.task is '{config.task}'; it must be one of {', '.join(TASKS)}.")
  return TASKS[config.task]


def waiting_epochs(config: Any) -> int:
  """Epochs at the start in which the student is not trained: a method's warm-up, or what a task puts before it."""
  return of(config).waiting(config, methods.waiting_epochs(config))


__all__ = ["TASKS", "Task", "of", "waiting_epochs"]
