"""CMI: Contrastive Model Inversion (Fang et al., IJCAI 2021; arXiv 2105.08584).

A sample's global view (the one that all terms see) and its local view (a zoomed crop, perhaps flipped) are pulled
together and away from all others, those of a memory bank included. What is compared are features of the teacher,
averaged over space and mapped by a critic that is trained along: the inputs of all its batch norms, or its stages, as
the published code has it for wide ResNets and for ResNets.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.lax import stop_gradient

from cpsc_jax import initial, losses, nets, streams
from cpsc_jax import pool as pools
from cpsc_jax.errors import Refusal
from cpsc_jax.methods import inversion, terms
from cpsc_jax.methods.base import Parts
from cpsc_jax.nets.layers import linear, unit
from cpsc_jax.setup import Method, Teach, Term
from cpsc_jax.state import Output, State, TrainState, Tree, View
from cpsc_jax.streams import Stream

INVERTS = True
SMALLEST = 0.25  # share of the image's area that a local view shows at least
RATIO = 4 / 3  # of its sides, at most

Features = Callable[[Output], jax.Array]  # what views are compared by, (N, D)


class Critic(nn.Module):
  """(N, D) -> (N, features) of unit length: the two-layer head under which views are compared."""

  features: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    return unit(linear(self.features, width, name="second")(nn.relu(linear(width, width, name="first")(x))))


def method(parts: Parts) -> Method:
  c, pool = parts.config.loss.views, parts.config.pool
  critic = Critic(c.width)
  features = FEATURES[c.features]
  width = jax.eval_shape(features, nets.observed_shapes(parts.teacher, parts.image_shape)).shape[-1]

  def views(v: View) -> jax.Array:
    return instance_contrast(v, critic, features, c)

  def recorded(v: View) -> dict[str, jax.Array]:
    return {"features": jnp.concatenate(two_views(v, features, c.flip), axis=1)}

  base = inversion.inverting(
    parts,
    {
      "bn": terms.BN,
      "ce": terms.CE,
      "adversarial": terms.divergence(losses.kl_where_agreed),
      "views": Term(views, couples_batch=True),
    },
    {"kd": terms.kd(parts.config)},
    record=recorded,
    recorded_shapes={"features": (2 * width,)},
  )

  optimiser = optax.adam(c.lr)

  def init(key: jax.Array) -> tuple[dict[str, TrainState], Tree]:
    trained, memory = base.init(key)
    variables = jax.jit(critic.init)(key, jnp.zeros((2, width)))
    trained["critic"] = initial.train_state({**variables, "batch_stats": {}}, optimiser)
    bank = pools.empty(pool.bank // pool.batch_size, pool.batch_size, features=((2 * width,), jnp.float32))
    return trained, {**memory, "bank": bank}

  def keep(state: State, key: jax.Array, teach: Teach) -> State:
    state = base.keep(state, key, teach)
    bank = pools.add(state.memory["bank"], features=state.memory["best"]["features"])
    return state.replace(memory={**state.memory, "bank": bank})

  trained, memory = base.shardings
  shardings = trained, {**memory, "bank": pools.sharding(parts.mesh)}
  optimisers = {**base.optimisers, "critic": optimiser}
  return dataclasses.replace(base, init=init, keep=keep, shardings=shardings, optimisers=optimisers)


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses settings of pool, bank and contrast that do not fit each other."""
  inversion.check(config, mesh)
  inversion.check_multiple("config.pool.bank", config.pool.bank, config.pool.batch_size)
  if config.loss.views.negatives > config.pool.bank:
    raise Refusal(
      f"config.loss.views.negatives is {config.loss.views.negatives}, more than the {config.pool.bank} samples of the"
      " bank; draw fewer or enlarge config.pool.bank."
    )


def two_views(v: View, features: Features, flip: bool) -> tuple[jax.Array, jax.Array]:
  """The teacher's features of the local and of the global views, before the critic: two (N, D)."""
  return features(v.teach(zoom(streams.key(v.key, Stream.LOCAL_VIEWS), v.images, flip))), features(v.teacher)


def averaged_stages(output: Output) -> jax.Array:
  return jnp.concatenate([losses.spatial_mean(stage) for stage in output.stages], axis=1)


def batch_norm_inputs(output: Output) -> jax.Array:
  return jnp.concatenate([seen["samples"] for seen in output.statistics.seen.values()], axis=1)


FEATURES: dict[str, Features] = {"stages": averaged_stages, "batch_norm": batch_norm_inputs}


def instance_contrast(v: View, critic: nn.Module, features: Features, c: ml_collections.ConfigDict) -> jax.Array:
  """Each local view against all global ones, of this batch and of c.negatives from the bank: () (eq. 6)."""
  local, whole = two_views(v, features, c.flip)
  number = local.shape[0]
  key = streams.key(v.key, Stream.NEGATIVES)
  drawn, present = pools.draw_without_replacement(v.memory["bank"], key, c.negatives)
  banked_local, banked_whole = jnp.split(drawn["features"], 2, axis=1)
  variables = {"params": v.trained["critic"]}
  ours = critic.apply(variables, jnp.concatenate([local, banked_local]))
  others = stop_gradient(critic.apply(variables, jnp.concatenate([whole, banked_whole])))
  present = jnp.concatenate([jnp.ones(number, bool), present])
  log_p = jax.nn.log_softmax(jnp.where(present, ours @ others.T / c.temperature, -jnp.inf), axis=1)
  loss = -jnp.diagonal(log_p)
  banked = jnp.where(present[number:], loss[number:], 0.0)
  return jnp.mean(loss[:number]) + jnp.sum(banked) / jnp.maximum(jnp.sum(present[number:]), 1)


def zoom(key: jax.Array, images_NHWK: jax.Array, flip: bool = False) -> jax.Array:
  """A random part of each image, between SMALLEST and all of its area, enlarged to its size; bilinear.

  With `flip` half of them are mirrored.
  """
  n, height, width, channels = images_NHWK.shape
  key_area, key_ratio, key_place, key_flip = jax.random.split(key, 4)
  if flip:
    mirrored = jax.random.bernoulli(key_flip, shape=(n, 1, 1, 1))
    images_NHWK = jnp.where(mirrored, images_NHWK[:, :, ::-1], images_NHWK)
  area = jax.random.uniform(key_area, (n,), minval=SMALLEST, maxval=1.0)
  ratio = jnp.exp(jax.random.uniform(key_ratio, (n,), minval=-jnp.log(RATIO), maxval=jnp.log(RATIO)))
  shares = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1), 1.0)
  size = jnp.array([height, width], images_NHWK.dtype)
  corner = jax.random.uniform(key_place, (n, 2)) * (1 - shares) * size

  def one(image: jax.Array, share: jax.Array, corner: jax.Array) -> jax.Array:
    shape = (height, width, channels)
    return jax.image.scale_and_translate(image, shape, (0, 1), 1 / share, -corner / share, "bilinear", antialias=False)

  return jax.vmap(one)(images_NHWK, shares, corner)
