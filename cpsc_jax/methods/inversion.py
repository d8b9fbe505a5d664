"""Model inversion: every iteration fits a new generator and one batch of latents, and the best images join a pool.

The learning rate schedule of the generator runs over the updates of one iteration. RGAL, DeepInversion and CMI are of
this kind; what else a method keeps (CMI's critic and bank) it adds to what `inverting` returns.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import initial, nets, sources, streams
from cpsc_jax import pool as pools
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import batch_sharding, check_divisible, replicated
from cpsc_jax.methods.base import Parts
from cpsc_jax.setup import LATENTS, Method, Teach, Term
from cpsc_jax.state import Losses, State, TrainState, Tree, View
from cpsc_jax.streams import Stream

Recorded = dict[str, jax.Array]
OF_LOGITS = ("kd", "l2", "l1", "ce")  # the student's terms that need the teacher's logits, or nothing of it


def inverting(
  parts: Parts,
  generator_terms: dict[str, Term],
  student_terms: dict[str, Term],
  record: Callable[[View], Recorded] = lambda view: {},
  recorded_shapes: dict[str, tuple[int, ...]] | None = None,
  latent_optimiser: optax.GradientTransformation | None = None,
  latents: bool = True,
) -> Method:
  """A method of this kind, whose latents are moved by the generator's optimiser or by one of their own.

  Without `latents` it has none to move. `record` gives what is kept of a batch beside its images, {name: (N, ...)},
  and `recorded_shapes` the shapes of one sample of it. `State.memory` is {"pool", "best": {"loss", "images", ...},
  "labels"}: the best batch of the iteration so far, and the labels that were asked for.
  """
  config, noise, generator, mesh = parts.config, parts.noise, parts.generator, parts.mesh
  number, shape = config.pool.batch_size, parts.image_shape
  tx = latent_optimiser or generator.optimiser

  def init(_: jax.Array) -> tuple[dict[str, TrainState], Tree]:
    shapes = {"images": shape, **(recorded_shapes or {})}
    best = {name: jnp.zeros((number, *each)) for name, each in shapes.items()}
    slots = config.pool.size // number
    held = {"images": (shape, jnp.dtype(config.pool.dtype)), "labels": ((), jnp.int32)}
    if config.pool.logits:
      held["logits"] = ((parts.num_classes,), jnp.float16)
    memory = {
      "pool": pools.empty(slots, number, **held),
      "best": {**best, "loss": jnp.zeros(())},
      "labels": jnp.zeros((number,), jnp.int32),
    }
    z = jnp.zeros((number, noise.latent_dim))
    return {LATENTS: TrainState(z, {}, jax.jit(tx.init)(z))} if latents else {}, memory

  def begin(state: State, key: jax.Array) -> State:
    """New latents, new labels and a new generator; the best batch so far is its first."""
    z, y = noise.draw(key, number, state.prior)
    variables = nets.init(generator.net, streams.key(key, Stream.GENERATOR_INIT), z, y)
    fresh = initial.train_state(variables, generator.optimiser).replace(loss_scale=state.generator.loss_scale)
    return started(parts, state, fresh, y, z, TrainState(z, {}, tx.init(z)))

  def draw(state: State, _: jax.Array) -> tuple[jax.Array, jax.Array]:
    z = state.trained[LATENTS].params if latents else jnp.zeros((number, noise.latent_dim))
    return z, state.memory["labels"]

  def with_images(view: View) -> Recorded:
    return {"images": view.images, **record(view)}

  def observe(state: State, losses: Losses, recorded: Recorded) -> State:
    """Remembers the batch if its loss is the least so far."""
    best, new = state.memory["best"], {"loss": losses.total, **recorded}
    better = losses.total < best["loss"]
    best = {name: jnp.where(better, new[name], best[name]) for name in best}
    return state.replace(memory={**state.memory, "best": best})

  def keep(state: State, key: jax.Array, teach: Teach) -> State:
    """The best batch joins the pool; under pool.logits one view of it, with what the teacher says of that view."""
    memory = state.memory
    images, batch = memory["best"]["images"], {"labels": memory["labels"]}
    if config.pool.logits and parts.augment:
      images = parts.augment(streams.key(key, Stream.AUGMENTATION), images)
    batch["images"] = sources.stored(images, config.pool.dtype, parts.mean, parts.std)
    if config.pool.logits:
      seen = sources.restored(batch["images"], parts.mean, parts.std)
      batch["logits"] = teach(seen).logits.astype(jnp.float16)
    return state.replace(memory={**memory, "pool": pools.add(memory["pool"], **batch)})

  def samples(state: State, key: jax.Array, label: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    pool = state.memory["pool"]
    ours = pools.filled(pool) & (pool.arrays["labels"] == label)
    order = jnp.where(ours, jax.random.uniform(key, ours.shape), -1.0).reshape(-1)
    value, place = jax.lax.top_k(order, min(count, order.size))
    x, exists = pool.arrays["images"][jnp.unravel_index(place, ours.shape)], value >= 0
    x = sources.restored(x, parts.mean, parts.std)
    return jnp.where(exists[:, None, None, None], x, 0.0), exists

  whole, batch = replicated(mesh), batch_sharding(mesh)
  best = {**dict.fromkeys((recorded_shapes or {}), batch), "images": batch, "loss": whole}
  shardings = whole, {"pool": pools.sharding(mesh), "best": best, "labels": whole}
  return Method(
    generator_terms,
    student_terms,
    source=student_source(parts),
    init=init,
    begin=begin,
    draw=draw,
    record=with_images,
    observe=observe,
    keep=keep,
    samples=samples,
    pool=lambda state: state.memory["pool"],
    noise=noise,
    batch_size=number,
    shardings=shardings,
    optimisers={LATENTS: tx} if latents else {},
    keeps_generator=False,
    fidelity="pool_fidelity",
  )


def started(
  parts: Parts, state: State, generator: TrainState, y: jax.Array, z: jax.Array, latents: TrainState | None = None
) -> State:
  """A state in which `generator`, and `latents` if there are any, are to be optimised.

  The best batch so far is their first: the images of z (N, nz) for the classes y (N,).
  """
  x, _ = sources.sample_images(parts.generator.net, generator.variables, z, y)
  best = {**state.memory["best"], "loss": jnp.array(jnp.inf), "images": x}
  new = {
    "generator": generator,
    "trained": {**state.trained, **({LATENTS: latents} if latents else {})},
    "memory": {**state.memory, "best": best, "labels": y},
  }
  old = {name: getattr(state, name) for name in new}
  return state.replace(**jax.tree.map(lambda a, b: a.astype(b.dtype), new, old))


def student_source(parts: Parts) -> sources.Source:
  """The pool, mixed with config.pool.fresh_share of fresh samples of the current generator."""
  config, mesh = parts.config, parts.mesh
  number, views = fresh_number(config), config.pool.views
  pooled = sources.pooled((config.schedule.batch_size - number) // views, mesh, views, parts.mean, parts.std)
  if not number:
    return pooled
  return sources.mixture([sources.fresh(parts.generator.net, parts.noise, number), pooled], mesh)


def fresh_number(config) -> int:
  return round(config.pool.fresh_share * config.schedule.batch_size)


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses sizes of pool and batches that do not fit each other or the devices."""
  batch = config.pool.batch_size
  check_divisible(mesh, "config.pool.batch_size", batch)
  check_multiple("config.pool.size", config.pool.size, batch)
  if fresh_number(config) == config.schedule.batch_size:
    raise Refusal(
      f"config.pool.fresh_share is {config.pool.fresh_share}; it must leave some of the"
      f" {config.schedule.batch_size} images of config.schedule.batch_size to the pool."
    )
  if fresh_number(config):
    for count in (fresh_number(config), config.schedule.batch_size - fresh_number(config)):
      check_divisible(mesh, "a part of config.schedule.batch_size under config.pool.fresh_share", count)
  if (config.schedule.batch_size - fresh_number(config)) % (config.pool.views * mesh.size):
    raise Refusal(
      f"config.pool.views is {config.pool.views}, which does not divide the"
      f" {config.schedule.batch_size - fresh_number(config)} images of a student's batch that come from the pool"
      + (f", over {mesh.size} devices." if mesh.size > 1 else ".")
    )
  if config.pool.views > 1 and not (config.student.crop_pad or config.student.flip):
    raise Refusal(
      f"config.pool.views is {config.pool.views}, but all views of an image are the same without crops and flips; set"
      " config.student.crop_pad or config.student.flip, or config.pool.views to 1."
    )
  others = [name for name, weight in config.loss.student.items() if weight and name not in (*OF_LOGITS, "head")]
  if config.pool.logits and others:
    raise Refusal(
      f"config.pool.logits keeps nothing of the teacher but its logits, and config.loss.student.{others[0]} needs more;"
      " set one of the two to False or 0."
    )
  if config.pool.logits and (config.pool.fresh_share or config.pool.views > 1):
    raise Refusal(
      "config.pool.logits keeps the teacher's logits of one view of each image in the pool; set config.pool.fresh_share"
      " to 0 and config.pool.views to 1, or config.pool.logits to False."
    )
  if config.generator.between_share:
    raise Refusal(
      f"config.generator.between_share is {config.generator.between_share}, but method '{config.method}' has no"
      " generator whose norms carry the class; set it to 0."
    )
  if config.generator.micro_batches != 1:
    raise Refusal("config.generator.micro_batches must be 1 for methods that optimise their latents.")


def check_multiple(what: str, size: int, batch: int) -> None:
  if size % batch:
    raise Refusal(f"{what} is {size}; set it to a multiple of config.pool.batch_size, {batch}.")
