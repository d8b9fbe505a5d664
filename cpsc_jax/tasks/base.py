"""What a task may decide. Loop, methods and sources are the same for all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from cpsc_jax.setup import Method, Setup
from cpsc_jax.state import State


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: functions from what distillation would have to what this task has; each by default changes nothing.

  Attributes:
    student: (config, the net called config.student.net, (H, W, K)) -> the net that learns.
    method: (config, the config's method, or that of an arm on real images, iterations of an epoch) -> the method: which
      labels are drawn, where batches come from, and in which iterations the student waits.
    optimiser: (config, the student's optimiser, its steps in an epoch) -> the optimiser.
    begin: (config, setup, state, (H, W, K)) -> the state that training begins with; the student has inherited its
      layers by then.
    report: (config, setup, scores before the first epoch, history) -> what results.json says beside the rest; None:
      nothing, and nothing is measured before the first epoch.
  """

  student: Callable[[Any, Any, tuple[int, int, int]], Any] = lambda config, net, shape: net
  method: Callable[[Any, Method, int], Method] = lambda config, method, iterations: method
  optimiser: Callable[[Any, optax.GradientTransformation, int], optax.GradientTransformation] = (
    lambda config, tx, steps: tx
  )
  begin: Callable[[Any, Setup, State, tuple[int, int, int]], State] = lambda config, setup, state, shape: state
  report: Callable[[Any, Setup, dict[str, float], list[dict]], dict[str, Any]] | None = None
