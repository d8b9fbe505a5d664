"""Optimisers and learning-rate schedules, from the config's numbers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from cpsc_jax import nets
from cpsc_jax.state import Tree


def rate_factor(config: ml_collections.ConfigDict) -> float:
  """What learning rates are multiplied by for a batch of another size than they were chosen for: the root of the ratio.

  For SGD after Hoffer et al., NeurIPS 2017, section 4; for Adam after Malladi et al., NeurIPS 2022, section 5. In
  proportion to the batch, as Goyal et al. (arXiv 1706.02677) scale SGD, students diverged here (docs/scaling.md).
  """
  chosen_for = config.schedule.lr_batch_size
  return (config.schedule.batch_size / chosen_for) ** 0.5 if chosen_for else 1.0


def generator_optimiser(
  config: ml_collections.ConfigDict, steps_per_epoch: int, epochs: int | None = None
) -> optax.GradientTransformation:
  """Adam with the config's schedule over `epochs` (of the run, or one for a generator that starts anew so often).

  `restarted_adam` is the published code's: rebuilt at every step, it has no moments, and its schedule never acts.
  """
  c, lr = config.generator, generator_schedule(config, steps_per_epoch, epochs)
  adam = clipped(optax.adam(lr, b1=c.b1, b2=c.b2, eps=1e-8), c.clip)
  return restart_every_step(adam) if c.optimiser == "restarted_adam" else adam


def generator_schedule(
  config: ml_collections.ConfigDict, steps_per_epoch: int, epochs: int | None = None
) -> optax.ScalarOrSchedule:
  """The generator's learning rate by its update, or one for all.

  A generator that starts anew, whose batch is another, has the config's rate whatever `rate_factor` is.
  """
  c, highest = config.generator, config.generator.lr * (1.0 if epochs else rate_factor(config))
  epochs = epochs or config.schedule.horizon or config.schedule.epochs
  if c.optimiser == "restarted_adam":
    return highest
  if c.schedule == "cosine":
    return warmup_cosine(highest, 0, epochs * steps_per_epoch)
  return per_epoch(milestones(highest, epochs, c.milestones, c.decay), steps_per_epoch)


def clipped(tx: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
  """`tx` behind gradients whose norm over all parameters is at most `norm`; 0: any."""
  return optax.chain(optax.clip_by_global_norm(norm), tx) if norm else tx


def restart_every_step(tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` with a state that is made anew for every update."""

  def update(grads: Tree, state: optax.EmptyState, params: Tree | None = None) -> tuple[Tree, optax.EmptyState]:
    updates, _ = tx.update(grads, tx.init(grads), params)
    return updates, state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def student_optimiser(
  config: ml_collections.ConfigDict,
  steps_per_epoch: int,
  waiting_epochs: int = 0,
  kept_layer: tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
  """The student's optimiser, whose schedule begins after `waiting_epochs`.

  A feature head that is `frozen` and the layer at `kept_layer` stay as they are, untouched by weight decay too.
  """
  tx = optimiser(config.student, steps_per_epoch, _epochs(config, waiting_epochs), rate_factor(config))
  head_is_kept = config.student.head == "frozen"
  if not (head_is_kept or kept_layer):
    return tx

  def kept(path: tuple) -> bool:
    return (head_is_kept and nets.is_head(path)) or _is_of(path, kept_layer)

  return moving(tx, lambda path: not kept(path))


def moving(tx: optax.GradientTransformation, moves: Callable[[tuple], bool]) -> optax.GradientTransformation:
  """`tx` for the parameters whose path `moves` wants; the others stay as they are, untouched by weight decay too."""

  def labels(params: Tree) -> Tree:
    return jax.tree_util.tree_map_with_path(lambda path, _: "moved" if moves(path) else "kept", params)

  return optax.partition({"moved": tx, "kept": optax.set_to_zero()}, labels)


def _is_of(path: tuple, layer: tuple[str, ...] | None) -> bool:
  """Whether a parameter at `path` is one of the layer's."""
  return tuple(part.key for part in path[:-1]) == layer


def student_schedule(
  config: ml_collections.ConfigDict, steps_per_epoch: int, waiting_epochs: int = 0
) -> optax.Schedule:
  """The student's learning rate by its update."""
  return schedule(config.student, steps_per_epoch, _epochs(config, waiting_epochs), rate_factor(config))


def _epochs(config: ml_collections.ConfigDict, waiting_epochs: int) -> int:
  """Over which the student's learning rate changes."""
  return max((config.schedule.horizon or config.schedule.epochs) - waiting_epochs, 1)


def optimiser(
  c: ml_collections.ConfigDict, steps_per_epoch: int, epochs: int, factor: float = 1.0
) -> optax.GradientTransformation:
  """What a section of the config (teacher or student) asks for: its optimiser, with its schedule over `epochs`.

  Its learning rates are multiplied by `factor`.
  """
  lr = schedule(c, steps_per_epoch, epochs, factor)
  mask = None if c.decay_norms else matrices
  tx = {
    "sgd": lambda: sgd(lr, c.momentum, c.weight_decay, mask),
    "adam": lambda: optax.chain(optax.add_decayed_weights(c.weight_decay, mask), optax.adam(lr, b1=c.momentum)),
    "adamw": lambda: optax.adamw(lr, b1=c.momentum, weight_decay=c.weight_decay, mask=mask),
    "nesterov": lambda: sgd(lr, c.momentum, c.weight_decay, mask, nesterov=True),
  }[c.optimiser]()
  return clipped(tx, c.clip)


def schedule(c: ml_collections.ConfigDict, steps_per_epoch: int, epochs: int, factor: float = 1.0) -> optax.Schedule:
  """The learning rates of `optimiser`."""
  steps, highest = steps_per_epoch, factor * c.lr
  return {
    "cosine": lambda: warmup_cosine(highest, c.warmup_epochs * steps, epochs * steps, factor * c.lr_end),
    "cosine_per_epoch": lambda: per_epoch(cosine_per_epoch(highest, epochs), steps),
    "published_steps": lambda: per_epoch(published_student_lr(highest, epochs), steps),
    "steps": lambda: per_epoch(milestones(highest, epochs, c.milestones, c.decay), steps),
  }[c.schedule]()


def matrices(params: Tree) -> Tree:
  """True for kernels, False for biases and the scales of norms, which have one axis."""
  return jax.tree.map(lambda p: p.ndim > 1, params)


def sgd(
  lr: optax.ScalarOrSchedule, momentum: float, weight_decay: float, mask=None, nesterov: bool = False
) -> optax.GradientTransformation:
  """PyTorch's SGD: d = g + wd * p; b = momentum * b + d; p = p - lr * b, or p - lr * (d + momentum * b)."""
  decay = optax.add_decayed_weights(weight_decay, mask)
  return optax.chain(decay, optax.trace(momentum, nesterov), optax.scale_by_learning_rate(lr))


def after(steps: int, tx: optax.GradientTransformation) -> optax.GradientTransformation:
  """`tx` after its first `steps` updates, in which nothing moves, the state of `tx` included."""
  return followed_by(steps, optax.set_to_zero(), tx)


def followed_by(
  steps: int, tx: optax.GradientTransformation, later: optax.GradientTransformation
) -> optax.GradientTransformation:
  """`tx` for its first `steps` updates, then `later`, which begins with a fresh state."""

  def init(params: Tree) -> Tree:
    return {"count": jnp.zeros((), jnp.int32), "first": tx.init(params), "later": later.init(params)}

  def update(grads: Tree, state: Tree, params: Tree | None = None) -> tuple[Tree, Tree]:
    def at_first(state: Tree) -> tuple[Tree, Tree]:
      updates, first = tx.update(grads, state["first"], params)
      return updates, {**state, "first": first}

    def afterwards(state: Tree) -> tuple[Tree, Tree]:
      updates, new = later.update(grads, state["later"], params)
      return updates, {**state, "later": new}

    updates, state = jax.lax.cond(state["count"] < steps, at_first, afterwards, state)
    return updates, {**state, "count": state["count"] + 1}

  return optax.GradientTransformation(init, update)


def alone(tx: optax.GradientTransformation, layer: tuple[str, ...]) -> optax.GradientTransformation:
  """`tx` for one layer, by its path; nothing else moves."""
  return moving(tx, lambda path: _is_of(path, layer))


def warmup_cosine(lr: float, warmup_steps: float, total_steps: int, end: float = 0.0) -> optax.Schedule:
  """Linear from lr / (warmup + 1) to lr, then half a cosine to `end` at `total_steps`; the step is counted from 0."""
  warmup_steps = min(int(warmup_steps), max(total_steps - 1, 0))

  def schedule(count):
    count = jnp.asarray(count, float)
    rise = (count + 1.0) / (warmup_steps + 1.0)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((count - warmup_steps) / (total_steps - warmup_steps), 0, 1)))
    return jnp.where(count < warmup_steps, lr * rise, end + (lr - end) * fall)

  return schedule


def published_student_lr(lr: float, epochs: int) -> np.ndarray:
  """The student's learning rate in epochs 1..E as the published code steps it: (E,) float64.

  Ten warm-up epochs; then two schedulers act on one value, so that epoch 11 is off the curve and the end is not 0.
  """
  e = np.arange(1, epochs + 1, dtype=np.float64)
  rate = 0.5 * lr * (1 + np.cos(np.pi * (e - 10) / epochs))
  rate[:10] = lr * e[:10] / 10
  if epochs > 10:
    rate[10] = lr * ((1 + np.cos(11 * np.pi / epochs)) / (1 + np.cos(10 * np.pi / epochs))) ** 2
  return rate


def cosine_per_epoch(lr: float, epochs: int) -> np.ndarray:
  """lr / 2 (1 + cos(pi e / E)) for e = 1..E, the published teacher schedule: (E,) float64."""
  return 0.5 * lr * (1 + np.cos(np.pi * np.arange(1, epochs + 1) / epochs))


def milestones(lr: float, epochs: int, at: Sequence[float], decay: float) -> np.ndarray:
  """lr, times `decay` from each epoch of `at` on, for epochs 1..E: (E,) float64."""
  passed = np.searchsorted(np.sort(np.asarray(at, np.float64)), np.arange(1, epochs + 1), side="right")
  return lr * np.power(decay, passed)


def per_epoch(rates: np.ndarray, steps_per_epoch: int) -> optax.Schedule:
  """An optax schedule that holds rates[e] during epoch e (counted from 0)."""
  rates = jnp.asarray(rates)
  return lambda count: rates[jnp.minimum(count // steps_per_epoch, len(rates) - 1)]
