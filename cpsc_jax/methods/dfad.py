"""DFAD: Data-Free Adversarial Distillation (Fang et al., 2019; arXiv 1912.11006)."""

import jax
from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.methods import terms
from cpsc_jax.methods.base import Parts, alternating
from cpsc_jax.setup import Method, Term
from cpsc_jax.state import View


def method(parts: Parts) -> Method:
  return alternating(parts, {"adversarial": terms.divergence(losses.l1)}, {"l1": Term(l1)})


def l1(v: View) -> jax.Array:
  return losses.l1(stop_gradient(v.teacher.logits), v.student.logits)
