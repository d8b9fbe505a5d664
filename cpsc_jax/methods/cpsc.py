"""CPSC-DFKD: conditional pseudo-supervised contrast (Shao, Zhang, Wang; Pattern Recognition 143:109781, 2023)."""

import functools

import jax
import jax.numpy as jnp

from cpsc_jax import losses
from cpsc_jax.mesh import batch_sharding, replicated
from cpsc_jax.methods import terms
from cpsc_jax.methods.base import Parts, alternating
from cpsc_jax.setup import Method, Term
from cpsc_jax.state import View


def method(parts: Parts) -> Method:
  c = parts.config.loss
  supervised_contrast = losses.supervised_contrast
  if c.scl_form == "blockwise":
    placement = {"split": batch_sharding(parts.mesh), "whole": replicated(parts.mesh)}
    supervised_contrast = functools.partial(losses.supervised_contrast_blockwise, block=c.scl_block, **placement)

  def contrast(student_features: jax.Array, v: View) -> jax.Array:
    """Every sample is seen twice, by the student and by the teacher."""
    return supervised_contrast(jnp.stack([student_features, v.teacher.features], axis=1), v.labels, c.scl_temperature)

  def ikd(v: View) -> jax.Array:
    return losses.ikd(v.teacher.logits, v.student.logits, c.ikd_form)

  def l2(v: View) -> jax.Array:
    return losses.l2(v.teacher.logits, v.student.logits, c.ikd_form)

  def teacher_ce(v: View) -> jax.Array:
    return losses.cross_entropy_until_confident(v.teacher.logits, v.labels, c.confidence, c.double_softmax)

  couples = c.ikd_form == "log"  # the logarithm of a mean
  generator_terms = {
    "adversarial": terms.divergence(losses.kl),
    "ikd": Term(ikd, couples_batch=couples),
    "bn": terms.BN,
    "scl": Term(lambda v: contrast(v.student.features, v), couples_batch=True),
    "ce": Term(teacher_ce),
  }
  student_terms = {
    "kd": terms.kd(parts.config),
    "l2": Term(l2, couples_batch=couples),
    "ce": terms.label_cross_entropy(double_softmax=c.double_softmax),
  }
  if parts.trained_head:
    student_terms["head"] = Term(lambda v: contrast(v.student.head_features, v), couples_batch=True)
  return alternating(parts, generator_terms, student_terms)
