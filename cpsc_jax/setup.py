"""What stays fixed while training runs: the nets and optimisers of both players, and the method."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import prior as priors
from cpsc_jax import streams
from cpsc_jax.gradients import Policy
from cpsc_jax.mesh import batch_sharding
from cpsc_jax.pool import Pool
from cpsc_jax.state import Batch, Output, Prior, State, Tree, View
from cpsc_jax.streams import Stream

LATENTS = "latents"  # the name in `State.trained` of latents that a method optimises; the generator is given these

Draw = Callable[[State, jax.Array], tuple[jax.Array, jax.Array]]
Source = Callable[[State, jax.Array, Any], tuple[State, Batch]]
Teach = Callable[[jax.Array], Output]


@dataclasses.dataclass(frozen=True)
class Term:
  """A term of a loss.

  Attributes:
    value: view -> (N,) where samples do not depend on each other; () where the term couples the batch.
    couples_batch: gradients of such a term cannot be accumulated over micro-batches.
  """

  value: Callable[[View], jax.Array]
  couples_batch: bool = False


@dataclasses.dataclass(frozen=True)
class Noise:
  """What a generator is asked for: standard normal latents, and labels, by default equally likely or equally common.

  Attributes:
    latent_dim: width of the latents.
    num_labels: labels are below it.
    labelled: whether a label means the class asked for, so that label fidelity can be measured.
    balanced: whether a batch has all labels equally often, in a random order, as far as they go; or as often as a prior
      says (`prior.stratified`).
    between: of a sample between classes, how many classes it lies between.
    mesh: batches are split over its devices.
  """

  latent_dim: int
  num_labels: int
  labelled: bool
  mesh: jax.sharding.Mesh
  balanced: bool = False
  between: int = 2

  def draw(self, key: jax.Array, number: int, prior: Prior | None = None) -> tuple[jax.Array, jax.Array]:
    """`number` latents (N, nz) and labels (N,) int32, from streams of `key`; `prior` is that of a `State`."""
    z = jax.random.normal(streams.key(key, Stream.LATENTS), (number, self.latent_dim))
    key_labels = streams.key(key, Stream.LABELS)
    if prior is not None and self.balanced:
      y = priors.stratified(streams.key(key, Stream.OFFSET), key_labels, prior.shares, number)
    elif prior is not None:
      y = priors.drawn(key_labels, prior.shares, (number,))
    elif self.balanced:
      y = jax.random.permutation(key_labels, jnp.arange(number, dtype=jnp.int32) % self.num_labels)
    else:
      y = jax.random.randint(key_labels, (number,), 0, self.num_labels)
    return jax.lax.with_sharding_constraint((z, y), batch_sharding(self.mesh))

  def draw_between(self, key: jax.Array, number: int, prior: Prior | None = None) -> tuple[jax.Array, jax.Array]:
    """`number` points between classes: the classes (N, between) int32, and the weight of each, (N, between).

    Weights are the softmax of standard normal numbers (Qimera: Choi et al., NeurIPS 2021, arXiv 2111.02625); in each
    row the heaviest class comes first.
    """
    key_labels, key_weights = streams.key(key, Stream.LABELS), streams.key(key, Stream.BETWEEN)
    if prior is None:
      y = jax.random.randint(key_labels, (number, self.between), 0, self.num_labels)
    else:
      y = priors.drawn(key_labels, prior.shares, (number, self.between))
    weights = jax.nn.softmax(jax.random.normal(key_weights, (number, self.between)))
    return y, -jnp.sort(-weights, axis=-1)


def _nothing(key: jax.Array) -> tuple[dict, Tree]:
  return {}, {}


def _unchanged(state: State, *_: Any) -> State:
  return state


@dataclasses.dataclass(frozen=True)
class Method:
  """A method: its terms, and functions that own its part of the state, in the order in which an iteration calls them.

  Attributes:
    generator_terms, student_terms: {name: Term} of the active terms; their weights are in `State.hyper`.
    init: key -> (`State.trained`, `State.memory`).
    begin: (state, key) -> state, at the start of an iteration.
    draw: (state, key) -> (latents (N, nz), labels (N,)) of a generator update; None where nothing is generated.
    record: view -> {name: array (N, ...)}, what `observe` needs of a generator update.
    observe: (state, losses, recorded) -> state, after a generator update.
    keep: (state, key, images -> the teacher's `Output`) -> state, after the last generator update.
    source: (state, key, data) -> (state, `Batch`), what a student update learns from. `data` is the training split
      where `cpsc_jax.teach` hands one over, and None in data-free training.
    learned: (state, batch, what the student's loss returned beside its value) -> state, after a student update.
    samples: (state, key, label, number) -> (images (number, H, W, K), which of them exist (number,)), for diagnostics.
    pool: state -> the image pool, or None.
    noise: what the generator is asked for; None where nothing is generated.
    batch_size: images of a generator update.
    shardings: (sharding of `State.trained`, sharding of `State.memory`) or trees of them; None: on every device.
    optimisers: {name: optimiser} of those parts of `State.trained` that do not share the generator's, and "generator"
      where it is not the config's.
    waits: state -> whether the student's updates of this iteration are left out, () bool; None: never.
    rests: state -> whether the generator's updates of this iteration, and `keep`, are left out, () bool; None: never.
    keeps_generator: whether `State.generator` is worth keeping at the end.
    fidelity: what the share of `samples` to which the teacher gives their label is called: "label_fidelity" of fresh
      samples, "pool_fidelity" of the pool's.
  """

  generator_terms: dict[str, Term]
  student_terms: dict[str, Term]
  source: Source
  init: Callable[[jax.Array], tuple[dict, Tree]] = _nothing
  begin: Callable[[State, jax.Array], State] = _unchanged
  draw: Draw | None = None
  record: Callable[[View], dict[str, jax.Array]] = lambda view: {}
  observe: Callable[..., State] = _unchanged
  keep: Callable[[State, jax.Array, Teach], State] = _unchanged
  learned: Callable[[State, Batch, Tree], State] = _unchanged
  samples: Callable[..., tuple[jax.Array, jax.Array]] | None = None
  pool: Callable[[State], Pool | None] = lambda state: None
  noise: Noise | None = None
  batch_size: int = 0
  shardings: tuple[Tree, Tree] | None = None
  optimisers: Mapping[str, optax.GradientTransformation] = dataclasses.field(default_factory=dict)
  waits: Callable[[State], jax.Array] | None = None
  rests: Callable[[State], jax.Array] | None = None
  keeps_generator: bool = True
  fidelity: str = "label_fidelity"


@dataclasses.dataclass(frozen=True)
class Player:
  """A net under training, and how it is trained.

  Attributes:
    net: a flax.linen.Module.
    optimiser: an optax optimiser.
    steps: updates per iteration.
    policy: how its gradients are taken.
    augment: (key, images) -> images, applied to what the student learns from, or to what both nets see of the
      generator's images; None for neither.
    loss_scaling: whether its loss is scaled dynamically (float16).
    init: what `nets.init` calls the way in which convolutions start.
    norm_parts: of a batch, of which its batch norms take statistics one by one (`nets.forward`).
  """

  net: Any
  optimiser: optax.GradientTransformation
  steps: int
  policy: Policy = Policy()
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
  loss_scaling: bool = False
  init: str = "kaiming"
  norm_parts: int = 1


@dataclasses.dataclass(frozen=True)
class Setup:
  """Everything that training needs and does not change.

  Attributes:
    student: the net that learns; in teacher training, the teacher's.
    method: see `Method`.
    mesh: the devices.
    teacher: a flax.linen.Module, or None where labels alone teach.
    generator: None where nothing is generated.
    weights: {"generator": {name: weight}, "student": {name: weight}} of the active terms, with which a state begins.
    student_trains_in_generator_steps: the student is in training mode there and its running statistics move, as in
      the published code of CPSC-DFKD; else it is in evaluation mode.
  """

  student: Player
  method: Method
  mesh: jax.sharding.Mesh
  weights: dict[str, dict[str, float]]
  teacher: Any = None
  generator: Player | None = None
  student_trains_in_generator_steps: bool = False

  def optimiser_of(self, name: str) -> optax.GradientTransformation:
    """The optimiser of "generator" or of one of `State.trained`."""
    return self.method.optimisers.get(name, self.generator.optimiser)
