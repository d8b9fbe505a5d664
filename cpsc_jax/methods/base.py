"""What methods are made of, and the alternating kind: one generator that is kept, and samples that are fresh."""

import dataclasses
from typing import Any

import jax
import ml_collections

from cpsc_jax import nets, sources
from cpsc_jax.setup import Method, Noise, Player, Term
from cpsc_jax.state import State


@dataclasses.dataclass(frozen=True)
class Parts:
  """What a method may build on.

  Attributes:
    config: the resolved config.
    noise: what the generator is asked for.
    generator: the generator and its optimiser.
    teacher: its module.
    image_shape: (H, W, K).
    mesh: the devices.
    trained_head: whether the student has a feature head that learns.
  """

  config: ml_collections.ConfigDict
  noise: Noise
  generator: Player
  teacher: Any
  image_shape: tuple[int, int, int]
  mesh: jax.sharding.Mesh
  trained_head: bool = False


def alternating(parts: Parts, generator_terms: dict[str, Term], student_terms: dict[str, Term]) -> Method:
  """Fresh latents and labels for every update of either player."""
  batch_size, noise = parts.config.schedule.batch_size, parts.noise

  def draw(_: State, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return noise.draw(key, batch_size)

  def samples(state: State, key: jax.Array, label: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    z = jax.random.normal(key, (number, noise.latent_dim))
    y = jax.numpy.full((number,), label)
    x, _ = nets.forward(parts.generator.net, state.generator.variables, z, y, train=False)
    return x, jax.numpy.ones(number, bool)

  move_statistics = parts.config.generator.stats_in_student_steps
  source = sources.fresh(parts.generator.net, noise, batch_size, move_statistics)
  return Method(
    generator_terms,
    student_terms,
    source=source,
    draw=draw,
    samples=samples,
    noise=noise,
    batch_size=batch_size,
  )
