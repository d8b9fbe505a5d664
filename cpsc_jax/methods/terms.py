"""Terms that several methods share. Weights come from the config; here stands what is weighted."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.setup import Term
from cpsc_jax.state import View


def kd(config: ml_collections.ConfigDict) -> Term:
  """The student's divergence from the teacher, at config.loss.kd_temperature."""
  divergence = kl(config, config.loss.kd_temperature)

  def value(v: View) -> jax.Array:
    t, s = stop_gradient(v.teacher.logits), v.student.logits
    if config.loss.kd_standardise:
      t, s = losses.standardised(t), losses.standardised(s)
    return divergence(t, s)

  return Term(value)


def kl(config: ml_collections.ConfigDict, temperature: float = 1.0) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """KL(teacher || student) of logits (N, C), summed over classes or averaged, as config.loss.kl_classes says: (N,)."""

  def value(t: jax.Array, s: jax.Array) -> jax.Array:
    summed = losses.kl(t, s, temperature)
    return summed / t.shape[-1] if config.loss.kl_classes == "mean" else summed

  return value


def label_cross_entropy(label_smoothing: float = 0.0, double_softmax: bool = False) -> Term:
  """The student's prediction against the labels."""

  def value(v: View) -> jax.Array:
    options = {"double_softmax": double_softmax, "label_smoothing": label_smoothing}
    return losses.cross_entropy(v.student.logits, v.labels if v.targets is None else v.targets, **options)

  return Term(value)


def divergence(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Term:
  """A loss of both nets' logits (N, C), turned round: the generator looks for samples on which it is large."""
  return Term(lambda v: -loss(v.teacher.logits, v.student.logits))


def batch_norm(v: View) -> jax.Array:
  return losses.bn_statistics(v.teacher.statistics)


def teacher_cross_entropy(v: View) -> jax.Array:
  return losses.cross_entropy(v.teacher.logits, v.labels)


def feature_difference(v: View) -> jax.Array:
  return jnp.mean(jnp.square(stop_gradient(v.teacher.pooled) - v.student.pooled), axis=-1)


BN = Term(batch_norm, couples_batch=True)
CE = Term(teacher_cross_entropy)
FEATURES = Term(feature_difference)
ACTIVATION = Term(lambda v: losses.activation(v.teacher.pooled))
BALANCE = Term(lambda v: losses.balance(v.teacher.logits), couples_batch=True)
