"""FastDFKD: Up to 100x Faster Data-Free Knowledge Distillation (Fang et al., AAAI 2022; arXiv 2112.06253).

A meta-learned generator is so close to good images that a few steps suffice. An iteration is an episode: a copy of the
generator and new latents take `generator.steps` steps, the images of the best one join the pool, and the generator
itself moves once, by the sum of the gradients that its copy saw (first-order MAML) or towards where the copy ended
(Reptile). Between iterations `State.generator` is the generator, within one it is the copy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import nets, streams
from cpsc_jax.errors import Refusal
from cpsc_jax.methods import episodic, inversion
from cpsc_jax.methods.base import Parts
from cpsc_jax.nets.generators import redrawn
from cpsc_jax.setup import LATENTS, Method, Teach
from cpsc_jax.state import State, TrainState, Tree
from cpsc_jax.streams import Stream

INVERTS = True
META = ("maml", "reptile")
REPTILE_FACTOR = 67.0  # of the published code; under Adam it hardly matters


def method(parts: Parts) -> Method:
  c, generator = parts.config, parts.generator
  meta = c.episodes

  def adam(lr: float) -> optax.GradientTransformation:
    return optax.adam(lr, b1=c.generator.b1, b2=c.generator.b2, eps=1e-8)

  inner, latent = optax.chain(remember_sum(), adam(c.generator.lr)), adam(meta.latent_lr)
  outer = adam(c.generator.steps * c.generator.lr)
  # As in the published code, the last episode of the warm-up is adversarial already.
  base = episodic.episodic(parts, adversarial_from=meta.warmup - 1, latent_optimiser=latent)

  def init(key: jax.Array) -> tuple[dict[str, TrainState], Tree]:
    trained, memory = base.init(key)
    z, labels = trained[LATENTS].params, memory["labels"]
    shapes = jax.eval_shape(lambda z: nets.init(generator.net, key, z, labels)["params"], z)
    theta = jax.tree.map(jnp.zeros_like, shapes)
    return trained, {**memory, "theta": theta, "outer": outer.init(theta)}

  def begin(state: State, key: jax.Array) -> State:
    """A copy of the generator, new latents and new labels."""
    z, y = parts.noise.draw(key, c.pool.batch_size, state.prior)
    theta = state.generator.params
    if meta.redraw_at:
      now = state.memory["episodes"] + 1 == meta.redraw_at
      again = redrawn(theta, streams.key(key, Stream.GENERATOR_INIT))
      theta = jax.tree.map(lambda new, old: jnp.where(now, new, old), again, theta)
    copy = state.generator.replace(params=theta, opt_state=inner.init(theta))
    state = inversion.started(parts, state, copy, y, z, TrainState(z, {}, latent.init(z)))
    return state.replace(memory={**state.memory, "theta": theta})

  def keep(state: State, key: jax.Array, teach: Teach) -> State:
    """The images join the pool, and the generator takes its one step."""
    state = base.keep(state, key, teach)
    memory, copy = state.memory, state.generator
    theta, gradient = memory["theta"], copy.opt_state[0].total
    if meta.form == "reptile":
      gradient = jax.tree.map(lambda old, new: REPTILE_FACTOR * (old - new), theta, copy.params)
    updates, opt_state = outer.update(gradient, memory["outer"], theta)
    theta = optax.apply_updates(theta, updates)
    memory = {**memory, "theta": theta, "outer": opt_state}
    return state.replace(generator=copy.replace(params=theta), memory=memory)

  trained, memory = base.shardings
  return dataclasses.replace(
    base,
    init=init,
    begin=begin,
    keep=keep,
    shardings=(trained, {**memory, **dict.fromkeys(("theta", "outer"), memory["labels"])}),
    optimisers={**base.optimisers, "generator": inner},
    keeps_generator=True,
  )


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
  episodic.check(config, mesh)
  meta = config.episodes
  if meta.form not in META:
    raise Refusal(f"config.episodes.form is '{meta.form}'; it must be one of {', '.join(META)}.")
  constant = {"schedule": "steps", "milestones": (), "clip": 0.0, "optimiser": "adam"}
  for key, value in constant.items():
    if (given := config.generator[key]) != value:
      raise Refusal(
        f"config.generator.{key} is {given!r}, but method 'fast' trains its generator by Adam at a constant"
        f" rate and without clipping; set it to {value!r}."
      )
