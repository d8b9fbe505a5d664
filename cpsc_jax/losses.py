"""Loss terms: arrays in, scalars out. No term knows a config; `stop_gradient` stands where the term is written.

Sources: CPSC-DFKD (Shao, Zhang, Wang, Pattern Recognition 143:109781, 2023) and its published code; supervised
contrast after Khosla et al., NeurIPS 2020, eq. 2; batch norm statistics after DeepInversion (Yin et al., CVPR 2020);
triplets after RGAL (Liang and Fu, IJCV 2024). Terms of other methods name theirs.
"""

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

BASE_TEMPERATURE = 0.07


def kl(teacher_logits_NC, student_logits_NC, temperature=1.0):
  """KL(teacher || student), summed over classes, mean over the batch: () from two (N, C).

  Both are softened by `temperature`, and the result is multiplied by its square (Hinton et al., 2015). The gradient
  flows into both arguments.
  """
  return jnp.mean(_kl_each(teacher_logits_NC, student_logits_NC, temperature))


def kl_where_agreed(teacher_logits_NC, student_logits_NC):
  """`kl` in which only samples count that both nets give the same class; divided by the whole batch: ().

  Pushed up, it looks for samples near the student's decision boundary without leaving the class (CMI, RGAL).
  """
  agreed = jnp.argmax(teacher_logits_NC, axis=-1) == jnp.argmax(student_logits_NC, axis=-1)
  return jnp.mean(jnp.where(agreed, _kl_each(teacher_logits_NC, student_logits_NC), 0.0))


def jensen_shannon(teacher_logits_NC, student_logits_NC, temperature=3.0):
  """Jensen-Shannon divergence of the softened predictions, mean over the batch: () (Yin et al., 2020, eq. 8)."""
  log_q = jax.nn.log_softmax(teacher_logits_NC / temperature)
  log_p = jax.nn.log_softmax(student_logits_NC / temperature)
  log_m = jnp.logaddexp(log_q, log_p) - jnp.log(2.0)
  to_middle = lambda log_x: jnp.sum(jnp.exp(log_x) * (log_x - log_m), axis=-1)
  return jnp.mean(0.5 * to_middle(log_q) + 0.5 * to_middle(log_p))


def l1(teacher_logits_NC, student_logits_NC):
  """Mean absolute difference over batch and classes: (); the gradient flows into both (DFAD, eq. 3)."""
  return jnp.mean(jnp.abs(teacher_logits_NC - student_logits_NC))


def imbalance(logits_NC):
  """Negative entropy of the mean prediction: (), at its least where the batch has all classes alike (DAFL, eq. 6)."""
  mean = jnp.mean(jax.nn.softmax(logits_NC), axis=0)
  return jnp.sum(jax.scipy.special.xlogy(mean, mean))


def inactivity(features_ND):
  """Negative mean absolute feature: (); real images excite a net's last layer more than noise does (DAFL, eq. 4)."""
  return -jnp.mean(jnp.abs(features_ND))


def total_variation(images_NHWK):
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


def norm(images_NHWK):
  """L2 norm of the whole batch: () (DeepInversion, eq. 2)."""
  return _l2(images_NHWK)


def attention(teacher_stages, student_stages):
  """How far the nets look at different places, summed over stages: () (Zagoruyko & Komodakis, ICLR 2017).

  A stage (N, H, W, K) becomes its mean square over channels, scaled to unit length over space; differences are squared
  and averaged over batch and space. Both nets must have stages of the same sizes; the teacher is detached.
  """
  where = lambda stage: _unit(jnp.mean(jnp.square(stage), axis=-1).reshape(stage.shape[0], -1))
  pairs = zip(teacher_stages, student_stages, strict=True)
  return sum(jnp.mean(jnp.square(stop_gradient(where(t)) - where(s))) for t, s in pairs)


def channel_distillation(teacher_stages, projected):
  """MSE between the teacher's spatially averaged stages and the student's, projected to their widths, summed: ().

  `projected` is one (N, K) per stage; the teacher is detached (RGAL, after Zhou et al., Channel Distillation, 2020).
  """
  pairs = zip(teacher_stages, projected, strict=True)
  return sum(jnp.mean(jnp.square(stop_gradient(jnp.mean(t, (1, 2))) - s)) for t, s in pairs)


def ikd_generator(teacher_logits_NC, student_logits_NC, form="mse"):
  """The generator's inverse distillation term, () from two (N, C): lower where the student is farther off.

  `form` "mse" is -MSE, "log" is -log MSE (CIFAR-10 in the published code); the mean is over batch and classes. The
  teacher is detached.
  """
  mse = jnp.mean(jnp.square(student_logits_NC - stop_gradient(teacher_logits_NC)))
  return -jnp.log(mse) if form == "log" else -mse


def ikd_student(teacher_logits_NC, student_logits_NC, form="mse"):
  """The student's logit regression, () from two (N, C); the teacher is detached.

  `form` "mse" is the mean over batch and classes; "log" is the logarithm of the Frobenius norm of the whole difference
  (CIFAR-10 in the published code).
  """
  difference = student_logits_NC - stop_gradient(teacher_logits_NC)
  if form == "log":
    return 0.5 * jnp.log(jnp.sum(jnp.square(difference)))
  return jnp.mean(jnp.square(difference))


def cross_entropy(logits_NC, labels_N, double_softmax=False, label_smoothing=0.0):
  """Cross-entropy against labels, mean over the batch: () from (N, C) and (N,).

  `double_softmax` hands softmax(logits) to the cross-entropy in place of the logits, as the published code does;
  `label_smoothing` mixes so much of the uniform distribution into the targets (Szegedy et al., CVPR 2016).
  """
  scores = jax.nn.softmax(logits_NC) if double_softmax else logits_NC
  if not label_smoothing:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(scores, labels_N))
  targets = optax.smooth_labels(jax.nn.one_hot(labels_N, scores.shape[-1], dtype=scores.dtype), label_smoothing)
  return jnp.mean(optax.softmax_cross_entropy(scores, targets))


def cross_entropy_until_confident(logits_NC, labels_N, confidence, double_softmax=False):
  """`cross_entropy` that leaves alone the samples whose label already has probability `confidence`: ().

  The other samples count as ever, divided by the whole batch; at 1 it is the plain cross-entropy. What is left alone
  may roam its class, where a plain cross-entropy goes on pulling every sample to the class's most typical one.
  """
  probabilities = jax.nn.softmax(logits_NC)
  scores = probabilities if double_softmax else logits_NC
  each = optax.softmax_cross_entropy_with_integer_labels(scores, labels_N)
  reached = jnp.take_along_axis(probabilities, labels_N[:, None], axis=1)[:, 0] >= confidence
  return jnp.mean(jnp.where(stop_gradient(reached), 0.0, each))


def supervised_contrast(views_NVD, labels_N=None, temperature=0.07):
  """Supervised contrastive loss over all views of all samples, () from (N, V, D) and (N,).

  Every other view with the same label is a positive (without labels: of the same sample); the anchor itself is in
  neither numerator nor denominator; the mean over positives is outside the logarithm (L_out of Khosla et al.), the
  mean over anchors last, times temperature / 0.07. The self-similarity is masked before the row maximum is taken, so
  that rows of any length stay finite.
  """
  n, v, d = views_NVD.shape
  rows = jnp.swapaxes(views_NVD, 0, 1).reshape(v * n, d)
  identity = jnp.arange(n) if labels_N is None else labels_N
  identity = jnp.tile(identity, v)
  self_pair = jnp.eye(v * n, dtype=bool)
  similarity = rows @ rows.T / temperature
  log_p = similarity - jax.nn.logsumexp(jnp.where(self_pair, -jnp.inf, similarity), axis=1, keepdims=True)
  positive = (identity[:, None] == identity[None, :]) & ~self_pair
  per_anchor = jnp.sum(jnp.where(positive, log_p, 0.0), axis=1) / jnp.sum(positive, axis=1)
  return -(temperature / BASE_TEMPERATURE) * jnp.mean(per_anchor)


def supervised_contrast_blockwise(views_NVD, labels_N=None, temperature=0.07, block=1024, split=None, whole=None):
  """`supervised_contrast` without the matrix of all similarities: the same value and gradient to round-off, ().

  The rows are split over the devices by the sharding `split`; every device holds all columns (`whole`) and works
  through them `block` at a time, once for the value and, as nothing of it is kept, once more for the gradient. With R =
  N V rows on P devices a device needs R D + R/P block numbers, against R/P R of the dense form.
  """
  n, v, d = views_NVD.shape
  count = n * v
  block = min(block, count)
  place = lambda x, sharding: x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
  identity = jnp.repeat(jnp.arange(n) if labels_N is None else labels_N, v)
  number = jnp.arange(count)

  def blocks(*columns):
    """Arrays (R, ...) as (R / block, block, ...), filled up with zeros."""
    fill = lambda x: jnp.pad(x, ((0, -count % block),) + ((0, 0),) * (x.ndim - 1))
    return tuple(fill(place(x, whole)).reshape(-1, block, *x.shape[1:]) for x in columns)

  def pairs(rows, columns, identity_c, number_c):
    """Similarities of all rows with a block of columns, which of them count, and which are positives: (R, block)."""
    other = (number[:, None] != number_c) & (jnp.arange(block) + number_c[0] < count)
    return rows @ columns.T / temperature, other, other & (identity[:, None] == identity_c)

  def statistics(rows):
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
    log_normaliser, total, positives = statistics(rows)
    value = -(temperature / BASE_TEMPERATURE) * jnp.mean(total / positives - log_normaliser)
    return value, (rows, log_normaliser, positives)

  def backward(saved, cotangent):
    rows, log_normaliser, positives = saved

    def add(gradient, column_block):
      columns, identity_c, number_c, log_normaliser_c, positives_c = column_block
      similarity, other, positive = pairs(rows, columns, identity_c, number_c)
      share = lambda log_z, p: jnp.exp(jnp.where(other, similarity - log_z, -jnp.inf)) - positive / jnp.maximum(p, 1)
      # A similarity counts where its row is the anchor and, as the matrix is symmetric, where its column is.
      each = share(log_normaliser[:, None], positives[:, None]) + share(log_normaliser_c, positives_c)
      return place(gradient + each @ columns, split), None

    columns = blocks(rows, identity, number, log_normaliser, positives)
    gradient, _ = jax.lax.scan(add, place(jnp.zeros_like(rows), split), columns)
    return (cotangent * gradient / (BASE_TEMPERATURE * count),)

  loss.defvjp(forward, backward)
  return loss(place(views_NVD.reshape(count, d), split))


def log_negative_weights(logits_NC, labels_N, focal):
  """Logarithms of the weights with which negatives are drawn, row by row for each anchor: (N, N), -inf for never.

  With D the distance between logits of unit length, of width d, a negative (another label) weighs
  D^(2 - d) (1 - D^2 / 4)^((3 - d) / 2), the inverse of how common that distance is on a sphere (Wu et al., Sampling
  Matters, ICCV 2017). Distance-weighted: D counts as at least 0.5, and negatives at 1.4 and farther are never drawn.
  Focal (RGAL): only those with 0.5 < D < 1. An anchor whose negatives are all out of range draws any of them alike; one
  that has none has a row of -inf. Nothing is differentiated.
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
  nobody = ~jnp.any(candidate, axis=1, keepdims=True)
  return jnp.where(candidate, log_weight, jnp.where(negative & nobody, 0.0, -jnp.inf))


def draw_negatives(key, log_weights_NN):
  """For each anchor i and each j, the number of one negative of i drawn by its weights: (N, N) int32.

  Rows without any negative give meaningless numbers.
  """
  most = jnp.max(log_weights_NN, axis=1, keepdims=True)
  weights = jnp.exp(log_weights_NN - jnp.where(jnp.isfinite(most), most, 0.0))
  upto = jnp.cumsum(weights, axis=1)
  point = jax.random.uniform(key, upto.shape, upto.dtype) * upto[:, -1:]
  drawn = jax.vmap(lambda row, at: jnp.searchsorted(row, at, side="right"))(upto, point)
  last = weights.shape[1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=1)
  return jnp.minimum(drawn, last[:, None])  # rounding may put a point on the very end


def triplets(stages, logits_NC, labels_N, key, margin=0.2, focal=False, swapped=False):
  """Triplet margin loss over all pairs of equal label, each with one negative drawn by the logits' distances: ().

  Distances are those of spatially averaged stages (N, H, W, K) at unit length; the loss max(0, d(anchor, positive) -
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
    rows = _unit(jnp.mean(stage, (1, 2)))
    # The small number keeps the root's gradient finite where two samples are the same.
    distance = jnp.sqrt(jnp.maximum(2 - 2 * rows @ rows.T, 0.0) + 1e-8)
    gap = distance - jnp.take_along_axis(distance, drawn, axis=1)
    return jnp.sum(jnp.where(pair, jax.nn.relu((-gap if swapped else gap) + margin), 0.0)) / count

  return sum(of_stage(stage) for stage in stages)


def bn_statistics(moments, running):
  """Distance between what the teacher's batch norm layers see and what they saw in training, ().

  Args:
    moments: {layer: {"mean": (K,), "var": (K,)}} of the current batch, variance biased.
    running: the same keys, the stored running statistics.

  Returns the sum over layers of ||mean - mean||_2 + ||var - var||_2; 0 for a teacher without batch norm.
  """
  total = 0.0
  for layer, seen in moments.items():
    total += _l2(seen["mean"] - running[layer]["mean"]) + _l2(seen["var"] - running[layer]["var"])
  return jnp.asarray(total)


def _kl_each(teacher_logits_NC, student_logits_NC, temperature=1.0):
  log_q = jax.nn.log_softmax(teacher_logits_NC / temperature)
  log_p = jax.nn.log_softmax(student_logits_NC / temperature)
  return temperature**2 * jnp.sum(jnp.exp(log_q) * (log_q - log_p), axis=-1)


def _unit(rows_ND):
  return rows_ND / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(rows_ND), axis=-1, keepdims=True), 1e-24))


def _l2(x):
  return jnp.sqrt(jnp.sum(jnp.square(x)))
