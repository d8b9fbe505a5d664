"""What a task may decide. Loop, methods and sources are the same for all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from cpsc_jax.datasets import Dataset
from cpsc_jax.setup import Method, Setup
from cpsc_jax.state import State


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: functions from what distillation would have to what this task has; each by default changes nothing.

  Attributes:
    check: (config, data set, mesh) raises a Refusal of settings of its own that cannot be.
    check_teacher: (config, the teacher's module, (H, W, K)) raises a Refusal of a teacher that it cannot work with.
    of_teacher: (config, the teacher's card) -> the config of a run with this teacher.
    waiting: (config, epochs at the start in which the method does not train the student) -> the same with the task.
    warmups: those of its keys that make the student wait, in epochs.
    student: (config, the net called config.student.net, (H, W, K)) -> the net that learns.
    method: (config, the config's method, or that of an arm on real images, iterations of an epoch) -> the method: which
      labels are drawn, where batches come from, and in which iterations the student waits.
    optimiser: (config, the student's optimiser, its steps in an epoch) -> the optimiser.
    begin: (config, setup, state, (H, W, K)) -> the state that training begins with; the student has inherited its
      layers by then.
    report: (config, setup, scores before the first epoch, history) -> what results.json says beside the rest; None:
      nothing, and nothing is measured before the first epoch.
  """

  check: Callable[[Any, Dataset, jax.sharding.Mesh], None] = lambda config, spec, mesh: None
  check_teacher: Callable[[Any, Any, tuple[int, int, int]], None] = lambda config, teacher, shape: None
  of_teacher: Callable[[Any, dict], Any] = lambda config, card: config
  waiting: Callable[[Any, int], int] = lambda config, epochs: epochs
  warmups: tuple[str, ...] = ()
  student: Callable[[Any, Any, tuple[int, int, int]], Any] = lambda config, net, shape: net
  method: Callable[[Any, Method, int], Method] = lambda config, method, iterations: method
  optimiser: Callable[[Any, optax.GradientTransformation, int], optax.GradientTransformation] = (
    lambda config, tx, steps: tx
  )
  begin: Callable[[Any, Setup, State, tuple[int, int, int]], State] = lambda config, setup, state, shape: state
  report: Callable[[Any, Setup, dict[str, float], list[dict]], dict[str, Any]] | None = None
