"""What methods are made of, and the alternating kind: one generator that is kept, and samples that are fresh."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from cpsc_jax import nets, sources
from cpsc_jax import pool as pools
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import replicated
from cpsc_jax.setup import Method, Noise, Player, Term
from cpsc_jax.state import State, TrainState, Tree


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
    mean, std: of the teacher's input, per channel, of pixels in [0, 1].
    num_classes: of the teacher.
    more: {player: terms} that the task brings.
    augment: what the student's images go through before it sees them (`Player.augment`).
  """

  config: ml_collections.ConfigDict
  noise: Noise
  generator: Player
  teacher: Any
  image_shape: tuple[int, int, int]
  mesh: jax.sharding.Mesh
  trained_head: bool = False
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  num_classes: int = 0
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  more: dict[str, dict[str, Term]] = dataclasses.field(default_factory=dict)


def student_source(parts: Parts) -> tuple[Callable[[jax.Array], Tree], sources.Source, Tree]:
  """(key -> memory, source, shardings of the memory) of fresh samples, with shares of replay and of an average.

  The memory has {"pool"} where earlier batches are replayed and {"average"} where the generator is averaged.
  """
  config, net, noise, mesh = parts.config, parts.generator.net, parts.noise, parts.mesh
  replayed, averaged = share_numbers(config)
  number = config.schedule.batch_size - replayed
  shape, move_statistics = parts.image_shape, config.generator.stats_in_student_steps
  between = round(config.generator.between_share * number)
  of_average = round(between * averaged / number)
  new = sources.fresh(net, noise, number - averaged, move_statistics, between=between - of_average)
  if averaged:
    old = sources.fresh(net, noise, averaged, of=lambda state: state.memory["average"], between=of_average)
    new = sources.mixture([new, old], mesh)
  source = sources.mixture([sources.remembered(new), sources.pooled(replayed, mesh)], mesh) if replayed else new

  def memory(key: jax.Array) -> Tree:
    kept = {}
    if replayed:
      slots = max(config.pool.size // number, 1)
      kept["pool"] = pools.empty(slots, number, images=(shape, jnp.float32), labels=((), jnp.int32))
    if averaged:
      inputs = jnp.zeros((2, noise.latent_dim)), jnp.zeros((2,), jnp.int32)
      shapes = jax.eval_shape(lambda key: nets.init(net, key, *inputs), key)
      kept["average"] = jax.tree.map(jnp.zeros_like, shapes)
    return kept

  places = {"pool": pools.sharding(mesh)} if replayed else {}
  return memory, source, places | ({"average": replicated(mesh)} if averaged else {})


def share_numbers(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """How many of a student's batch are replayed, and how many are drawn by the generator's average."""
  batch = config.schedule.batch_size
  replayed = round(config.pool.replay_share * batch)
  return replayed, round(config.generator.ema_share * (batch - replayed)) if config.generator.ema else 0


def check(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Refuses shares of the student's batch that leave nothing fresh or that devices cannot divide."""
  check_between(config)
  if config.pool.logits:
    raise Refusal(
      f"config.pool.logits is True, but method '{config.method}' learns from fresh samples, on which the teacher is"
      " asked anew; set it to False."
    )
  replayed, averaged = share_numbers(config)
  fresh = config.schedule.batch_size - replayed - averaged
  for what, count in (
    ("pool.replay_share", replayed),
    ("generator.ema_share", averaged),
    ("schedule.batch_size", fresh),
  ):
    if count % mesh.size or (what == "schedule.batch_size" and not count):
      raise Refusal(
        f"config.schedule.batch_size is {config.schedule.batch_size}, of which {fresh} are fresh, {averaged} drawn by"
        f" the generator's average and {replayed} replayed; choose config.{what} so that each is a multiple of"
        f" {mesh.size}, the number of devices, and some are fresh."
      )
  if replayed and config.pool.size < config.schedule.batch_size - replayed:
    raise Refusal(
      f"config.pool.size is {config.pool.size}, less than the {config.schedule.batch_size - replayed} new images of one"
      " student's batch; enlarge it or set config.pool.replay_share to 0."
    )


def check_between(config: ml_collections.ConfigDict) -> None:
  """Refuses samples between classes where the generator has none, or where their shares are forgotten."""
  share = config.generator.between_share
  if not share:
    return
  given = f"config.generator.between_share is {share}"
  if not config.generator.conditional:
    raise Refusal(f"{given}, but config.generator.conditional is False: its norms carry no class; set one of the two.")
  if config.pool.replay_share:
    raise Refusal(f"{given}, but a replayed image has one class; set it or config.pool.replay_share to 0.")


def alternating(parts: Parts, generator_terms: dict[str, Term], student_terms: dict[str, Term]) -> Method:
  """Fresh latents and labels for every update of either player."""
  batch_size, noise = parts.config.schedule.batch_size, parts.noise

  def draw(state: State, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    return noise.draw(key, batch_size, state.prior)

  def samples(state: State, key: jax.Array, label: jax.Array, number: int) -> tuple[jax.Array, jax.Array]:
    z = jax.random.normal(key, (number, noise.latent_dim))
    y = jax.numpy.full((number,), label)
    x, _ = nets.forward(parts.generator.net, state.generator.variables, z, y, train=False)
    return x, jax.numpy.ones(number, bool)

  memory, source, shardings = student_source(parts)
  decay = parts.config.generator.ema

  def init(key: jax.Array) -> tuple[dict[str, TrainState], Tree]:
    return {}, memory(key)

  def keep(state: State, *_: Any) -> State:
    """The average follows the generator; in the first iteration it is the generator."""
    if not decay:
      return state
    rate = jnp.where(state.step == 0, 0.0, decay)
    now, old = state.generator.variables, state.memory["average"]
    average = jax.tree.map(lambda a, b: (rate * a + (1 - rate) * b).astype(a.dtype), old, now)
    return state.replace(memory={**state.memory, "average": average})

  return Method(
    generator_terms,
    student_terms,
    source=source,
    init=init,
    keep=keep,
    shardings=({}, shardings),
    draw=draw,
    samples=samples,
    noise=noise,
    batch_size=batch_size,
  )
