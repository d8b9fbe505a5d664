"""The pytrees that training carries, and what a network returns."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Tree = Any


@struct.dataclass
class Output:
  """What every classifier of `nets` returns.

  Attributes:
    logits: (N, C).
    features: (N, D), the input of the last linear layer scaled to unit L2 norm (of the head, where there is one).
    stages: feature maps (N, H, W, K) at the end of each stage, first stage first.
    head_features: `features` with everything below a feature head detached, so that a loss on it trains the head
      alone; None without a head.
    pooled: (N, D), the features before they were scaled, where the net tells.
    projected: per stage (N, K), its spatial average at the width of the teacher's stage; None without projections.
  """

  logits: jax.Array
  features: jax.Array
  stages: tuple[jax.Array, ...]
  head_features: jax.Array | None = None
  pooled: jax.Array | None = None
  projected: tuple[jax.Array, ...] | None = None


@struct.dataclass
class TrainState:
  """A network under training. `batch_stats` holds the running means and variances of its batch norm layers."""

  params: Tree
  batch_stats: Tree
  opt_state: Tree

  @property
  def variables(self):
    return {"params": self.params, "batch_stats": self.batch_stats}

  def updated(self, tx, grads, batch_stats):
    """The state after one update of the optax chain `tx`."""
    updates, opt_state = tx.update(grads, self.opt_state, self.params)
    params = jax.tree.map(lambda p, u: p + u.astype(p.dtype), self.params, updates)
    return self.replace(params=params, batch_stats=batch_stats, opt_state=opt_state)


@struct.dataclass
class DistillState:
  """Everything that changes during a distillation, and nothing else.

  Attributes:
    step: iterations done, () int32.
    key: the run's PRNG key; steps fold their number into it and never change it.
    generator: its TrainState.
    student: its TrainState; the parameters of a feature head are among its parameters.
    memory: the image pool and the batch in the making, for methods that invert (cpsc_jax.pool); empty otherwise.
  """

  step: jax.Array
  key: jax.Array
  generator: TrainState
  student: TrainState
  memory: Tree

  def tick(self):
    return self.replace(step=self.step + 1)


@struct.dataclass
class SupervisedState:
  """Training on a labelled set: teachers, and the control arms that use real data."""

  step: jax.Array
  key: jax.Array
  net: TrainState

  def tick(self):
    return self.replace(step=self.step + 1)


@struct.dataclass
class View:
  """What one batch looks like to the terms of a method.

  Attributes:
    labels: (N,) int32, the classes asked of the generator (or real labels).
    teacher, student: their `Output` on the batch.
    moments: per batch norm layer of the teacher, the batch mean and biased variance of its input; empty unless asked
    for. running: the teacher's running mean and variance of the same layers, same keys.
    images: (N, H, W, K) as the generator drew them, before any crop or flip.
    key: for terms that draw at random.
    bank: (M, D) what the method's critic saw of earlier batches, and its fill counter (); None without a critic.
    teach: images -> the teacher's `Output`. criticise: (N, D) -> the critic's output. Both for the generator's terms.
  """

  labels: jax.Array
  teacher: Output
  student: Output
  moments: Tree = struct.field(default_factory=dict)
  running: Tree = struct.field(default_factory=dict)
  images: jax.Array | None = None
  key: jax.Array | None = None
  bank: Tree = None
  teach: Any = struct.field(pytree_node=False, default=None)
  criticise: Any = struct.field(pytree_node=False, default=None)


def step_counter():
  return jnp.zeros((), jnp.int32)
