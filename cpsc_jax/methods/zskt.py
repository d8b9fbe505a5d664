"""ZSKT: Zero-shot Knowledge Transfer via Adversarial Belief Matching (Micaelli and Storkey, NeurIPS 2019)."""

import jax

from cpsc_jax import losses
from cpsc_jax.methods import terms
from cpsc_jax.methods.base import Parts, alternating
from cpsc_jax.setup import Method, Term


def method(parts: Parts) -> Method:
  attention = Term(lambda v: losses.attention(v.teacher.stages, v.student.stages))
  student_terms = {"kd": terms.kd(parts.config), "attention": attention}
  share = terms.class_share(parts.config)

  def divergence(t: jax.Array, s: jax.Array) -> jax.Array:
    return share(t) * losses.kl(t, s)

  return alternating(parts, {"adversarial": terms.divergence(divergence)}, student_terms)
