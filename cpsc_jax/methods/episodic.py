"""What FastDFKD and NAYER share: episodes that each add one batch to the pool.

The batch norm term compares a running mean over episodes, the adversarial term counts samples that the student still
gets right, and in the first episodes the pool is filled without a student's update. `State.memory` has, beside what
inversion keeps, {"moments": the running mean, "seen": those of the last step, "episodes": how many are done}.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import losses, nets
from cpsc_jax.errors import Refusal
from cpsc_jax.methods import inversion, terms
from cpsc_jax.methods.base import Parts
from cpsc_jax.setup import Method, Teach, Term
from cpsc_jax.state import Losses, State, Statistics, TrainState, Tree, View


def episodic(
  parts: Parts,
  adversarial_from: int,
  latent_optimiser: optax.GradientTransformation | None = None,
  latents: bool = True,
) -> Method:
  """A method of this kind.

  Args:
    adversarial_from: the first episode, counted from 0, in which the adversarial term counts.
    latent_optimiser, latents: as in `inversion.inverting`.
  """
  c = parts.config.episodes

  def running_mean(memory: Tree, seen: Tree) -> Tree:
    """Of moments over episodes, in which the present ones, `seen`, count for 1 - momentum; the first time wholly."""
    old, momentum = memory["moments"], jnp.where(memory["episodes"] > 0, c.bn_momentum, 0.0)
    return jax.tree.map(lambda new, old: (1 - momentum) * new + momentum * old, seen, old)

  def bn(v: View) -> jax.Array:
    """`bn` of the running mean."""
    seen, stored = (moments(layers) for layers in (v.teacher.statistics.seen, v.teacher.statistics.stored))
    return losses.bn_statistics(Statistics(running_mean(v.memory, seen), stored))

  def adversarial(v: View) -> jax.Array:
    difference = losses.kl_where_agreed(v.teacher.logits, v.student.logits)
    return jnp.where(v.memory["episodes"] >= adversarial_from, -difference, 0.0)

  def recorded(v: View) -> dict[str, Any]:
    return {"moments": moments(v.teacher.statistics.seen)}

  generator_terms = {"bn": Term(bn, couples_batch=True), "ce": terms.CE, "adversarial": Term(adversarial)}
  base = inversion.inverting(
    parts,
    generator_terms,
    {"kd": terms.kd(parts.config)},
    record=recorded,
    latent_optimiser=latent_optimiser,
    latents=latents,
  )

  def init(key: jax.Array) -> tuple[dict[str, TrainState], Tree]:
    trained, memory = base.init(key)
    shapes = moments(nets.observed_shapes(parts.teacher, parts.image_shape).statistics.seen)
    own = {name: jax.tree.map(jnp.zeros_like, shapes) for name in ("moments", "seen")}
    return trained, {**memory, **own, "episodes": jnp.zeros((), jnp.int32)}

  def observe(state: State, found: Losses, recorded: dict[str, Any]) -> State:
    state = base.observe(state, found, recorded)
    return state.replace(memory={**state.memory, "seen": recorded["moments"]})

  def keep(state: State, key: jax.Array, teach: Teach) -> State:
    state = base.keep(state, key, teach)
    own = {"moments": running_mean(state.memory, state.memory["seen"]), "episodes": state.memory["episodes"] + 1}
    return state.replace(memory={**state.memory, **own})

  trained, memory = base.shardings
  own = dict.fromkeys(("moments", "seen", "episodes"), memory["labels"])
  return dataclasses.replace(
    base,
    init=init,
    observe=observe,
    keep=keep,
    shardings=(trained, {**memory, **own}),
    waits=lambda state: state.memory["episodes"] <= c.warmup,
  )


def moments(layers: Tree) -> dict[str, dict[str, jax.Array]]:
  """Mean and variance of every layer, {path joined by slashes: {"mean": (K,), "var": (K,)}}."""
  return {"/".join(layer): {name: seen[name] for name in ("mean", "var")} for layer, seen in layers.items()}


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses settings of the episodes that do not fit."""
  inversion.check(config, mesh)
  c, iterations = config.episodes, config.schedule.iterations
  if c.warmup >= config.schedule.epochs * iterations:
    raise Refusal(
      f"config.episodes.warmup is {c.warmup}; it must be less than the {config.schedule.epochs * iterations} iterations"
      " of the run."
    )
  if c.warmup % iterations:
    raise Refusal(
      f"config.episodes.warmup is {c.warmup}; set it to a multiple of config.schedule.iterations, {iterations}."
    )
  if config.generator.net == "pixels":
    raise Refusal(
      f"config.generator.net 'pixels' has no parameters for method '{config.method}' to train; choose another"
      " generator."
    )
