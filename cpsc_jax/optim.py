"""Optimisers and learning-rate schedules, from the config's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax


def generator_optimiser(config, steps_per_epoch, epochs=None):
  """Adam with the config's schedule over `epochs` (of the run, or one for a generator that starts afresh so often).

  Under `fresh_adam` the schedule never acts, as each step's Adam is at its first.
  """
  c, epochs = config.generator, epochs or config.schedule.horizon or config.schedule.epochs
  if config.quirks.fresh_adam:
    lr = c.lr
  elif c.schedule == "cosine":
    lr = warmup_cosine(c.lr, 0, epochs * steps_per_epoch)
  else:
    lr = per_epoch(milestones(c.lr, epochs, c.milestones, c.decay), steps_per_epoch)
  return optax.adam(lr, b1=c.b1, b2=c.b2, eps=1e-8)


def student_optimiser(config, steps_per_epoch):
  """SGD with momentum and weight decay on every parameter; a feature head stays untouched under `untrained_head`."""
  c, epochs = config.student, config.schedule.horizon or config.schedule.epochs
  if config.quirks.stepped_schedule:
    lr = per_epoch(published_student_lr(c.lr, epochs), steps_per_epoch)
  else:
    lr = warmup_cosine(c.lr, c.warmup_epochs * steps_per_epoch, epochs * steps_per_epoch)
  trained = sgd(lr, c.momentum, c.weight_decay)
  if not config.quirks.untrained_head:
    return trained
  label = lambda path, _: "head" if any("head_" in str(k) for k in path) else "net"
  labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
  return optax.partition({"net": trained, "head": optax.set_to_zero()}, labels)


def supervised_optimiser(c, steps_per_epoch, published=False):
  """SGD for training on labels: linear warm-up, then cosine to 0 at the last step; `published`: cosine per epoch."""
  if published:
    lr = per_epoch(cosine_per_epoch(c.lr, c.epochs), steps_per_epoch)
  else:
    lr = warmup_cosine(c.lr, c.warmup_epochs * steps_per_epoch, c.epochs * steps_per_epoch)
  return sgd(lr, c.momentum, c.weight_decay)


def sgd(lr, momentum, weight_decay):
  """PyTorch's SGD: d = g + wd * p; b = momentum * b + d; p = p - lr * b."""
  return optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum), optax.scale_by_learning_rate(lr))


def warmup_cosine(lr, warmup_steps, total_steps):
  """Linear from lr / (warmup + 1) to lr, then half a cosine to 0 at `total_steps`; the step is counted from 0."""
  warmup_steps = min(int(warmup_steps), max(total_steps - 1, 0))

  def schedule(count):
    count = jnp.asarray(count, float)
    rise = (count + 1.0) / (warmup_steps + 1.0)
    fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip((count - warmup_steps) / (total_steps - warmup_steps), 0, 1)))
    return lr * jnp.where(count < warmup_steps, rise, fall)

  return schedule


def published_student_lr(lr, epochs):
  """The student's learning rate in epochs 1..E as the published code steps it: (E,) float64.

  Ten warm-up epochs; then two schedulers act on one value, so that epoch 11 is off the curve and the end is not 0.
  """
  e = np.arange(1, epochs + 1, dtype=np.float64)
  rate = 0.5 * lr * (1 + np.cos(np.pi * (e - 10) / epochs))
  rate[:10] = lr * e[:10] / 10
  if epochs > 10:
    rate[10] = lr * ((1 + np.cos(11 * np.pi / epochs)) / (1 + np.cos(10 * np.pi / epochs))) ** 2
  return rate


def cosine_per_epoch(lr, epochs):
  """lr / 2 (1 + cos(pi e / E)) for e = 1..E, the published teacher schedule: (E,) float64."""
  return 0.5 * lr * (1 + np.cos(np.pi * np.arange(1, epochs + 1) / epochs))


def milestones(lr, epochs, at, decay):
  """lr, times `decay` from each epoch of `at` on, for epochs 1..E: (E,) float64."""
  passed = np.searchsorted(np.sort(np.asarray(at, np.float64)), np.arange(1, epochs + 1), side="right")
  return lr * np.power(decay, passed)


def per_epoch(rates, steps_per_epoch):
  """An optax schedule that holds rates[e] during epoch e (counted from 0)."""
  rates = jnp.asarray(rates)
  return lambda count: rates[jnp.minimum(count // steps_per_epoch, len(rates) - 1)]
