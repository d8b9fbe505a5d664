"""ZSKT: Zero-shot Knowledge Transfer via Adversarial Belief Matching (Micaelli and Storkey, NeurIPS 2019)."""

from cpsc_jax import losses
from cpsc_jax.methods import terms
from cpsc_jax.methods.base import Parts, alternating
from cpsc_jax.setup import Method, Term


def method(parts: Parts) -> Method:
  attention = Term(lambda v: losses.attention(v.teacher.stages, v.student.stages))
  student_terms = {"kd": terms.kd(parts.config), "attention": attention}
  return alternating(parts, {"adversarial": terms.divergence(terms.kl(parts.config))}, student_terms)
