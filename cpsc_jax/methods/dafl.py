"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019; arXiv 1904.01186)."""

import jax

from cpsc_jax import losses
from cpsc_jax.methods import terms
from cpsc_jax.methods.base import Parts, alternating
from cpsc_jax.setup import Method, Term
from cpsc_jax.state import View


def method(parts: Parts) -> Method:
  generator_terms = {
    "one_hot": Term(one_hot),
    "activation": terms.ACTIVATION,
    "balance": terms.BALANCE,
  }
  return alternating(parts, generator_terms, {"kd": terms.kd(parts.config)})


def one_hot(v: View) -> jax.Array:
  """The teacher's prediction against its own most likely class."""
  return losses.cross_entropy(v.teacher.logits, v.teacher.logits.argmax(axis=-1))
