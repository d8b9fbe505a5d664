"""From which distribution the labels are drawn that a generator is asked for: shares of the classes, (L,), sum 1.

They lie in the state (`State.prior`), so that members of a sweep may differ in them and a resumed run goes on with what
it had.
"""

import dataclasses
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import files, nets
from cpsc_jax.errors import Refusal, first_line
from cpsc_jax.state import Prior, Tree

LARGEST_FILE = 2**24  # bytes
ENDINGS = (".json", ".npy", ".txt")
LEAST_NEED = 1e-3  # a class on which student and teacher disagree more rarely counts as needing so much
BATCHES, BATCH = 8, 256  # of noise, by which `of_teacher` asks a teacher


@dataclasses.dataclass(frozen=True)
class Need:
  """How shares follow the disagreement of student and teacher.

  Attributes:
    floor: the part of all labels that is drawn alike from all classes, above 0, so that no class is forgotten.
    momentum: what of a class's estimate is left after one more sample of it.
  """

  floor: float
  momentum: float


def drawn(key: jax.Array, shares: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Labels of a shape, int32, each drawn by itself from shares (L,)."""
  return _at(shares, jax.random.uniform(key, shape))


def stratified(key: jax.Array, key_order: jax.Array, shares: jax.Array, number: int) -> jax.Array:
  """`number` labels (N,) int32 in a random order, of which each class has its share, rounded up or down.

  Systematic sampling: equally spaced points with one offset at random, so that class c, whose share is p_c, has
  floor(N p_c) or ceil(N p_c) labels and N p_c in the mean (Cochran, Sampling Techniques, 3rd ed., chapter 8).
  """
  points = (jnp.arange(number) + jax.random.uniform(key)) / number
  return jax.random.permutation(key_order, _at(shares, points))


def _at(shares: jax.Array, points: jax.Array) -> jax.Array:
  """The classes in whose part of [0, 1) points lie; none of a share of 0."""
  ends = jnp.cumsum(shares)
  points = jnp.minimum(points, np.nextafter(1, 0, dtype=points.dtype))  # rounding may have made one 1
  return jnp.searchsorted(ends / ends[-1], points, side="right", method="compare_all").astype(jnp.int32)


def first(shares: np.ndarray | jax.Array, number: int) -> np.ndarray | jax.Array:
  """Of shares (C,) those of the first classes, (number,), which sum to 1 again."""
  kept = shares[:number]
  return kept / kept.sum()


def read(given: str) -> np.ndarray:
  """What config.generator.prior_shares gives: numbers (C,) float64, not negative and with a sum above 0.

  Args:
    given: numbers with commas between, or the name of a .json, .npy or .txt file with a number for each class.

  Raises:
    Refusal: neither; or numbers that are no shares.
  """
  key, needed = "config.generator.prior_shares", "give one number for each class, such as 5,3,1, or a file of them"
  said = f"{key} is '{given if len(given) < 60 else given[:57] + '...'}'"
  try:
    shares = _parsed(given)
  except Exception as error:  # NumPy raises various types for damaged files
    raise Refusal(f"{said}, which cannot be read ({first_line(error)}); {needed} ({', '.join(ENDINGS)}).") from None
  if shares.ndim != 1 or not shares.size:
    raise Refusal(f"{said}, which has the shape {shares.shape}; {needed}.")
  if not np.isfinite(shares).all():
    raise Refusal(f"{said}, in which class {int(np.argmin(np.isfinite(shares)))} is not finite; {needed}.")
  if shares.min() < 0:
    raise Refusal(f"{said}, in which class {int(np.argmin(shares))} has {shares.min():g}; no share may be negative.")
  if not shares.max() > 0:
    raise Refusal(f"{said}, in which all shares are 0; give at least one class a share.")
  return shares / shares.max()


def _parsed(given: str) -> np.ndarray:
  if not given.endswith(ENDINGS):
    return np.array([float(number) for number in given.split(",")])
  if given.endswith(".json"):
    found = files.read_json(given)
  elif given.endswith(".npy"):
    with files.opened(given, LARGEST_FILE) as file:
      found = np.load(file, allow_pickle=False)
  else:
    found = np.loadtxt(io.BytesIO(files.read_bytes(given, LARGEST_FILE)), ndmin=1)
  found = np.asarray(found)
  if not np.issubdtype(found.dtype, np.number) or np.issubdtype(found.dtype, np.complexfloating):
    raise ValueError(f"it holds {found.dtype}, not real numbers")
  return found.astype(np.float64)


def of_teacher(net: Any, variables: Tree, key: jax.Array, image_shape: tuple[int, int, int]) -> jax.Array:
  """The shares (C,) of a teacher's training images, estimated from the teacher alone.

  The teacher's mean prediction on images of normal noise, on which its batch norms take their statistics from the
  batch. Why: where cross-entropy is at its minimum, the gradient of the classifier's bias is 0, which says that the
  mean prediction over the training images equals the shares of their classes. With statistics of the batch, the output
  of every batch norm has the mean and deviation, channel by channel, that it has over the training images, whatever the
  images are; so noise passes for them as far as these moments go. No published estimator does this; those that are
  published need class-conditional samples, or a property of the classifier that is lost in balanced fine-tuning (norms
  of its rows: Kang et al., ICLR 2020, arXiv 1910.09217). The softmax of the biases, which suggests itself, was worse
  than uniform shares on long-tailed digits.

  The limits: it is an approximation, which moves shares towards uniform ones, of rare classes most; weight decay and
  label smoothing in the teacher's training do so, too. A teacher whose classifier was fine-tuned or adjusted to
  balanced classes gives about uniform shares, whatever its training images were. It needs batch norms.

  Args:
    net: the teacher's module, computing in float32.
    variables: its variables.
    key: of this use alone.
    image_shape: (H, W, K).
  """

  def of_batch(key: jax.Array) -> jax.Array:
    key_images, key_dropout = jax.random.split(key)
    images = jax.random.normal(key_images, (BATCH, *image_shape))
    output, _ = nets.forward(net, variables, images, train=True, key=key_dropout)
    return jnp.mean(jax.nn.softmax(output.logits.astype(jnp.float32)), axis=0)

  means = jax.jit(lambda keys: jax.lax.map(of_batch, keys))(jax.random.split(key, BATCHES))
  return jnp.mean(means, axis=0)


def start(kind: str, number: int, given: np.ndarray | None = None) -> Prior:
  """The prior of a kind (a choice of config.generator.prior) with which training begins, of NumPy's arrays.

  Shares of "teacher" are put in where the teacher is there; those of "need" begin alike.

  Args:
    number: L; labels are below it.
    given: (L,) the shares of "given".
  """
  shares = np.full(number, 1 / number) if given is None else given
  return Prior(shares, np.ones(number) if kind == "need" else None)


def followed(prior: Prior, need: Need, members: jax.Array, disagree: jax.Array) -> Prior:
  """A prior after a student's batch: classes are drawn more often on which student and teacher disagree more often.

  Per class, the share of samples to which the two give different classes, as a mean in which each sample counts for
  1 - momentum and the ones before it for the rest. Labels are drawn in proportion to it, but for the floor. A proposal
  of this package: IPAD (Liao et al., AAAI 2024) weights the generator's adversarial term by class for the same reason.

  Args:
    members: (N, L), how far each sample belongs to each class; rows may be 0 of samples that do not count.
    disagree: (N,) bool.
  """
  members = members.astype(prior.disagreement.dtype)
  count = jnp.sum(members, axis=0)
  share = jnp.sum(members * disagree[:, None], axis=0) / jnp.where(count > 0, count, 1)
  kept = need.momentum**count
  disagreement = kept * prior.disagreement + (1 - kept) * share
  needed = jnp.maximum(disagreement, LEAST_NEED)
  shares = need.floor / needed.shape[-1] + (1 - need.floor) * needed / jnp.sum(needed)
  return Prior(shares, disagreement)
