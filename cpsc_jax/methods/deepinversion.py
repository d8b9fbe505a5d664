"""DeepInversion, adaptive: Dreaming to Distill (Yin et al., CVPR 2020; arXiv 1912.08795). Its generator is `pixels`."""

from cpsc_jax import losses
from cpsc_jax.methods import inversion, terms
from cpsc_jax.methods.base import Parts
from cpsc_jax.setup import Method, Term

INVERTS = True
check = inversion.check


def method(parts: Parts) -> Method:
  generator_terms = {
    "ce": terms.CE,
    "bn": terms.BN,
    "variation": Term(lambda v: losses.total_variation(v.images), couples_batch=True),
    "norm": Term(lambda v: losses.norm(v.images), couples_batch=True),
    "adversarial": terms.divergence(losses.jensen_shannon),
  }
  return inversion.inverting(parts, generator_terms, {"kd": terms.kd(parts.config)})
