"""The one training loop: teachers, control arms and distillations all run through `train`."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import environment, stop
from cpsc_jax.checkpoint import Checkpointer
from cpsc_jax.errors import NonFiniteLoss, Preempted
from cpsc_jax.events import Events
from cpsc_jax.mesh import any_process, is_primary, make_mesh, replicate
from cpsc_jax.progress import Steps, say, working
from cpsc_jax.state import Losses

Tree = Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """What one training does: its epoch, what is measured, how often it is saved.

  Attributes:
    title: its name in progress lines and messages.
    epoch: state -> (state, {player: losses}); a jitted function that may donate its argument. The arrays of the losses
      have shape (iterations, steps of the player), and a player that takes no step is left out or has size 0.
    measure: state -> {name: scalar} with at least "accuracy"; jitted.
    variables: state -> what is kept of the best epoch.
    epochs: how many there are in all.
    measure_every: `measure` runs after every so many epochs, and after the last one.
    save_every, save_minutes: a checkpoint is written after every so many epochs, and at the end of an epoch during
      which the last one has become so many minutes old.
    workdir: holds checkpoints/ and events/; None: nothing is written, nothing can be resumed, and SIGTERM ends the
      program as usual.
    on_epoch: is called with every new entry of the history, on every process.
    origin: digests of what this training comes from (`checkpoint.ORIGIN`); a checkpoint of another origin is refused.
    diagnose: (state, epoch) -> {name: array, or a dictionary of arrays}, after every `diagnose_every` epochs and after
      the last one; 0: never. What is a single number joins the history, as entry["diagnostics"]; what is images
      (rows, columns, H, W, K) uint8 is shown by TensorBoard.
    journal: (history so far, the arrays that its last epoch's diagnosis gave and the seconds that the epoch took); is
      called on process 0 after every epoch.
    settings: {name: value} of the config, for TensorBoard.
  """

  title: str
  epoch: Callable[[Tree], tuple[Tree, dict[str, Losses]]]
  measure: Callable[[Tree], dict[str, jax.Array]]
  variables: Callable[[Tree], Tree]
  epochs: int
  measure_every: int
  save_every: int
  save_minutes: float
  workdir: pathlib.Path | None
  on_epoch: Callable[[dict], None] | None = None
  origin: Mapping[str, str] = dataclasses.field(default_factory=dict)
  diagnose: Callable[[Tree, int], Tree] | None = None
  diagnose_every: int = 0
  journal: Callable[[list[dict], dict], None] | None = None
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a training ended with.

  Attributes:
    state: after the last epoch.
    best_epoch: the first of those with the highest accuracy.
    best_variables: plan.variables after it.
    history: one entry per epoch, {"epoch": 1, "terms": {"generator/ce": 0.1, ...}, "totals": {"generator": 1.2, ...}}:
      means over the epoch of the unweighted terms and of their weighted sums; measured epochs have the scores as well,
      diagnosed ones {"diagnostics": {name: number}}.
    seconds: how long it took, over all processes that it was resumed by.
    earlier_seconds: those of them before this process resumed it.
    environments: every environment (`environment.describe`) that it was computed in, this one last.
  """

  state: Tree
  best_epoch: int
  best_variables: Tree
  history: list[dict]
  seconds: float
  earlier_seconds: float
  environments: list[dict]


def train(plan: Plan, state: Tree) -> Outcome:
  """Runs `plan` from `state`, or resumes it from the last checkpoint under plan.workdir/checkpoints.

  The host reads an epoch's numbers only after the next epoch is under way. A checkpoint holds the state, the best
  epoch's variables and the whole history, so that a resumed run is bit-identical to one without interruption.

  Args:
    plan: what to do.
    state: the initial state, on all devices; also the structure of what is restored.

  Raises:
    NonFiniteLoss: names the term and the step; the last checkpoint before it is kept.
    Preempted: SIGTERM reached one of the processes; the epochs done are saved.
  """
  started = last_save = time.monotonic()
  best = {"accuracy": jnp.float32(-1), "epoch": jnp.int32(0)}
  best = {**replicate(best, make_mesh()), "variables": jax.tree.map(jnp.copy, plan.variables(state))}
  history, earlier_seconds, environments = [], 0.0, []

  with _checkpoints(plan) as checkpointer:
    restored = checkpointer and _restore(plan, checkpointer, {"state": state, "best": best})
    if restored:
      tree, record = restored
      state, best, history, earlier_seconds = tree["state"], tree["best"], record["history"], record["seconds"]
      environments = record["environments"]
    if (here := environment.describe()) not in environments[-1:]:
      environments.append(here)
    with Steps(plan.title, plan.epochs, len(history)) as progress, _deferred_sigterm(plan) as sigterm_arrived:
      log = _Log(plan, history, progress, checkpointer)
      unread = None
      for epoch in range(len(history) + 1, plan.epochs + 1):
        last = epoch == plan.epochs
        with progress.calling(plan.epoch):
          state, losses = plan.epoch(state)
        scores = {}
        if last or epoch % plan.measure_every == 0:
          with progress.calling(plan.measure):
            scores = plan.measure(state)
          best = _better(best, scores["accuracy"], epoch, plan.variables(state))
        diagnosis = {}
        if plan.diagnose and plan.diagnose_every and (last or epoch % plan.diagnose_every == 0):
          with progress.calling(plan.diagnose):
            diagnosis = plan.diagnose(state, epoch)

        stopping, overdue = log.read(unread) if unread else (False, False)
        # What one process asks for reaches all with the epoch's numbers, so that all act after the same epoch.
        minutes = (time.monotonic() - last_save) / 60
        unread = _Unread(
          epoch, losses, scores, diagnosis, any_process(sigterm_arrived()), any_process(minutes >= plan.save_minutes)
        )
        saving = checkpointer and (last or stopping or overdue or epoch % plan.save_every == 0)
        if saving or last:
          stopping = log.read(unread)[0] or stopping
          unread = None
        if saving:
          last_save = time.monotonic()
          record = {"history": list(history), "seconds": earlier_seconds + last_save - started}
          record["environments"] = environments
          with working(f"{plan.title}: saving epoch {epoch}"):
            checkpointer.save(epoch, {"state": state, "best": best}, record)
        if stopping or (last and any_process(sigterm_arrived())):
          raise Preempted(
            f"{plan.title}: stopped by SIGTERM; epoch {epoch} is saved, and the same command resumes after it."
          )
  seconds = earlier_seconds + time.monotonic() - started
  return Outcome(state, int(best["epoch"]), best["variables"], history, seconds, earlier_seconds, environments)


@dataclasses.dataclass(frozen=True)
class _Unread:
  """An epoch that may still be running: its numbers are on the devices, and reading one waits for it.

  Attributes:
    epoch: which it is.
    losses, scores, diagnosis: as plan.epoch, plan.measure and plan.diagnose return them; none where nothing was
      measured or diagnosed.
    stop, save: whether any process asks to stop, or for a checkpoint.
  """

  epoch: int
  losses: dict[str, Losses]
  scores: dict[str, jax.Array]
  diagnosis: Tree
  stop: jax.Array | bool
  save: jax.Array | bool


class _Log:
  """The history of a training, and what follows it: the event file, the progress shown and plan.on_epoch."""

  def __init__(self, plan: Plan, history: list[dict], progress: Steps, checkpointer: Checkpointer | None):
    self._plan, self._history, self._progress, self._checkpointer = plan, history, progress, checkpointer
    writes = plan.workdir is not None and is_primary()
    self._events = Events(plan.workdir / "events", len(history) + 1) if writes else None
    if self._events and plan.settings:
      self._events.set_up(plan.settings)
    self._journal = plan.journal if is_primary() else None
    self._read_at = time.monotonic()

  def read(self, unread: _Unread) -> tuple[bool, bool]:
    """Waits for an epoch, appends it to the history, and returns whether to stop and whether to save."""
    losses, scores, diagnosis = jax.device_get((unread.losses, unread.scores, unread.diagnosis))
    now = time.monotonic()
    seconds, self._read_at = now - self._read_at, now
    losses = {player: values for player, values in losses.items() if values.total.size}
    if not_finite := not_finite_in(losses):
      kept = self._checkpointer.latest() if self._checkpointer else None
      where = (
        "" if kept is None else f" the checkpoint of epoch {kept} is kept in {self._plan.workdir / 'checkpoints'};"
      )
      raise NonFiniteLoss(
        f"{self._plan.title}: the loss is not finite in epoch {unread.epoch}, {not_finite};{where} lower the learning"
        " rate or the weight of the term."
      )
    terms = {
      f"{player}/{name}": float(np.mean(values)) for player, of in losses.items() for name, values in of.terms.items()
    }
    totals = {player: float(np.mean(of.total)) for player, of in losses.items()}
    scores = {name: float(score) for name, score in scores.items()}
    entry = {"epoch": unread.epoch, "terms": terms, "totals": totals, **scores}
    numbers = {
      name: float(value)
      for name, value in diagnosis.items()
      if not isinstance(value, dict) and np.ndim(value) == 0 and np.isfinite(value)
    }
    if diagnosis:
      entry["diagnostics"] = numbers
    self._history.append(entry)
    if self._events:
      weighted = {f"{player}/total": total for player, total in totals.items()}
      found = {f"diagnostics/{name}": value for name, value in numbers.items()}
      pictures = {name: array for name, array in diagnosis.items() if np.ndim(array) == 5}
      self._events.add(unread.epoch, {**terms, **weighted, **scores, **found, "epoch_seconds": seconds}, pictures)
    if self._journal:
      self._journal(self._history, {**diagnosis, "epoch_seconds": np.float64(seconds)} if diagnosis else {})
    shown = scores or {f"{player} loss": total for player, total in totals.items()}
    self._progress.advance(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in shown.items()))
    if self._plan.on_epoch:
      self._plan.on_epoch(entry)
    return bool(unread.stop), bool(unread.save)


def not_finite_in(losses: dict[str, Losses]) -> str:
  """The first iteration of an epoch with a value that is not finite, and its terms; empty if all are finite.

  Of a player whose terms are all finite there, the weighted total is named.

  Args:
    losses: {player: losses} on the host, arrays (iterations, steps); none of size 0.
  """
  bad = {}  # {name: the first iteration in which it is not finite}
  for player, of in losses.items():
    for name, values in {**of.terms, "total": of.total}.items():
      iterations = np.flatnonzero(~np.isfinite(values).all(axis=1))
      if iterations.size:
        bad[player, name] = iterations[0]
  if not bad:
    return ""
  first = min(bad.values())
  there = [key for key, iteration in bad.items() if iteration == first]
  blamed = {player for player, name in there if name != "total"}
  names = [f"{player}/{name}" for player, name in there if name != "total" or player not in blamed]
  return f"step {first + 1}: term{'s' * (len(names) > 1)} {', '.join(names)}"


@contextlib.contextmanager
def _checkpoints(plan: Plan) -> Iterator[Checkpointer | None]:
  """The plan's checkpoints, None without a workdir. Whatever ends the block, what it began to write is completed."""
  if plan.workdir is None:
    yield None
    return
  checkpointer = Checkpointer(plan.workdir / "checkpoints", plan.origin)
  try:
    yield checkpointer
  finally:
    with working(f"{plan.title}: completing the last checkpoint"):
      checkpointer.close()


def _restore(plan: Plan, checkpointer: Checkpointer, like: Tree) -> tuple[Tree, dict] | None:
  with working(f"{plan.title}: reading the last checkpoint"):
    restored = checkpointer.restore(like)
  if restored:
    record = restored[1]
    say(f"{plan.title}: resuming after epoch {len(record['history'])} of {plan.epochs}")
    if changed := environment.changes(record["environments"][-1], environment.describe()):
      say(f"{plan.title}: {changed}; the end will not be bit-identical to that of an uninterrupted run")
  return restored


def _deferred_sigterm(plan: Plan) -> contextlib.AbstractContextManager[Callable[[], bool]]:
  """SIGTERM waits for a checkpoint, if there are any."""
  return stop.deferred_sigterm() if plan.workdir else contextlib.nullcontext(lambda: False)


@jax.jit
def _better(best: Tree, accuracy: jax.Array, epoch: jax.Array | int, variables: Tree) -> Tree:
  new = {"accuracy": accuracy, "epoch": jnp.int32(epoch), "variables": variables}
  return jax.tree.map(lambda old, now: jnp.where(accuracy > best["accuracy"], now, old), best, new)
