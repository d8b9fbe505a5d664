"""DeepInversion, adaptive: Dreaming to Distill (Yin et al., CVPR 2020; arXiv 1912.08795). Its generator is `pixels`."""

from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.algorithm import Method


def method(config, train_head=False, split=None, whole=None):
  g, s = config.loss.generator, config.loss.student
  temperature = config.loss.kd_temperature
  generator_terms = {
    "ce": (g.ce, lambda v: losses.cross_entropy(v.teacher.logits, v.labels)),
    "bn": (g.bn, lambda v: losses.bn_statistics(v.moments, v.running)),
    "variation": (g.variation, lambda v: losses.total_variation(v.images)),
    "norm": (g.norm, lambda v: losses.norm(v.images)),
    "adversarial": (g.adversarial, lambda v: -losses.jensen_shannon(v.teacher.logits, v.student.logits)),
  }
  student_terms = {
    "kd": (s.kd, lambda v: losses.kl(stop_gradient(v.teacher.logits), v.student.logits, temperature)),
  }
  return Method(generator_terms, student_terms, inverts=True)
