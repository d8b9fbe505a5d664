"""NAYER: noisy layers make data for data-free distillation (Tran et al., CVPR 2024; arXiv 2310.00258).

The generator starts from an embedding of the class, and what tells its images apart is not noise at its input but
layers behind the embedding that are drawn anew for every batch (`nets.generators.NoisyLayers`). An iteration is one
batch: new noisy layers, `generator.steps` updates of all parameters by a new Adam, and the best images join the pool.
The generator lives for `episodes.life` batches; then it starts again.

The paper's embedding is that of a text encoder for the name of the class. Here it is the teacher's own, the rows of its
classifier, or one-hot, or learned, or an array of the user's.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cpsc_jax import nets, streams
from cpsc_jax.errors import Refusal
from cpsc_jax.methods import episodic, inversion
from cpsc_jax.methods.base import Parts
from cpsc_jax.setup import Method
from cpsc_jax.state import State
from cpsc_jax.streams import Stream

INVERTS = True


def method(parts: Parts) -> Method:
  c, generator = parts.config.episodes, parts.generator
  number = parts.config.pool.batch_size
  base = episodic.episodic(parts, adversarial_from=c.warmup, latents=False)

  def begin(state: State, key: jax.Array) -> State:
    """New noisy layers, and a new generator where the old one's life is over."""
    y = class_lists(streams.key(key, Stream.LABELS), number, parts.noise.num_labels)
    z, done = jnp.zeros((number, 0)), state.memory["episodes"]
    new = nets.init(generator.net, streams.key(key, Stream.GENERATOR_INIT), z, y)["params"]
    over = jnp.where(done < c.warmup, done % c.warmup_life == 0, (done - c.warmup) % c.life == 0)
    params = jax.tree.map(lambda a, b: jnp.where(over, a, b), new, state.generator.params) | {"noisy": new["noisy"]}
    now = state.generator.replace(params=params, opt_state=generator.optimiser.init(params))
    return inversion.started(parts, state, now, y, z)

  return dataclasses.replace(base, begin=begin)


def class_lists(key: jax.Array, number: int, num_classes: int) -> jax.Array:
  """Labels (number,) int32: the list of all classes as often as it fits, then classes at random."""
  listed = number - number % num_classes
  rest = jax.random.randint(key, (number - listed,), 0, num_classes)
  return jnp.concatenate([jnp.arange(listed, dtype=jnp.int32) % num_classes, rest])


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses what noisy layers cannot do."""
  episodic.check(config, mesh)
  if config.generator.prior != "uniform":
    raise Refusal(
      f"config.generator.prior is '{config.generator.prior}', but method 'nayer' makes whole lists of all classes, one"
      " of each for a noisy layer; set it to 'uniform'."
    )
  if not config.generator.embedding:
    raise Refusal(
      "config.generator.embedding is empty, and method 'nayer' starts from an embedding of the classes; set it to"
      " 'classifier', 'one_hot', 'learned' or the name of a .npy file."
    )
