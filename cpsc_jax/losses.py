"""Loss terms: arrays in, per-sample losses out where a term is separable.

A term returns (N,) where every sample has a loss of its own: whoever calls takes the mean. It returns () where samples
act on each other, through a contrast, a norm or a mean over the whole batch. No term knows a config; `stop_gradient`
stands where the term is written. Stages are feature maps (N, H, W, K) or tokens (N, T, K), and H, W and T are called
space.

Sources: CPSC-DFKD (Shao, Zhang, Wang, Pattern Recognition 143:109781, 2023) and its published code; supervised
contrast after Khosla et al., NeurIPS 2020, eq. 2; batch norm statistics after DeepInversion (Yin et al., CVPR 2020);
triplets after RGAL (Liang and Fu, IJCV 2024). Terms of other methods name theirs.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jax.sharding import Sharding

from cpsc_jax.state import Statistics, at_least_float32

BASE_TEMPERATURE = 0.07


def kl(teacher_logits_NC: jax.Array, student_logits_NC: jax.Array, temperature: jax.Array | float = 1.0) -> jax.Array:
  """KL(teacher || student), summed over classes: (N,) from two (N, C).

  Both are softened by `temperature`, and the result is multiplied by its square (Hinton et al., 2015). The gradient
  flows into both arguments.
  """
  log_q = jax.nn.log_softmax(teacher_logits_NC / temperature)
  log_p = jax.nn.log_softmax(student_logits_NC / temperature)
  return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def standardised(logits_NC: jax.Array) -> jax.Array:
  """Each sample's logits with mean 0 and standard deviation 1 over the classes: (N, C) (Sun et al., CVPR 2024)."""
  centred = logits_NC - jnp.mean(logits_NC, axis=-1, keepdims=True)
  return centred / jnp.sqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + 1e-14)


def kl_where_agreed(teacher_logits_NC: jax.Array, student_logits_NC: jax.Array) -> jax.Array:
  """`kl` of the samples to which both nets give the same class, 0 for the others: (N,).

  Maximised, it finds samples near the student's decision boundary that stay in their class (CMI, RGAL).
  """
  agreed = jnp.argmax(teacher_logits_NC, axis=-1) == jnp.argmax(student_logits_NC, axis=-1)
  return jnp.where(agreed, kl(teacher_logits_NC, student_logits_NC), 0.0)


def jensen_shannon(
  teacher_logits_NC: jax.Array, student_logits_NC: jax.Array, temperature: jax.Array | float = 3.0
) -> jax.Array:
  """Jensen-Shannon divergence of the softened predictions: (N,) from two (N, C) (Yin et al., 2020, eq. 8)."""
  log_q = jax.nn.log_softmax(teacher_logits_NC / temperature)
  log_p = jax.nn.log_softmax(student_logits_NC / temperature)
  log_m = jnp.logaddexp(log_q, log_p) - jnp.log(2.0)
  q_to_m = jnp.sum(jnp.exp(log_q) * (log_q - log_m), axis=-1)
  p_to_m = jnp.sum(jnp.exp(log_p) * (log_p - log_m), axis=-1)
  return 0.5 * q_to_m + 0.5 * p_to_m


def mixture_divergence(
  teacher_logits_NC: jax.Array, student_logits_NC: jax.Array, temperature: jax.Array | float = 3.0
) -> jax.Array:
  """What the published code of DeepInversion computes for its Jensen-Shannon divergence: (N,) from two (N, C).

  Half the sum of KL(mixture || teacher) and KL(mixture || student), all three probabilities clamped to [0.01, 0.99], so
  that they no longer sum to 1.
  """

  def clamped(p: jax.Array) -> jax.Array:
    return jnp.clip(p, 0.01, 0.99)

  q, p = jax.nn.softmax(teacher_logits_NC / temperature), jax.nn.softmax(student_logits_NC / temperature)
  q, p, m = clamped(q), clamped(p), clamped((q + p) / 2)
  return jnp.sum(m * (jnp.log(m) - 0.5 * jnp.log(q) - 0.5 * jnp.log(p)), axis=-1)


def l1(teacher_logits_NC: jax.Array, student_logits_NC: jax.Array) -> jax.Array:
  """Mean absolute difference over classes: (N,) from two (N, C); the gradient flows into both (DFAD, eq. 3)."""
  return jnp.mean(jnp.abs(teacher_logits_NC - student_logits_NC), axis=-1)


def balance(logits_NC: jax.Array) -> jax.Array:
  """Negative entropy of the batch's mean prediction: (), smallest where all classes are equally common (DAFL eq. 6)."""
  mean = jnp.mean(jax.nn.softmax(logits_NC), axis=0)
  return jnp.sum(jax.scipy.special.xlogy(mean, mean))


def activation(features_ND: jax.Array) -> jax.Array:
  """Negative mean absolute feature: (N,); real images activate a net's last layer more than noise (DAFL, eq. 4)."""
  return -jnp.mean(jnp.abs(features_ND), axis=-1)


def total_variation(images_NHWK: jax.Array) -> jax.Array:
  """Differences between neighbours in four directions, the L2 norms of each over the whole batch, summed: ().

  Source: DeepInversion, eq. 2, in the form of its published code.
  """
  x = images_NHWK
  differences = (
    x[:, :, 1:] - x[:, :, :-1],
    x[:, 1:] - x[:, :-1],
    x[:, 1:, 1:] - x[:, :-1, :-1],
    x[:, 1:, :-1] - x[:, :-1, 1:],
  )
  return sum(_l2(d) for d in differences)


def norm(images_NHWK: jax.Array) -> jax.Array:
  """L2 norm of the whole batch: () (DeepInversion, eq. 2)."""
  return _l2(images_NHWK)


def attention(teacher_stages: Sequence[jax.Array], student_stages: Sequence[jax.Array]) -> jax.Array:
  """Distance between the nets' attention maps, summed over stages: (N,) (Zagoruyko & Komodakis, ICLR 2017).

  The attention map of a stage is its mean square over channels, scaled to unit length over space; differences are
  squared and averaged over space. Both nets must have stages of the same sizes; the teacher is detached.
  """

  def attention_map(stage):
    return _unit(jnp.mean(jnp.square(at_least_float32(stage)), axis=-1).reshape(stage.shape[0], -1))

  def of_stage(teacher_stage, student_stage):
    difference = stop_gradient(attention_map(teacher_stage)) - attention_map(student_stage)
    return jnp.mean(jnp.square(difference), axis=-1)

  return sum(of_stage(t, s) for t, s in zip(teacher_stages, student_stages, strict=True))


def channel_distillation(teacher_stages: Sequence[jax.Array], projected: Sequence[jax.Array]) -> jax.Array:
  """MSE between the teacher's stages averaged over space and the student's projections, summed over stages: (N,).

  `projected` is one (N, K) per stage; the mean is over channels; the teacher is detached (RGAL, after Zhou et al.,
  Channel Distillation, 2020).
  """

  def of_stage(teacher_stage, student_NK):
    return jnp.mean(jnp.square(stop_gradient(spatial_mean(teacher_stage)) - student_NK), axis=-1)

  return sum(of_stage(t, s) for t, s in zip(teacher_stages, projected, strict=True))


def ikd(teacher_logits_NC: jax.Array, student_logits_NC: jax.Array, form: str = "mse") -> jax.Array:
  """The generator's inverse distillation term, lower where the student is farther from the teacher: (N,) or ().

  `form` "mse" is -MSE over classes, (N,); "log" is -log of the MSE over batch and classes, () (CIFAR-10 in the
  published code). The teacher is detached.
  """
  squared = jnp.square(student_logits_NC - stop_gradient(teacher_logits_NC))
  return -jnp.log(jnp.mean(squared)) if form == "log" else -jnp.mean(squared, axis=-1)


def l2(teacher_logits_NC: jax.Array, student_logits_NC: jax.Array, form: str = "mse") -> jax.Array:
  """The student's logit regression: (N,) or () from two (N, C); the teacher is detached.

  `form` "mse" is the MSE over classes, (N,); "log" is the logarithm of the Frobenius norm of the whole batch's
  difference, () (CIFAR-10 in the published code).
  """
  squared = jnp.square(student_logits_NC - stop_gradient(teacher_logits_NC))
  return 0.5 * jnp.log(jnp.sum(squared)) if form == "log" else jnp.mean(squared, axis=-1)


def cross_entropy(
  logits_NC: jax.Array,
  labels_N: jax.Array,
  double_softmax: bool = False,
  label_smoothing: float = 0.0,
) -> jax.Array:
  """Cross-entropy with labels: (N,) from (N, C) and (N,), or (N, C) where labels are shares of classes.

  `double_softmax` passes softmax(logits) to the cross-entropy instead of the logits, as the published code does;
  `label_smoothing` is the share of the uniform distribution in the targets (Szegedy et al., CVPR 2016).
  """
  scores = jax.nn.softmax(logits_NC) if double_softmax else logits_NC
  if not label_smoothing and labels_N.ndim == 1:
    return optax.softmax_cross_entropy_with_integer_labels(scores, labels_N)
  shares = labels_N if labels_N.ndim == 2 else jax.nn.one_hot(labels_N, scores.shape[-1], dtype=scores.dtype)
  targets = optax.smooth_labels(shares, label_smoothing)
  return optax.softmax_cross_entropy(scores, targets)


def cross_entropy_until_confident(
  logits_NC: jax.Array, labels_N: jax.Array, confidence: jax.Array | float, double_softmax: bool = False
) -> jax.Array:
  """`cross_entropy`, 0 for samples whose label already has probability `confidence`: (N,) from (N, C) and (N,).

  With `confidence` 1 it is the plain cross-entropy. Confident samples may spread within their class, where a plain
  cross-entropy keeps pulling every sample towards the most typical one.
  """
  probabilities = jax.nn.softmax(logits_NC)
  per_sample = cross_entropy(logits_NC, labels_N, double_softmax)
  confident = jnp.take_along_axis(probabilities, labels_N[:, None], axis=1)[:, 0] >= confidence
  return jnp.where(stop_gradient(confident), 0.0, per_sample)


def supervised_contrast(
  views_NVD: jax.Array, labels_N: jax.Array | None = None, temperature: jax.Array | float = BASE_TEMPERATURE
) -> jax.Array:
  """Supervised contrastive loss over all views of all samples: () from (N, V, D) and (N,).

  Every other view with the same label is a positive (without labels: of the same sample); the anchor itself is in
  neither numerator nor denominator; the mean over positives is outside the logarithm (L_out of Khosla et al.), the
  mean over anchors last, times temperature / 0.07. The self-similarity is masked before the row maximum is taken, so
  that rows of any length stay finite.
  """
  n, v, d = views_NVD.shape
  rows = views_NVD.reshape(n * v, d)  # in this order the split of the batch over devices is that of the rows too
  identity = jnp.repeat(jnp.arange(n) if labels_N is None else labels_N, v)
  self_pair = jnp.eye(v * n, dtype=bool)
  similarity = rows @ rows.T / temperature
  log_p = similarity - jax.nn.logsumexp(jnp.where(self_pair, -jnp.inf, similarity), axis=1, keepdims=True)
  positive = (identity[:, None] == identity[None, :]) & ~self_pair
  per_anchor = jnp.sum(jnp.where(positive, log_p, 0.0), axis=1) / jnp.sum(positive, axis=1)
  return -(temperature / BASE_TEMPERATURE) * jnp.mean(per_anchor)


def supervised_contrast_blockwise(
  views_NVD: jax.Array,
  labels_N: jax.Array | None = None,
  temperature: float = BASE_TEMPERATURE,
  block: int = 1024,
  split: Sharding | None = None,
  whole: Sharding | None = None,
) -> jax.Array:
  """`supervised_contrast` without the matrix of all similarities: the same value and gradient to round-off, ().

  The rows are split over the devices by the sharding `split`; every device holds all columns (`whole`) and works
  through them `block` at a time, once for the value and, as nothing of it is kept, once more for the gradient. With
  R = N V rows on P devices a device needs R D + R/P block numbers, against R/P R of the dense form.
  """
  n, v, d = views_NVD.shape
  count = n * v
  block = min(block, count)
  identity = jnp.repeat(jnp.arange(n) if labels_N is None else labels_N, v)
  number = jnp.arange(count)

  def place(tree, sharding):
    return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)

  def blocks(*columns):
    """Arrays (R, ...) as (R / block, block, ...), padded with zeros."""
    padding = -count % block
    padded = (jnp.pad(place(x, whole), ((0, padding),) + ((0, 0),) * (x.ndim - 1)) for x in columns)
    return tuple(x.reshape(-1, block, *x.shape[1:]) for x in padded)

  def pairs(rows, columns, identity_c, number_c):
    """Similarities of all rows with a block of columns, which of them count, and which are positives: (R, block)."""
    other = (number[:, None] != number_c) & (jnp.arange(block) + number_c[0] < count)
    return rows @ columns.T / temperature, other, other & (identity[:, None] == identity_c)

  def sums(rows):
    """Per row: logarithm of the normaliser, sum of the positives' similarities, number of positives; each (R,)."""

    def add(carry, column_block):
      largest, normaliser, total, positives = carry
      similarity, other, positive = pairs(rows, *column_block)
      now = jnp.maximum(largest, jnp.max(similarity, axis=1, where=other, initial=-jnp.inf))
      shares = jnp.exp(jnp.where(other, similarity - now[:, None], -jnp.inf))
      normaliser = normaliser * jnp.exp(largest - now) + jnp.sum(shares, axis=1)
      total += jnp.sum(jnp.where(positive, similarity, 0), axis=1)
      positives += jnp.sum(positive, axis=1, dtype=rows.dtype)
      return place((now, normaliser, total, positives), split), None

    zeros = jnp.zeros(count, rows.dtype)
    start = place((jnp.full(count, jnp.finfo(rows.dtype).min), zeros, zeros, zeros), split)
    (largest, normaliser, total, positives), _ = jax.lax.scan(add, start, blocks(rows, identity, number))
    return largest + jnp.log(normaliser), total, positives

  @jax.custom_vjp
  def loss(rows):
    return forward(rows)[0]

  def forward(rows):
    log_normaliser, total, positives = sums(rows)
    value = -(temperature / BASE_TEMPERATURE) * jnp.mean(total / positives - log_normaliser)
    return value, (rows, log_normaliser, positives)

  def backward(saved, cotangent):
    rows, log_normaliser, positives = saved

    def add(gradient, column_block):
      columns, identity_c, number_c, log_normaliser_c, positives_c = column_block
      similarity, other, positive = pairs(rows, columns, identity_c, number_c)

      def of_anchor(log_z, number_of_positives):
        share = jnp.exp(jnp.where(other, similarity - log_z, -jnp.inf))
        return share - positive / jnp.maximum(number_of_positives, 1)

      # A similarity counts where its row is the anchor and, as the matrix is symmetric, where its column is.
      each = of_anchor(log_normaliser[:, None], positives[:, None]) + of_anchor(log_normaliser_c, positives_c)
      return place(gradient + each @ columns, split), None

    columns = blocks(rows, identity, number, log_normaliser, positives)
    gradient, _ = jax.lax.scan(add, place(jnp.zeros_like(rows), split), columns)
    return (cotangent * gradient / (BASE_TEMPERATURE * count),)

  loss.defvjp(forward, backward)
  return loss(place(views_NVD.reshape(count, d), split))


def log_negative_weights(logits_NC: jax.Array, labels_N: jax.Array, focal: bool) -> jax.Array:
  """Logarithms of the weights with which negatives are drawn, one row per anchor: (N, N), -inf for never.

  With D the distance between logits of unit length and of width d, a negative (another label) has the weight
  D^(2 - d) (1 - D^2 / 4)^((3 - d) / 2), the inverse of how common that distance is on a sphere (Wu et al., Sampling
  Matters, ICCV 2017). Distance-weighted: D is clipped to at least 0.5, and negatives at 1.4 and farther are never
  drawn. Focal (RGAL): only those with 0.5 < D < 1. An anchor whose negatives are all out of range draws any of them
  with equal weights; one that has none has a row of -inf. Nothing is differentiated.
  """
  unit_logits = _unit(stop_gradient(logits_NC))
  d = logits_NC.shape[-1]
  distance = jnp.sqrt(jnp.maximum(2 - 2 * unit_logits @ unit_logits.T, 0.0))
  negative = labels_N[:, None] != labels_N[None, :]
  if focal:
    candidate = negative & (distance > 0.5) & (distance < 1.0)
  else:
    distance = jnp.maximum(distance, 0.5)
    candidate = negative & (distance < 1.4)
  safe = jnp.where(candidate, distance, 1.0)
  log_weight = (2.0 - d) * jnp.log(safe) - (d - 3) / 2 * jnp.log(1 - jnp.square(safe) / 4)
  no_candidate = ~jnp.any(candidate, axis=1, keepdims=True)
  return jnp.where(candidate, log_weight, jnp.where(negative & no_candidate, 0.0, -jnp.inf))


def draw_negatives(key: jax.Array, log_weights_NN: jax.Array) -> jax.Array:
  """For each anchor i and each j, the index of one negative of i drawn by its weights: (N, N) int32.

  Rows without any negative give meaningless indices.
  """
  largest = jnp.max(log_weights_NN, axis=1, keepdims=True)
  weights = jnp.exp(log_weights_NN - jnp.where(jnp.isfinite(largest), largest, 0.0))
  cumulative = jnp.cumsum(weights, axis=1)
  point = jax.random.uniform(key, cumulative.shape, cumulative.dtype) * cumulative[:, -1:]
  drawn = jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right"))(cumulative, point)
  last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
  return jnp.minimum(drawn, last[:, None])  # rounding may put a point on the very end


def triplets(
  stages: Sequence[jax.Array],
  logits_NC: jax.Array,
  labels_N: jax.Array,
  key: jax.Array,
  margin: jax.Array | float = 0.2,
  focal: bool = False,
  swapped: bool = False,
) -> jax.Array:
  """Triplet margin loss over all pairs of equal label, each with one negative drawn by the logits' distances: ().

  Distances are those of stages averaged over space, at unit length; the loss max(0, d(anchor, positive) -
  d(anchor, negative) + margin) is averaged over pairs and summed over stages. `swapped` exchanges positive and
  negative: equal labels are pushed apart, different ones pulled together. Pairs without any negative do not count; 0
  where there are no pairs (RGAL, Liang and Fu, IJCV 2024).
  """
  log_weights = log_negative_weights(logits_NC, labels_N, focal)
  drawn = draw_negatives(key, log_weights)
  pair = (labels_N[:, None] == labels_N[None, :]) & ~jnp.eye(labels_N.shape[0], dtype=bool)
  pair &= jnp.any(log_weights > -jnp.inf, axis=1, keepdims=True)
  count = jnp.maximum(jnp.sum(pair), 1)

  def of_stage(stage):
    rows = _unit(spatial_mean(stage))
    # The small number keeps the root's gradient finite where two samples are the same.
    distance = jnp.sqrt(jnp.maximum(2 - 2 * rows @ rows.T, 0.0) + 1e-8)
    gap = distance - jnp.take_along_axis(distance, drawn, axis=1)
    return jnp.sum(jnp.where(pair, jax.nn.relu((-gap if swapped else gap) + margin), 0.0)) / count

  return sum(of_stage(stage) for stage in stages)


def bn_statistics(statistics: Statistics | None) -> jax.Array:
  """Distance between what the teacher's batch norm layers see of a batch and what they stored in training: ().

  The sum over layers of ||mean - mean||_2 + ||var - var||_2; 0 without statistics.
  """
  total = 0.0
  for layer, seen in (statistics.seen if statistics else {}).items():
    stored = statistics.stored[layer]
    total += _l2(seen["mean"] - stored["mean"]) + _l2(seen["var"] - stored["var"])
  return jnp.asarray(total)


def spatial_mean(stage: jax.Array) -> jax.Array:
  """Maps (N, H, W, K) or tokens (N, T, K) -> (N, K)."""
  return jnp.mean(at_least_float32(stage), axis=tuple(range(1, stage.ndim - 1)))


def _unit(rows_ND):
  return rows_ND / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(rows_ND), axis=-1, keepdims=True), 1e-24))


def _l2(x):
  """L2 norm over everything, whose gradient at 0 is 0, as PyTorch's."""
  squared = jnp.sum(jnp.square(x))
  positive = squared > 0
  return jnp.where(positive, jnp.sqrt(jnp.where(positive, squared, 1.0)), 0.0)


def confident(logits_NC: jax.Array, temperature: float) -> jax.Array:
  """Cross-entropy of logits at a temperature against their own most likely class: (N,) (ABD)."""
  return cross_entropy(logits_NC / temperature, jnp.argmax(logits_NC, axis=-1))


def even(logits_NC: jax.Array) -> jax.Array:
  """1 less the entropy of the batch's mean prediction, as a share of the largest possible: ().

  It is 0 where all classes are equally common (ABD: Smith et al., ICCV 2021, arXiv 2106.09701).
  """
  return 1 + balance(logits_NC) / math.log(max(logits_NC.shape[-1], 2))


def moments_divergence(statistics: Statistics | None) -> jax.Array:
  """KL divergence of normals with the moments that the teacher's batch norms see from those that they stored: ().

  Averaged over channels and over layers; 0 without statistics (ABD, in its published code: batch b, stored r,
  log(sd_b / sd_r) - (1 - (var_r + (mean_r - mean_b)^2) / var_b) / 2).
  """
  layers = []
  for layer, seen in (statistics.seen if statistics else {}).items():
    stored = statistics.stored[layer]
    var, was = seen["var"] + 1e-8, stored["var"] + 1e-8
    ratio = (was + jnp.square(stored["mean"] - seen["mean"])) / var
    layers.append(jnp.mean(0.5 * (jnp.log(var) - jnp.log(was)) - 0.5 * (1 - ratio)))
  return jnp.mean(jnp.stack(layers)) if layers else jnp.zeros(())


def roughness(images_NHWK: jax.Array) -> jax.Array:
  """Mean squared difference of images from themselves under a 5x5 Gaussian blur of deviation 1: (N,) (ABD).

  Edges are mirrored.
  """
  x = at_least_float32(images_NHWK)
  weights = jnp.exp(-0.5 * jnp.square(jnp.arange(-2.0, 3.0)))
  weights = (weights / weights.sum()).astype(x.dtype)
  blurred = x
  for axis in (1, 2):
    width = [(0, 0)] * 4
    width[axis] = (2, 2)
    padded, length = jnp.pad(blurred, width, mode="reflect"), x.shape[axis]
    blurred = sum(w * jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i, w in enumerate(weights))
  return jnp.mean(jnp.square(x - blurred), axis=(1, 2, 3))


def angles(features_ND: jax.Array) -> jax.Array:
  """The cosine of the angle at j between i and k, for all triples of rows: (N, N, N) at [j, i, k].

  Where two of the three are the same row it is 0 (RKD: Park et al., CVPR 2019, arXiv 1904.05068, eq. 8).
  """
  x = at_least_float32(features_ND)
  apart = x[None] - x[:, None]
  squared = jnp.sum(jnp.square(apart), axis=-1, keepdims=True)
  # The root's gradient at 0 is not finite, and a row has distance 0 from itself.
  unit = jnp.where(squared > 0, apart / jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
  return jnp.einsum("jid,jkd->jik", unit, unit)
