"""The one training loop: teachers, control arms and distillations all run through `train`."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import stop
from cpsc_jax.checkpoint import Checkpointer
from cpsc_jax.errors import NonFiniteLoss, Preempted
from cpsc_jax.events import Events
from cpsc_jax.mesh import any_process, is_primary, make_mesh, replicate
from cpsc_jax.progress import Steps, say


@dataclasses.dataclass(frozen=True)
class Plan:
  """A training, laid out: what one epoch does, what is measured after it, how often things are kept.

  Attributes:
    title: names it in progress lines and messages.
    epoch: state -> (state, terms); a compiled program that may consume its argument; terms are a tree of {name: array}
      whose first axes are the steps of the epoch, in order.
    measure: state -> {name: scalar} with at least "accuracy"; compiled, and run after every `measure_every` epochs.
    variables: state -> what is kept of the best epoch.
    save_every, save_minutes: a checkpoint is written after every so many epochs, and whenever the last one has been
      under way for so many minutes.
  """

  title: str
  epoch: Callable
  measure: Callable
  variables: Callable
  epochs: int
  measure_every: int
  save_every: int
  save_minutes: float
  workdir: Any


@dataclasses.dataclass(frozen=True)
class Outcome:
  """Where a training ended: its last state, the variables of its best epoch, a record per epoch, seconds worked."""

  state: Any
  best_epoch: int
  best_variables: Any
  history: list[dict]
  seconds: float


def train(plan, state):
  """Runs or resumes `plan` from `state` under plan.workdir/checkpoints and returns its Outcome.

  The host reads an epoch's numbers only after the next epoch is under way. A checkpoint holds the state, the best
  epoch's variables and the whole history, so that a run resumed from it goes on as if it had never stopped. `state`
  is on all devices.

  Raises:
    NonFiniteLoss: names the term and the step; the last checkpoint before it is kept.
    Preempted: SIGTERM came to any process; the epochs done are saved.
  """
  started = saved = time.monotonic()
  checkpointer = Checkpointer(plan.workdir / "checkpoints")
  best = {"accuracy": jnp.float32(-1), "epoch": jnp.int32(0)}
  best = {**replicate(best, make_mesh()), "variables": jax.tree.map(jnp.copy, plan.variables(state))}
  restored = checkpointer.restore({"state": state, "best": best})
  history, seconds = [], 0.0
  if restored:
    tree, record = restored
    state, best, history, seconds = tree["state"], tree["best"], record["history"], record["seconds"]
    say(f"{plan.title}: resuming after epoch {len(history)} of {plan.epochs}")
  events = Events(plan.workdir / "events", len(history) + 1) if is_primary() else None
  worked = lambda: seconds + time.monotonic() - started
  unread = None

  try:
    with Steps(plan.title, plan.epochs, len(history)) as progress, stop.deferred_sigterm() as told_to_stop:

      def read():
        """Waits for the epoch under way and enters it into the history; returns what was wished for in it."""
        epoch, terms, scores, wishes = unread
        terms = jax.device_get(terms)
        check_finite(plan, epoch, terms)
        means = {name: float(np.mean(values)) for name, values in named(terms)}
        entry = {"epoch": epoch, "terms": means, **{k: float(v) for k, v in (scores or {}).items()}}
        history.append(entry)
        if events:
          events.add(epoch, {**means, **{k: entry[k] for k in scores or {}}})
        progress.advance(
          " ".join(f"{k} {entry[k]:.4f}" for k in scores or {}) or f"loss {means[last_total(means)]:.4f}"
        )
        return [bool(wish) for wish in wishes]

      for epoch in range(len(history) + 1, plan.epochs + 1):
        state, terms = plan.epoch(state)
        scores = None
        if epoch % plan.measure_every == 0 or epoch == plan.epochs:
          scores = plan.measure(state)
          best = _better(best, scores["accuracy"], epoch, plan.variables(state))
        stopping, due = read() if unread else (False, False)
        # Any process may wish; all learn of it with the epoch's numbers, and so act after the same epoch.
        overdue = time.monotonic() - saved >= 60 * plan.save_minutes
        unread = (epoch, terms, scores, (any_process(told_to_stop()), any_process(overdue)))
        if epoch % plan.save_every == 0 or epoch == plan.epochs or due or stopping:
          stopping = read()[0] or stopping
          unread = None
          saved = time.monotonic()
          checkpointer.save(epoch, {"state": state, "best": best}, {"history": list(history), "seconds": worked()})
        if stopping or (epoch == plan.epochs and any_process(told_to_stop())):
          raise Preempted(f"{plan.title}: told to stop; epoch {epoch} is saved, and the same command resumes after it.")
  finally:
    checkpointer.close()  # what was started is finished, whatever ended the loop
  return Outcome(state, int(best["epoch"]), best["variables"], history, worked())


def check_finite(plan, epoch, terms):
  """Raises NonFiniteLoss naming the first step of the epoch, and the terms of it, that are not finite."""
  bad = {name: np.flatnonzero(~np.isfinite(values).reshape(-1)) for name, values in named(terms)}
  bad = {name: steps[0] for name, steps in bad.items() if steps.size}
  if not bad:
    return
  first = min(bad.values())
  names = [name for name, step in bad.items() if step == first and not name.endswith("total")]
  raise NonFiniteLoss(
    f"{plan.title}: the loss is not finite in epoch {epoch}, step {first + 1}: term {', '.join(names) or 'total'};"
    f" the last good checkpoint is kept in {plan.workdir / 'checkpoints'}; lower the learning rate or the weight."
  )


def named(terms):
  """("player/term", values) pairs of a tree of terms; a player who took no step has none."""
  for path, values in jax.tree_util.tree_leaves_with_path(terms):
    if values.size:
      yield "/".join(str(key.key) for key in path), values


def last_total(means):
  return [name for name in means if name.endswith("total")][-1]


@jax.jit
def _better(best, accuracy, epoch, variables):
  new = {"accuracy": accuracy, "epoch": jnp.int32(epoch), "variables": variables}
  return jax.tree.map(lambda old, now: jnp.where(accuracy > best["accuracy"], now, old), best, new)
