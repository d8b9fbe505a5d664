"""DFAD: Data-Free Adversarial Distillation (Fang et al., 2019; arXiv 1912.11006)."""

from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.algorithm import Method


def method(config, train_head=False, split=None, whole=None):
  g, s = config.loss.generator, config.loss.student
  generator_terms = {"adversarial": (g.adversarial, lambda v: -losses.l1(v.teacher.logits, v.student.logits))}
  student_terms = {"l1": (s.l1, lambda v: losses.l1(stop_gradient(v.teacher.logits), v.student.logits))}
  return Method(generator_terms, student_terms)
