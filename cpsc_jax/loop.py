"""The one training loop: teachers, control arms and distillations run through `train`, members of a sweep that share
a program through `train_together`."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import environment, stop
from cpsc_jax.checkpoint import Checkpointer
from cpsc_jax.errors import NonFiniteLoss, Preempted
from cpsc_jax.events import Events
from cpsc_jax.mesh import any_process, is_primary, make_mesh, replicate, replicated
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
  (outcome,) = _train(plan, _Runs([plan]), state)
  return outcome


def train_together(plan: Plan, runs: Sequence[Plan], state: Tree) -> list[Outcome | NonFiniteLoss]:
  """`train` of several runs whose epochs are one program: what came of each, in the order of `runs`.

  A run whose loss is not finite ends with that, in place of an outcome; the others go on. The seconds of an outcome are
  the run's share.

  Args:
    plan: what the runs have in common: title, epoch, epochs, how often is measured, diagnosed and saved, origin, and
      the `workdir` of the checkpoints that hold all of them.
    runs: of each its title, measure, variables, diagnose, journal, on_epoch, settings, and the `workdir` of its events.
    state: the initial states, stacked: every array has the runs along its first axis, and so have those of the losses.

  Raises:
    Preempted: as `train`.
  """
  return _train(plan, _Runs(runs, stacked=True), state)


class _Runs:
  """The runs that a state is the state of: one, or several along the first axis of each of its arrays."""

  def __init__(self, plans: Sequence[Plan], stacked: bool = False):
    self.plans, self.stacked = list(plans), stacked
    self._split = jax.jit(self.slices, out_shardings=replicated(make_mesh()))

  def slices(self, tree: Tree) -> list[Tree]:
    """What belongs to each of the runs."""
    if not self.stacked:
      return [tree]
    return [jax.tree.map(lambda x, i=index: x[i], tree) for index in range(len(self.plans))]

  def parts(self, state: Tree) -> list[Tree]:
    """`slices` of arrays on devices, which leave the state as it is."""
    return self._split(state) if self.stacked else [state]

  def joined(self, each: list[Tree]) -> Tree:
    """What a checkpoint holds of what the runs have each for itself."""
    return list(each) if self.stacked else each[0]

  def apart(self, joined: Tree) -> list[Tree]:
    """What `joined` was given."""
    return list(joined) if self.stacked else [joined]


def beginning(plan: Plan, state: Tree) -> Tree:
  """What checkpoints of a plan hold beside the state, before its first epoch: the best epoch, which is none."""
  best = {"accuracy": jnp.float32(-1), "epoch": jnp.int32(0)}
  return {**replicate(best, make_mesh()), "variables": jax.tree.map(jnp.copy, plan.variables(state))}


def _train(plan: Plan, runs: _Runs, state: Tree) -> list[Outcome | NonFiniteLoss]:
  started = last_save = time.monotonic()
  best = [beginning(run, part) for run, part in zip(runs.plans, runs.parts(state), strict=True)]
  histories: list[list[dict]] = [[] for _ in runs.plans]
  failures: dict[int, NonFiniteLoss] = {}  # by the run's place
  earlier_seconds, environments = 0.0, []

  with _checkpoints(plan) as checkpointer:
    restored = checkpointer and _restore(plan, runs, checkpointer, {"state": state, "best": runs.joined(best)})
    if restored:
      tree, record = restored
      state, best, histories = tree["state"], runs.apart(tree["best"]), runs.apart(record["history"])
      earlier_seconds, environments = record["seconds"], record["environments"]
      failures = {int(place): NonFiniteLoss(text) for place, text in record.get("failures", {}).items()}
    if (here := environment.describe()) not in environments[-1:]:
      environments.append(here)
    done = max(map(len, histories))
    with Steps(plan.title, plan.epochs, done) as progress, _deferred_sigterm(plan) as sigterm_arrived:
      log = _Log(plan, runs, histories, failures, progress, checkpointer)
      unread = None
      for epoch in range(done + 1, plan.epochs + 1):
        last = epoch == plan.epochs
        with progress.calling(plan.epoch):
          state, losses = plan.epoch(state)
        measures = last or epoch % plan.measure_every == 0
        diagnoses = plan.diagnose and plan.diagnose_every and (last or epoch % plan.diagnose_every == 0)
        parts = runs.parts(state) if measures or diagnoses else []
        scores = []
        if measures:
          with progress.calling(plan.measure):
            scores = [run.measure(part) for run, part in zip(runs.plans, parts, strict=True)]
          best = [
            _better(old, score["accuracy"], epoch, run.variables(part))
            for old, score, run, part in zip(best, scores, runs.plans, parts, strict=True)
          ]
        diagnosis = []
        if diagnoses:
          with progress.calling(plan.diagnose):
            diagnosis = [run.diagnose(part, epoch) for run, part in zip(runs.plans, parts, strict=True)]
        parts = []

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
          record = {"history": runs.joined([list(history) for history in histories])}
          record |= {"seconds": earlier_seconds + last_save - started, "environments": environments}
          if failures:
            record["failures"] = {str(place): str(failure) for place, failure in failures.items()}
          with working(f"{plan.title}: saving epoch {epoch}"):
            checkpointer.save(epoch, {"state": state, "best": runs.joined(best)}, record)
        if stopping or (last and any_process(sigterm_arrived())):
          raise Preempted(
            f"{plan.title}: stopped by SIGTERM; epoch {epoch} is saved, and the same command resumes after it."
          )
        if len(failures) == len(runs.plans):
          break
  seconds, share = earlier_seconds + time.monotonic() - started, 1 / len(runs.plans)
  return [
    failures.get(place)
    or Outcome(
      part,
      int(best[place]["epoch"]),
      best[place]["variables"],
      histories[place],
      seconds * share,
      earlier_seconds * share,
      environments,
    )
    for place, part in enumerate(runs.parts(state))
  ]


def save(plan: Plan, outcome: Outcome) -> None:
  """Writes the checkpoint with which `train` of this plan would have ended, or goes on, unless it is there."""
  _save(plan, _Runs([plan]), outcome.state, [outcome])


def save_together(plan: Plan, runs: Sequence[Plan], state: Tree, outcomes: Sequence[Outcome]) -> None:
  """`save` for `train_together`: the outcomes are of equally many epochs, `state` is their states, stacked."""
  _save(plan, _Runs(runs, stacked=True), state, outcomes)


def _save(plan: Plan, runs: _Runs, state: Tree, outcomes: Sequence[Outcome]) -> None:
  best = []
  for outcome in outcomes:
    accuracy = {entry["epoch"]: entry["accuracy"] for entry in outcome.history if "accuracy" in entry}
    found = {"accuracy": jnp.float32(accuracy[outcome.best_epoch]), "epoch": jnp.int32(outcome.best_epoch)}
    best.append({**replicate(found, make_mesh()), "variables": outcome.best_variables})
  record = {"history": runs.joined([outcome.history for outcome in outcomes])}
  record |= {"seconds": sum(outcome.seconds for outcome in outcomes), "environments": outcomes[0].environments}
  with _checkpoints(plan) as checkpointer:
    if checkpointer and (checkpointer.latest() or 0) < len(outcomes[0].history):
      checkpointer.save(len(outcomes[0].history), {"state": state, "best": runs.joined(best)}, record)


@dataclasses.dataclass(frozen=True)
class _Unread:
  """An epoch that may still be running: its numbers are on the devices, and reading one waits for it.

  Attributes:
    epoch: which it is.
    losses: as plan.epoch returns them.
    scores, diagnosis: of each run what its measure and its diagnose return; empty where nothing was measured or
      diagnosed.
    stop, save: whether any process asks to stop, or for a checkpoint.
  """

  epoch: int
  losses: dict[str, Losses]
  scores: list[dict[str, jax.Array]]
  diagnosis: list[Tree]
  stop: jax.Array | bool
  save: jax.Array | bool


class _Log:
  """The histories of a training, and what follows them: event files, the progress shown and on_epoch of each run."""

  def __init__(
    self,
    plan: Plan,
    runs: _Runs,
    histories: list[list[dict]],
    failures: dict[int, NonFiniteLoss],
    progress: Steps,
    checkpointer: Checkpointer | None,
  ):
    self._plan, self._runs, self._histories, self._failures = plan, runs, histories, failures
    self._progress, self._checkpointer = progress, checkpointer
    self._events: list[Events | None] = []
    for run, history in zip(runs.plans, histories, strict=True):
      writes = run.workdir is not None and is_primary()
      self._events.append(Events(run.workdir / "events", len(history) + 1) if writes else None)
      if writes and run.settings:
        self._events[-1].set_up(run.settings)
    self._read_at = time.monotonic()

  def read(self, unread: _Unread) -> tuple[bool, bool]:
    """Waits for an epoch, appends it to the histories, and returns whether to stop and whether to save.

    Raises:
      NonFiniteLoss: of a run that is not one of several.
    """
    losses, scores, diagnosis = jax.device_get((unread.losses, unread.scores, unread.diagnosis))
    now = time.monotonic()
    seconds, self._read_at = now - self._read_at, now
    nothing = [{} for _ in self._runs.plans]
    entries = []
    for place, found in enumerate(zip(self._runs.slices(losses), scores or nothing, diagnosis or nothing, strict=True)):
      if place not in self._failures and (entry := self._enter(place, unread.epoch, seconds, *found)):
        entries.append(entry)
    if entries:
      shown = [
        {name: entry[name] for name in scores[0]}
        if scores
        else {f"{player} loss": total for player, total in entry["totals"].items()}
        for entry in entries
      ]
      means = {name: float(np.mean([each[name] for each in shown])) for name in shown[0]}
      note = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in means.items())
      self._progress.advance(note + (f" (mean of {len(entries)})" if self._runs.stacked else ""))
    for place, run in enumerate(self._runs.plans):
      if run.on_epoch and place not in self._failures:
        run.on_epoch(self._histories[place][-1])
    return bool(unread.stop), bool(unread.save)

  def _enter(
    self, place: int, epoch: int, seconds: float, losses: dict[str, Losses], scores: Mapping, diagnosis: Mapping
  ) -> dict | None:
    """One run's entry of an epoch, which joins its history, its events and its journal; None if it has failed."""
    run, events, history = self._runs.plans[place], self._events[place], self._histories[place]
    losses = {player: values for player, values in losses.items() if values.total.size}
    if not_finite := not_finite_in(losses):
      kept = self._checkpointer.latest() if self._checkpointer and not self._runs.stacked else None
      where = (
        "" if kept is None else f" the checkpoint of epoch {kept} is kept in {self._plan.workdir / 'checkpoints'};"
      )
      failure = NonFiniteLoss(
        f"{run.title}: the loss is not finite in epoch {epoch}, {not_finite};{where} lower the learning"
        " rate or the weight of the term."
      )
      if not self._runs.stacked:
        raise failure
      say(f"{failure} The other runs go on.")
      self._failures[place] = failure
      return None
    terms = {
      f"{player}/{name}": float(np.mean(values)) for player, of in losses.items() for name, values in of.terms.items()
    }
    totals = {player: float(np.mean(of.total)) for player, of in losses.items()}
    scores = {name: float(score) for name, score in scores.items()}
    entry = {"epoch": epoch, "terms": terms, "totals": totals, **scores}
    numbers = {
      name: float(value)
      for name, value in diagnosis.items()
      if not isinstance(value, dict) and np.ndim(value) == 0 and np.isfinite(value)
    }
    if diagnosis:
      entry["diagnostics"] = numbers
    history.append(entry)
    if events:
      weighted = {f"{player}/total": total for player, total in totals.items()}
      found = {f"diagnostics/{name}": value for name, value in numbers.items()}
      pictures = {name: array for name, array in diagnosis.items() if np.ndim(array) == 5}
      events.add(epoch, {**terms, **weighted, **scores, **found, "epoch_seconds": seconds}, pictures)
    if run.journal and is_primary():
      run.journal(history, {**diagnosis, "epoch_seconds": np.float64(seconds)} if diagnosis else {})
    return entry


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


def _restore(plan: Plan, runs: _Runs, checkpointer: Checkpointer, like: Tree) -> tuple[Tree, dict] | None:
  with working(f"{plan.title}: reading the last checkpoint"):
    restored = checkpointer.restore(like)
  if restored:
    record = restored[1]
    done = max(map(len, runs.apart(record["history"])))
    say(f"{plan.title}: resuming after epoch {done} of {plan.epochs}")
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
