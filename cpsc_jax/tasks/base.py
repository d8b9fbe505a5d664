"""What a task may decide. Loop, methods and sources are the same for all of them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

from cpsc_jax import schema
from cpsc_jax.datasets import Dataset
from cpsc_jax.setup import Method, Setup, Term
from cpsc_jax.state import State, Tree


@dataclasses.dataclass(frozen=True)
class Task:
  """A task: functions from what distillation would have to what this task has; each by default changes nothing.

  Attributes:
    in_phases: whether a run is a sequence of runs (`cpsc_jax.phases`).
    arms: what may train the student.
    check: (config, data set, mesh) raises a Refusal of settings of its own that cannot be.
    known: (config, data set) -> how many classes the teacher has, the first of the data set's.
    check_teacher: (config, the teacher's module, (H, W, K)) raises a Refusal of a teacher that it cannot work with.
    of_teacher: (config, the teacher's card) -> the config of a run with this teacher.
    waiting: (config, epochs at the start in which the method does not train the student) -> the same with the task.
    student: (config, the net called config.student.net, (H, W, K)) -> the net that learns.
    method: (config, the config's method, or that of an arm on real images, iterations of an epoch) -> the method: which
      labels are drawn, where batches come from, and in which iterations the generator rests.
    optimiser: (config, the student's optimiser, its steps in an epoch, the net that learns, (H, W, K)) -> the
      optimiser.
    terms: (config, the net that learns, (H, W, K), its classes) -> {"generator" or "student": {name: Term}} that any
      method may have besides its own.
    learning_rate: (config, epoch (), the student's learning rate ()) -> what it is with the task, for the record.
    begin: (config, setup, state, (H, W, K), the teacher's variables) -> the state that training begins with; the
      student has inherited its layers by then.
    with_real: (config, setup, training images, the teacher's card) -> the setup, for a task whose student sees real
      images as well; None: it sees none, and no training split is opened.
    images: config -> how many images the student sees in an update.
    report: (config, setup, scores before the first epoch, history) -> what results.json says beside the rest; None:
      nothing, and nothing is measured before the first epoch.
  """

  in_phases: bool = False
  arms: tuple[str, ...] = (*schema.SYNTHETIC_ARMS, *schema.REAL_ARMS)
  check: Callable[[Any, Dataset, jax.sharding.Mesh], None] = lambda config, spec, mesh: None
  known: Callable[[Any, Dataset], int] = lambda config, spec: spec.num_classes
  check_teacher: Callable[[Any, Any, tuple[int, int, int]], None] = lambda config, teacher, shape: None
  of_teacher: Callable[[Any, dict], Any] = lambda config, card: config
  waiting: Callable[[Any, int], int] = lambda config, epochs: epochs
  student: Callable[[Any, Any, tuple[int, int, int]], Any] = lambda config, net, shape: net
  method: Callable[[Any, Method, int], Method] = lambda config, method, iterations: method
  optimiser: Callable[..., optax.GradientTransformation] = lambda config, tx, *_: tx
  terms: Callable[[Any, Any, tuple[int, int, int], int], dict[str, dict[str, Term]]] = lambda *_: {}
  learning_rate: Callable[[Any, jax.Array, jax.Array], jax.Array] = lambda config, epoch, rate: rate
  begin: Callable[[Any, Setup, State, tuple[int, int, int], Tree], State] = lambda config, setup, state, *_: state
  with_real: Callable[[Any, Setup, int, dict], Setup] | None = None
  images: Callable[[Any], int] = lambda config: config.schedule.batch_size
  report: Callable[[Any, Setup, dict[str, float], list[dict]], dict[str, Any]] | None = None
