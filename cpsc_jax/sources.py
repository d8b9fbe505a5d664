"""Where a student's batches come from: fresh samples, an image pool, real data, or a mixture of these.

A source is (state, key, data) -> (state, `Batch`). It may move its own part of the state, and nothing is differentiated
through it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from cpsc_jax import datasets, nets, streams
from cpsc_jax import pool as pools
from cpsc_jax.mesh import batch_sharding
from cpsc_jax.setup import Noise, Source
from cpsc_jax.state import Batch, State, Tree
from cpsc_jax.streams import Stream


def of_generator(state: State) -> Tree:
  """The variables of the generator under training."""
  return state.generator.variables


def fresh(
  generator: Any,
  noise: Noise,
  number: int,
  move_statistics: bool = False,
  of: Callable[[State], Tree] = of_generator,
  between: int = 0,
) -> Source:
  """`number` new samples of the generator with the variables `of` a state, normalised by their own batch.

  With `move_statistics` its running statistics take these batches in, as in the published code of CPSC-DFKD. The last
  `between` of the samples lie between classes.
  """

  def source(state: State, key: jax.Array, _: Any) -> tuple[State, Batch]:
    z, y = noise.draw(key, number, state.prior)
    targets = None
    if between:
      classes, weights = noise.draw_between(streams.key(key, Stream.BETWEEN), between, state.prior)
      y = y.at[number - between :].set(classes[:, 0])
      mixed = jnp.einsum("nk,nkc->nc", weights, jax.nn.one_hot(classes, generator.num_classes))
      targets = jax.nn.one_hot(y, generator.num_classes).at[number - between :].set(mixed)
      y, targets = jax.lax.with_sharding_constraint((y, targets), batch_sharding(noise.mesh))
    x, stats = sample_images(generator, of(state), z, y if targets is None else targets)
    if move_statistics:
      state = state.replace(generator=state.generator.replace(batch_stats=stats))
    return state, Batch(x, y, targets)

  return source


def gaussian(number: int, image_shape: tuple[int, int, int], mesh: jax.sharding.Mesh) -> Source:
  """`number` images of standard normal noise in normalised space, all labelled 0."""

  def source(state: State, key: jax.Array, _: Any) -> tuple[State, Batch]:
    batch = Batch(jax.random.normal(key, (number, *image_shape)), jnp.zeros((number,), jnp.int32))
    return state, jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))

  return source


def sample_images(generator: Any, variables: Tree, z: jax.Array, y: jax.Array) -> tuple[jax.Array, Tree]:
  """Images (N, H, W, K) normalised by their own batch, and the batch statistics afterwards."""
  x, stats = nets.forward(generator, variables, z, y, train=True)
  return jax.lax.stop_gradient(x), stats


def pooled(
  number: int, mesh: jax.sharding.Mesh, views: int = 1, mean: Sequence[float] = (), std: Sequence[float] = ()
) -> Source:
  """`number` images of the pool in `State.memory["pool"]`, with the labels they were asked for.

  Each is given `views` times, one view after the other, for crops and flips to tell apart. `mean` and `std` are those
  of the teacher's input, which images held as uint8 need.
  """

  def source(state: State, key: jax.Array, _: Any) -> tuple[State, Batch]:
    drawn = pools.draw(state.memory["pool"], key, number)
    drawn["images"] = restored(drawn["images"], mean, std)
    if "logits" in drawn:
      drawn["logits"] = drawn["logits"].astype(drawn["images"].dtype)
    batch = jax.tree.map(lambda x: jnp.repeat(x, views, axis=0), Batch(**drawn))
    return state, jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))

  return source


def remembered(new: Source) -> Source:
  """The batches of `new`, which join the pool in `State.memory["pool"]`."""

  def source(state: State, key: jax.Array, data: Any) -> tuple[State, Batch]:
    state, batch = new(state, key, data)
    pool = pools.add(state.memory["pool"], images=batch.images, labels=batch.labels)
    return state.replace(memory={**state.memory, "pool": pool}), batch

  return source


def stored(images: jax.Array, dtype: str, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """Normalised images (N, H, W, K) as a pool of `dtype` holds them: "uint8" clips to [0, 1] and rounds to 8 bits."""
  if dtype != "uint8":
    return images
  pixels = images * jnp.asarray(std, images.dtype) + jnp.asarray(mean, images.dtype)
  return jnp.round(255 * jnp.clip(pixels, 0, 1)).astype(jnp.uint8)


def restored(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """The normalised images of what `stored` gave."""
  return datasets.normalise(images, mean, std) if images.dtype == jnp.uint8 else images


def real(
  number: int,
  mean: Sequence[float],
  std: Sequence[float],
  mesh: jax.sharding.Mesh,
  of: Callable[[Any], datasets.Split] = lambda data: data,
) -> Source:
  """`number` images of a training split, in the order and from the position in `State.memory` (see `shuffle`).

  Images are normalised by the mean and standard deviation of each channel, of pixels in [0, 1]. The split is that `of`
  the data.
  """

  def source(state: State, _: jax.Array, data: Any) -> tuple[State, Batch]:
    position = state.memory["position"]
    rows = jax.lax.dynamic_slice_in_dim(state.memory["order"], position, number)
    memory = {**state.memory, "position": position + number}
    return state.replace(memory=memory), _rows_of(of(data), rows, mean, std, mesh)

  return source


def drawn(
  number: int,
  mean: Sequence[float],
  std: Sequence[float],
  mesh: jax.sharding.Mesh,
  of: Callable[[Any], datasets.Split],
) -> Source:
  """As `real`, but each image is drawn by itself, so that one may come twice."""

  def source(state: State, key: jax.Array, data: Any) -> tuple[State, Batch]:
    split = of(data)
    return state, _rows_of(split, jax.random.randint(key, (number,), 0, len(split)), mean, std, mesh)

  return source


def _rows_of(split: datasets.Split, rows: jax.Array, mean, std, mesh: jax.sharding.Mesh) -> Batch:
  x, y = jax.lax.with_sharding_constraint((split.images[rows], split.labels[rows]), batch_sharding(mesh))
  return Batch(datasets.normalise(x, mean, std), y)


def empty_order(length: int) -> Tree:
  """The memory of `real` before its first iteration, which sees `length` images."""
  return {"order": jnp.zeros((length,), jnp.int32), "position": jnp.zeros((), jnp.int32)}


def shuffle(state: State, key: jax.Array, size: int) -> State:
  """The state with a new order of a training split of `size` images: as many whole permutations as it takes."""
  length = state.memory["order"].shape[0]
  keys = streams.keys(key, Stream.ORDER, -(-length // size))
  order = jax.vmap(lambda k: jax.random.permutation(k, size))(keys).reshape(-1)[:length]
  new = {"order": order.astype(jnp.int32), "position": jnp.zeros((), jnp.int32)}
  return state.replace(memory={**state.memory, **new})


def mixture(parts: Sequence[Source], mesh: jax.sharding.Mesh) -> Source:
  """The batches of several sources, one after the other; each source gives as many images as its share."""

  def source(state: State, key: jax.Array, data: Any) -> tuple[State, Batch]:
    batches, keys = [], streams.keys(key, Stream.PARTS, len(parts))
    for part, key in zip(parts, keys, strict=True):
      state, batch = part(state, key, data)
      batches.append(batch)
    classes = next((batch.targets.shape[-1] for batch in batches if batch.targets is not None), 0)
    if classes:
      batches = [b if b.targets is not None else b.replace(targets=jax.nn.one_hot(b.labels, classes)) for b in batches]
    joined = jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *batches)
    return state, jax.lax.with_sharding_constraint(joined, batch_sharding(mesh))

  return source
