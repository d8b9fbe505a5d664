"""What a run is made of, seen from outside: named functions from arrays to arrays, for jit on any device.

Samples come as (C, n, ...), n of each class that was asked for, with `exist` (C, n): the pool of a method may hold
fewer than n of a class. Distances are between the teacher's features. Where nothing can be said, such as of a class
without a sample, the result is NaN.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax.state import Statistics

BINS = 15  # of a reliability curve, as in Guo et al.
NEIGHBOURS = 5  # k of Naeem et al.
LARGEST_SET = 1000  # samples that are compared with each other
MOST_NAMED = 5  # classes in one warning
DROWNS = 5.0  # times the gradient of `ce`: another term's that keeps labels from being learned


# Predictions.


def confusion(labels: jax.Array, predicted: jax.Array, num_classes: int) -> jax.Array:
  """How many of each class (rows) were given each class (columns): (C, C) int32 from two (N,)."""
  cells = labels * num_classes + predicted
  return jnp.bincount(cells, length=num_classes**2).reshape(num_classes, num_classes).astype(jnp.int32)


def share_per_class(labels: jax.Array, hits: jax.Array, num_classes: int) -> jax.Array:
  """The share of each class's samples that are hits: (C,) from (N,) and (N,) bool."""
  of_class = jax.nn.one_hot(labels, num_classes)
  return _ratio(jnp.sum(of_class * hits[:, None], axis=0), jnp.sum(of_class, axis=0))


def reliability(confidence: jax.Array, correct: jax.Array, bins: int = BINS) -> dict[str, jax.Array]:
  """A reliability curve (Guo et al., ICML 2017, section 2): {"count", "confidence", "accuracy"}, each (bins,).

  Bin b holds the samples with confidence (N,) in (b / bins, (b + 1) / bins]; mean confidence and the share of `correct`
  (N,) bool in each.
  """
  place = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
  count = jnp.bincount(place, length=bins)
  sums = {
    "confidence": jnp.bincount(place, weights=confidence, length=bins),
    "accuracy": jnp.bincount(place, weights=correct.astype(confidence.dtype), length=bins),
  }
  return {"count": count.astype(jnp.int32), **{name: _ratio(total, count) for name, total in sums.items()}}


def calibration_error(curve: Mapping[str, jax.Array]) -> jax.Array:
  """Expected calibration error of a `reliability` curve: () (Guo et al., ICML 2017, eq. 3)."""
  gap = jnp.where(curve["count"] > 0, jnp.abs(curve["accuracy"] - curve["confidence"]), 0.0)
  return jnp.sum(curve["count"] * gap) / jnp.sum(curve["count"])


# Samples.


def fidelity(predicted: jax.Array, exist: jax.Array) -> jax.Array:
  """The share of each class's samples to which the teacher gives that class: (C,) from two (C, n)."""
  asked = jnp.arange(predicted.shape[0])[:, None]
  return _ratio(jnp.sum(exist & (predicted == asked), axis=1), jnp.sum(exist, axis=1))


def masked_mean(values: jax.Array, exist: jax.Array, axis: int | None = None) -> jax.Array:
  """The mean of those values that exist, over everything or along one axis."""
  return _ratio(jnp.sum(jnp.where(exist, values, 0), axis=axis), jnp.sum(exist, axis=axis))


def class_shares(predicted: jax.Array, exist: jax.Array, num_classes: int) -> jax.Array:
  """The share of all samples to which the teacher gives each class: (num_classes,)."""
  count = jnp.sum(jnp.where(exist[..., None], jax.nn.one_hot(predicted, num_classes), 0), axis=(0, 1))
  return _ratio(count, jnp.sum(exist))


def balance(shares: jax.Array) -> jax.Array:
  """The entropy of shares (C,) as a fraction of the largest one, log C: 1 where all classes are equally common, ()."""
  return _entropy(shares) / np.log(max(shares.shape[-1], 2))


def class_distances(features: jax.Array, exist: jax.Array) -> jax.Array:
  """Mean distance between a sample of one class and one of another, on the diagonal of the same class: (C, C).

  Of features (C, n, D). On the diagonal no sample is compared with itself.
  """
  number, size, width = features.shape
  same = jnp.eye(size, dtype=bool)[:, None, :]
  everything, classes = features.reshape(-1, width), jnp.arange(number)

  def of_class(a: jax.Array) -> jax.Array:
    apart = distances(features[a], everything).reshape(size, number, size)
    counted = exist[a][:, None, None] & exist & ~(same & (classes == a)[:, None])
    return _ratio(jnp.sum(jnp.where(counted, apart, 0), axis=(0, 2)), jnp.sum(counted, axis=(0, 2)))

  return jax.lax.map(of_class, classes)


def within_and_between(distance: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of `class_distances` (C, C): their means over classes and over pairs of classes, two ()."""
  different = ~jnp.eye(distance.shape[0], dtype=bool)
  known = jnp.isfinite(distance)
  return masked_mean(distance, known & ~different), masked_mean(distance, known & different)


def vendi_score(features: jax.Array, exist: jax.Array) -> jax.Array:
  """How many different samples there effectively are among (n, D): 1 for one image, up to n, ().

  exp of the entropy of the eigenvalues of K / n, where K holds the cosines between features (Friedman & Dieng, TMLR
  2023, arXiv 2210.02410, definition 3.1).
  """
  size = jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(features), axis=-1, keepdims=True), 1e-24))
  values = _spectrum(jnp.where(exist[:, None], features / size, 0.0))
  return jnp.where(jnp.any(exist), jnp.exp(_entropy(_ratio(values, jnp.sum(values)))), jnp.nan)


def effective_rank(features: jax.Array, exist: jax.Array) -> jax.Array:
  """How many directions the features (n, D) effectively fill around their mean: 1 to D, ().

  exp of the entropy of the singular values, scaled to sum 1 (Roy & Vetterli, EUSIPCO 2007, eq. 5); 1 where all samples
  are equal.
  """
  kept = jnp.where(exist[:, None], features, 0.0)
  centred = jnp.where(exist[:, None], features - _ratio(jnp.sum(kept, axis=0), jnp.sum(exist)), 0.0)
  values = _spectrum(centred)
  eps = jnp.finfo(features.dtype).eps  # what rounding leaves of a 0: of the eigenvalues, and of the means taken off
  noise = eps * max(features.shape) ** 0.5 * jnp.max(values) + (8 * eps) ** 2 * jnp.sum(jnp.square(kept))
  singular = jnp.sqrt(jnp.where(values > noise, values, 0.0))
  total = jnp.sum(singular)
  rank = jnp.exp(_entropy(jnp.where(total > 0, singular / jnp.where(total > 0, total, 1.0), 0.0)))
  return jnp.where(jnp.any(exist), rank, jnp.nan)


# Samples beside real images.


def frechet_distance(real: jax.Array, drawn: jax.Array, exist: jax.Array) -> jax.Array:
  """Squared Frechet distance of normal distributions fitted to two sets of features, (m, D) and (n, D): ().

  |mean - mean|^2 + tr(S + S' - 2 (S S')^(1/2)) (Heusel et al., NeurIPS 2017, eq. 6), here in the teacher's features. It
  depends on how many samples there are, so that only figures of equally many compare.
  """
  mean, root = _normal(real, jnp.ones(real.shape[0], bool))
  other_mean, other_root = _normal(drawn, exist)
  if real.shape[1] <= min(real.shape[0], drawn.shape[0]):
    half = _square_root(_product(root.T, root))
    inner = _product(_product(half, _product(other_root.T, other_root)), half)
    common = jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(inner), 0.0)))
  else:  # the same trace from the smaller matrix
    common = jnp.sum(jnp.linalg.svd(_product(root, other_root.T), compute_uv=False))
  traces = jnp.sum(jnp.square(root)) + jnp.sum(jnp.square(other_root))
  return jnp.sum(jnp.square(mean - other_mean)) + traces - 2 * common


def manifold_overlap(
  real: jax.Array, drawn: jax.Array, exist: jax.Array, neighbours: int = NEIGHBOURS
) -> dict[str, jax.Array]:
  """{"precision", "recall", "density", "coverage"} of drawn features (n, D) against real ones (m, D), each ().

  Every sample has a ball that reaches to its k-th neighbour in its own set. Precision: the share of drawn samples in a
  real one's ball; recall: of real samples in a drawn one's ball (Kynkaanniemi et al., NeurIPS 2019, eq. 1 and 2).
  Density: how many real balls a drawn sample lies in, over k, 1 for real images; coverage: the share of real balls with
  a drawn sample in them (Naeem et al., ICML 2020, eq. 3 and 4).
  """
  everyone = jnp.ones(real.shape[0], bool)
  real_radius = _radius(real, everyone, neighbours)
  drawn_radius = _radius(drawn, exist, neighbours)
  apart = jnp.where(exist, distances(real, drawn), jnp.inf)  # (m, n)
  in_real = apart < real_radius[:, None]
  in_drawn = exist & (apart < drawn_radius)
  return {
    "precision": masked_mean(jnp.any(in_real, axis=0), exist),
    "recall": jnp.mean(jnp.any(in_drawn, axis=1)),
    "density": masked_mean(jnp.sum(in_real, axis=0) / neighbours, exist),
    "coverage": jnp.mean(jnp.any(in_real, axis=1)),
  }


def distances(a: jax.Array, b: jax.Array) -> jax.Array:
  """Euclidean distances between the rows of (m, D) and of (n, D): (m, n)."""
  centre = jnp.mean(a, axis=0)  # so that little is lost in the difference of squares
  a, b = a - centre, b - centre
  squares = jnp.sum(jnp.square(a), axis=1)[:, None] + jnp.sum(jnp.square(b), axis=1) - 2 * _product(a, b.T)
  return jnp.sqrt(jnp.maximum(squares, 0.0))


# Batch norm and terms.


def norm_distances(statistics: Statistics) -> dict[str, jax.Array]:
  """Per layer, what the term `bn` sums: |mean - mean|_2 + |var - var|_2 of a batch and of the training data.

  {"000 PATH": ()}: layers are numbered, so that a pytree keeps their order.
  """
  found = {}
  for number, (layer, seen) in enumerate(statistics.seen.items()):
    path = "/".join(layer) if isinstance(layer, tuple) else str(layer)
    gaps = [jnp.linalg.norm(seen[moment] - statistics.stored[layer][moment]) for moment in ("mean", "var")]
    found[f"{number:03d} {path}"] = sum(gaps)
  return found


def cosines(products: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(norms (T,), cosines (T, T)) of T vectors, from all their scalar products (T, T)."""
  norms = jnp.sqrt(jnp.diagonal(products))
  return norms, _ratio(products, norms[:, None] * norms)


# In words.


def warnings(found: Mapping[str, np.ndarray], num_classes: int) -> list[str]:
  """What is wrong with the generator, in plain words, from what a diagnosis found; the names are those of its arrays.

  Of `cpsc_jax.examine`; what was not found is passed over.
  """
  said, chance = [], 1 / num_classes
  scalar = {name: float(value) for name, value in found.items() if np.ndim(value) == 0 and np.isfinite(value)}
  if "fidelity_per_class" in found:
    per_class = np.asarray(found["fidelity_per_class"])
    mean = float(np.nanmean(per_class)) if np.isfinite(per_class).any() else 1.0
    missed = [label for label, share in enumerate(per_class) if share <= chance]
    if mean <= 1.5 * chance:
      said.append(
        f"The generator ignores its label: the teacher finds the class that was asked for in {mean:.1%} of the samples,"
        f" and chance is {chance:.1%}.{_drowned(found)}"
      )
    elif missed:
      said.append(
        f"The generator does not draw {_classes(missed)}: the teacher finds the class that was asked for no more often"
        " than by chance."
      )
  if "class_shares" in found and scalar.get("class_balance", 1.0) < 0.8:
    shares = np.asarray(found["class_shares"])
    said.append(
      f"The samples are of few classes: {shares.max():.0%} of them are class {shares.argmax()} to the teacher."
    )
  if scalar.get("vendi_score", np.inf) < 1.01:
    said.append("The generator draws one image: to the teacher, all samples are alike.")
  elif scalar.get("distance_within", np.inf) < 0.02 * scalar.get("distance_between", 0.0):
    said.append("The generator draws one image per class: samples of a class hardly differ.")
  if scalar.get("student_mistakes", 0.5) < 0.005:
    said.append("The samples are not adversarial: the student agrees with the teacher on nearly all of them.")
  elif scalar.get("student_mistakes", 0.5) > 0.9:
    said.append("The student agrees with the teacher on hardly any sample: it does not follow the generator.")
  return said


def _drowned(found: Mapping[str, np.ndarray]) -> str:
  """Which term keeps `ce` from teaching labels, if one's gradient at the image is far larger; else nothing."""
  if "term_weighted_gradient" not in found:
    return ""
  norms = dict(zip(map(str, found["terms"]), map(float, found["term_weighted_gradient"]), strict=True))
  of_labels = norms.pop("ce", 0.0)
  largest = max(norms, key=norms.get, default="")
  if not (largest and of_labels > 0 and norms[largest] > DROWNS * of_labels):
    return ""
  return (
    f" The gradient of the term {largest} at the image is {norms[largest] / of_labels:.0f} times that of ce: for"
    " samples of the class asked for, which a student may not need, lower"
    f" loss.generator.{largest} or raise loss.generator.ce."
  )


def _classes(labels: Sequence[int]) -> str:
  named = ", ".join(map(str, labels[:MOST_NAMED]))
  more = f" and {len(labels) - MOST_NAMED} more" if len(labels) > MOST_NAMED else ""
  return f"class{'es' * (len(labels) > 1)} {named}{more}"


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
  """a / b, NaN where b is 0."""
  return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), jnp.nan)


def _entropy(shares: jax.Array) -> jax.Array:
  return -jnp.sum(jax.scipy.special.xlogy(shares, shares), axis=-1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  """a @ b, in full precision on accelerators too."""
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _spectrum(rows: jax.Array) -> jax.Array:
  """The eigenvalues of rows @ rows.T that are not 0, from the smaller of the two products."""
  smaller = _product(rows.T, rows) if rows.shape[1] < rows.shape[0] else _product(rows, rows.T)
  return jnp.maximum(jnp.linalg.eigvalsh(smaller), 0.0)


def _normal(features: jax.Array, exist: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(mean (D,), rows (n, D) whose products rows.T @ rows are the covariance)."""
  count = jnp.sum(exist)
  mean = _ratio(jnp.sum(jnp.where(exist[:, None], features, 0.0), axis=0), count)
  centred = jnp.where(exist[:, None], features - mean, 0.0)
  return mean, centred / jnp.sqrt(jnp.maximum(count - 1, 1))


def _square_root(matrix: jax.Array) -> jax.Array:
  values, vectors = jnp.linalg.eigh(matrix)
  return _product(vectors * jnp.sqrt(jnp.maximum(values, 0.0)), vectors.T)


def _radius(features: jax.Array, exist: jax.Array, neighbours: int) -> jax.Array:
  """The distance of each sample from its k-th neighbour among those that exist, (n,)."""
  apart = jnp.where(exist & ~jnp.eye(features.shape[0], dtype=bool), distances(features, features), jnp.inf)
  return -jax.lax.top_k(-apart, min(neighbours, features.shape[0] - 1))[0][:, -1]
