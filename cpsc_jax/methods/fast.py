"""FastDFKD: Up to 100x Faster Data-Free Knowledge Distillation (Fang et al., AAAI 2022; arXiv 2112.06253).

A meta-learned generator is so close to good images that a few steps suffice. An iteration is an episode: a copy of the
generator and new latents take `generator.steps` steps, the images of the best one join the pool, and the generator
itself moves once, by the sum of the gradients that its copy saw (first-order MAML) or towards where the copy ended
(Reptile). Between iterations `State.generator` is the generator, within one it is the copy.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import losses, nets, streams
from cpsc_jax.errors import Refusal
from cpsc_jax.methods import inversion, terms
from cpsc_jax.methods.base import Parts
from cpsc_jax.nets.generators import redrawn
from cpsc_jax.setup import LATENTS, Method, Term
from cpsc_jax.state import Losses, State, Statistics, TrainState, Tree, View
from cpsc_jax.streams import Stream

INVERTS = True
META = ("maml", "reptile")
REPTILE_FACTOR = 67.0  # of the published code; under Adam it hardly matters


def method(parts: Parts) -> Method:
  c, generator = parts.config, parts.generator
  meta = c.loss.meta

  def adam(lr: float) -> optax.GradientTransformation:
    return optax.adam(lr, b1=c.generator.b1, b2=c.generator.b2, eps=1e-8)

  inner, latent = optax.chain(remember_sum(), adam(c.generator.lr)), adam(meta.latent_lr)
  outer = adam(c.generator.steps * c.generator.lr)

  def running_mean(memory: Tree, seen: Tree) -> Tree:
    """Of moments over episodes, in which the present ones, `seen`, count for 1 - momentum; the first time wholly."""
    old, momentum = memory["moments"], jnp.where(memory["episodes"] > 0, meta.bn_momentum, 0.0)
    return jax.tree.map(lambda new, old: (1 - momentum) * new + momentum * old, seen, old)

  def bn(v: View) -> jax.Array:
    """`bn` of the running mean."""
    seen, stored = (moments(layers) for layers in (v.teacher.statistics.seen, v.teacher.statistics.stored))
    return losses.bn_statistics(Statistics(running_mean(v.memory, seen), stored))

  def adversarial(v: View) -> jax.Array:
    """Nothing in the warm-up but its last episode, as in the published code."""
    difference = losses.kl_where_agreed(v.teacher.logits, v.student.logits)
    return jnp.where(v.memory["episodes"] + 1 >= meta.warmup_episodes, -difference, 0.0)

  def recorded(v: View) -> dict[str, Any]:
    return {"moments": moments(v.teacher.statistics.seen)}

  generator_terms = {
    "bn": Term(bn, couples_batch=True),
    "ce": terms.CE,
    "adversarial": Term(adversarial),
  }
  student_terms = {"kd": terms.kd(c)}
  base = inversion.inverting(parts, generator_terms, student_terms, record=recorded, latent_optimiser=latent)

  def init(key: jax.Array) -> tuple[dict[str, TrainState], Tree]:
    trained, memory = base.init(key)
    z, labels = trained[LATENTS].params, memory["labels"]
    theta = jax.eval_shape(lambda z: nets.init(generator.net, key, z, labels)["params"], z)
    seen = moments(nets.observed_shapes(parts.teacher, parts.image_shape).statistics.seen)
    shapes = {"theta": theta, "moments": seen, "seen": seen}
    own = {name: jax.tree.map(jnp.zeros_like, tree) for name, tree in shapes.items()}
    return trained, {**memory, **own, "outer": outer.init(own["theta"]), "episodes": jnp.zeros((), jnp.int32)}

  def begin(state: State, key: jax.Array) -> State:
    """A copy of the generator, new latents and new labels."""
    z, y = parts.noise.draw(key, c.pool.batch_size)
    theta = state.generator.params
    if meta.redraw_episode:
      now = state.memory["episodes"] + 1 == meta.redraw_episode
      again = redrawn(theta, streams.key(key, Stream.GENERATOR_INIT))
      theta = jax.tree.map(lambda new, old: jnp.where(now, new, old), again, theta)
    copy = state.generator.replace(params=theta, opt_state=inner.init(theta))
    state = inversion.started(parts, state, copy, TrainState(z, {}, latent.init(z)), y)
    return state.replace(memory={**state.memory, "theta": theta})

  def observe(state: State, found: Losses, seen: dict[str, Any]) -> State:
    state = base.observe(state, found, seen)
    return state.replace(memory={**state.memory, "seen": seen["moments"]})

  def keep(state: State) -> State:
    """The images join the pool, and the generator takes its one step."""
    state = base.keep(state)
    memory, copy = state.memory, state.generator
    theta, gradient = memory["theta"], copy.opt_state[0].total
    if meta.form == "reptile":
      gradient = jax.tree.map(lambda old, new: REPTILE_FACTOR * (old - new), theta, copy.params)
    updates, opt_state = outer.update(gradient, memory["outer"], theta)
    theta = optax.apply_updates(theta, updates)
    own = {"theta": theta, "outer": opt_state, "moments": running_mean(memory, memory["seen"])}
    memory = {**memory, **own, "episodes": memory["episodes"] + 1}
    return state.replace(generator=copy.replace(params=theta), memory=memory)

  trained, memory = base.shardings
  whole = memory["labels"]
  own = dict.fromkeys(("theta", "outer", "moments", "seen", "episodes"), whole)
  return dataclasses.replace(
    base,
    init=init,
    begin=begin,
    observe=observe,
    keep=keep,
    shardings=(trained, {**memory, **own}),
    optimisers={**base.optimisers, "generator": inner},
    waits=lambda state: state.memory["episodes"] <= meta.warmup_episodes,
    keeps_generator=True,
  )


def moments(layers: Tree) -> dict[str, dict[str, jax.Array]]:
  """Mean and variance of every layer, {path joined by slashes: {"mean": (K,), "var": (K,)}}."""
  return {"/".join(layer): {name: seen[name] for name in ("mean", "var")} for layer, seen in layers.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Total:
  """The sum of all gradients since `init`."""

  total: Tree


def remember_sum() -> optax.GradientTransformation:
  """Leaves gradients as they are and remembers their sum."""

  def update(grads: Tree, state: Total, params: Tree | None = None) -> tuple[Tree, Total]:
    return grads, Total(jax.tree.map(jnp.add, state.total, grads))

  return optax.GradientTransformation(lambda params: Total(jax.tree.map(jnp.zeros_like, params)), update)


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses settings of the meta-learning that do not fit."""
  inversion.check(config, mesh)
  if "meta" not in config.loss:
    raise Refusal("method 'fast' has keys of its own, which this config lacks; start from configs/fast_cifar10.py.")
  meta = config.loss.meta
  if meta.form not in META:
    raise Refusal(f"config.loss.meta.form is '{meta.form}'; it must be one of {', '.join(META)}.")
  if not 0 <= meta.bn_momentum < 1:
    raise Refusal(f"config.loss.meta.bn_momentum is {meta.bn_momentum}; it must be at least 0 and less than 1.")
  if not meta.latent_lr > 0:
    raise Refusal(f"config.loss.meta.latent_lr is {meta.latent_lr}; it must be greater than 0.")
  if not 0 <= meta.warmup_episodes < config.schedule.epochs * config.schedule.iterations:
    raise Refusal(
      f"config.loss.meta.warmup_episodes is {meta.warmup_episodes}; it must be at least 0 and less than the"
      f" {config.schedule.epochs * config.schedule.iterations} iterations of the run."
    )
  if meta.warmup_episodes % config.schedule.iterations:
    raise Refusal(
      f"config.loss.meta.warmup_episodes is {meta.warmup_episodes}; set it to a multiple of"
      f" config.schedule.iterations, {config.schedule.iterations}."
    )
  if config.generator.net == "pixels":
    raise Refusal("config.generator.net 'pixels' has no parameters to meta-learn; choose another generator.")
