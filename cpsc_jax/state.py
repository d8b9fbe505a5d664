"""The pytrees that training carries, and what a network returns."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from flax.training.dynamic_scale import DynamicScale

Tree = Any
PRIOR = "prior"  # the name in `State.memory` of the prior of labels


@struct.dataclass
class Statistics:
  """What a prior over inputs compares, layer by layer; for batch norm, the moments of a layer's input.

  Attributes:
    seen: {layer: {"mean": (K,), "var": (K,), "samples": (N, K)}} of the current batch: mean and biased variance over
      batch and space, and each sample's mean over space.
    stored: {layer: {"mean": (K,), "var": (K,)}} of the training data.
  """

  seen: Tree
  stored: Tree


@struct.dataclass
class Output:
  """What every classifier of `nets` returns.

  Attributes:
    logits: (N, C).
    features: (N, D), the input of the last linear layer scaled to unit L2 norm (of the feature head, if there is one);
      None where nothing but logits is known.
    stages: what each stage ends with, first stage first: feature maps (N, H, W, K) or tokens (N, T, K).
    head_features: `features` with everything below a feature head detached, so that a loss on it trains the head
      alone; None without a head.
    pooled: (N, D), the features before they were scaled.
    projected: per stage (N, K), its spatial average at the width of the teacher's stage; None without projections.
    statistics: what a prior over inputs compares. `nets.forward_observed` fills it in for nets with batch norm; a net
      of another kind may publish its own. None where there is nothing to compare.
  """

  logits: jax.Array
  features: jax.Array | None = None
  stages: tuple[jax.Array, ...] = ()
  head_features: jax.Array | None = None
  pooled: jax.Array | None = None
  projected: tuple[jax.Array, ...] | None = None
  statistics: Statistics | None = None


@struct.dataclass
class TrainState:
  """A network, or any other pytree of parameters, under training.

  Attributes:
    params: what gradients move.
    batch_stats: running means and variances of batch norm layers.
    opt_state: of the optax optimiser.
    loss_scale: dynamic loss scale of float16 training; None without.
  """

  params: Tree
  batch_stats: Tree
  opt_state: Tree
  loss_scale: DynamicScale | None = None

  @property
  def variables(self) -> dict[str, Tree]:
    return {"params": self.params, "batch_stats": self.batch_stats}

  def updated(
    self, tx: optax.GradientTransformation, grads: Tree, batch_stats: Tree, factor: jax.Array | float = 1.0
  ) -> "TrainState":
    """The state after one update by `tx`, whose step is multiplied by the learning-rate factor `factor`."""
    updates, opt_state = tx.update(grads, self.opt_state, self.params)
    params = jax.tree.map(lambda p, u: p + (factor * u).astype(p.dtype), self.params, updates)
    return self.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)


@struct.dataclass
class Losses:
  """What one update reports.

  Attributes:
    total: the weighted sum that was minimised.
    terms: {name: value before weighting} of the active terms.
  """

  total: jax.Array
  terms: dict[str, jax.Array]


@struct.dataclass
class Weights:
  """Numbers of one player that may differ between members of a sweep.

  Attributes:
    terms: {name: weight} of its active terms, each ().
    lr: factor on every step of its optimiser, ().
  """

  terms: dict[str, jax.Array]
  lr: jax.Array


@struct.dataclass
class Hyper:
  """The numbers that training reads from its state, so that `jax.vmap` over states is a sweep over them."""

  generator: Weights
  student: Weights


@struct.dataclass
class Prior:
  """From which distribution labels are drawn.

  Attributes:
    shares: of the classes, (L,), sum 1.
    disagreement: of each class, how often student and teacher disagree on its samples, (L,); None where shares stay.
  """

  shares: jax.Array
  disagreement: jax.Array | None = None


@struct.dataclass
class State:
  """Everything that changes during training, and nothing else.

  Attributes:
    step: iterations done, () int32.
    key: the run's key; steps derive theirs from it and never change it.
    generator: its TrainState; None where nothing is generated (training on real data).
    student: the TrainState of the net that learns; the parameters of a feature head are among its parameters.
    trained: {name: TrainState} of what the method trains along with the generator, by the generator's loss.
    memory: what else the method keeps: an image pool, a bank, the order of the data, the `Prior` of labels (PRIOR).
    hyper: weights of the loss terms and factors of the learning rates; never changed by training.
  """

  step: jax.Array
  key: jax.Array
  generator: TrainState | None
  student: TrainState
  trained: dict[str, TrainState]
  memory: Tree
  hyper: Hyper

  @property
  def prior(self) -> Prior | None:
    """From which labels are drawn; None: all are equally likely."""
    return self.memory.get(PRIOR) if isinstance(self.memory, dict) else None

  def with_prior(self, prior: Prior) -> "State":
    return self.replace(memory={**self.memory, PRIOR: prior})

  def tick(self) -> "State":
    return self.replace(step=self.step + 1)


@struct.dataclass
class Batch:
  """What a student update learns from.

  Attributes:
    images: (N, H, W, K) in the teacher's normalised space.
    labels: (N,) int32, the classes asked of the generator (or real labels); of a sample between classes, its first.
    targets: (N, C), the share of each class in every sample, where some lie between classes; else None.
    logits: (N, C), the teacher's on these very images, where they are known already; else None.
  """

  images: jax.Array
  labels: jax.Array
  targets: jax.Array | None = None
  logits: jax.Array | None = None


@struct.dataclass
class View:
  """What one batch looks like to the terms of a method.

  Attributes:
    labels: (N,) int32, the classes asked of the generator (or real labels).
    teacher, student: their `Output` on the batch; the teacher's has `statistics` in generator steps, and nothing but
      logits where these were known already.
    images: (N, H, W, K) as the generator drew them, before any crop or flip.
    key: for terms that draw at random; each derives a stream of its own from it (cpsc_jax.streams).
    trained: {name: parameters} of what the method trains along.
    memory: the method's own part of the state.
    teach: images -> the teacher's `Output`, for terms of the generator.
    student_params: the student's own parameters, in its updates.
    targets: as in `Batch`.
  """

  labels: jax.Array
  teacher: Output
  student: Output
  images: jax.Array | None = None
  key: jax.Array | None = None
  trained: dict[str, Tree] = struct.field(default_factory=dict)
  memory: Tree = None
  teach: Any = struct.field(pytree_node=False, default=None)
  targets: jax.Array | None = None
  student_params: Tree = None


def step_counter() -> jax.Array:
  return jnp.zeros((), jnp.int32)


def at_least_float32(x: jax.Array) -> jax.Array:
  """The same numbers in float32 if they have fewer bits, whatever precision a net computed in."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))
