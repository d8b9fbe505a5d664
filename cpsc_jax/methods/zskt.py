"""ZSKT: Zero-shot Knowledge Transfer via Adversarial Belief Matching (Micaelli and Storkey, NeurIPS 2019)."""

from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.algorithm import Method


def method(config, train_head=False, split=None, whole=None):
  g, s = config.loss.generator, config.loss.student
  temperature = config.loss.kd_temperature
  generator_terms = {"adversarial": (g.adversarial, lambda v: -losses.kl(v.teacher.logits, v.student.logits))}
  student_terms = {
    "kd": (s.kd, lambda v: losses.kl(stop_gradient(v.teacher.logits), v.student.logits, temperature)),
    "attention": (s.attention, lambda v: losses.attention(v.teacher.stages, v.student.stages)),
  }
  return Method(generator_terms, student_terms)
