"""DAFL: Data-Free Learning of Student Networks (Chen et al., ICCV 2019; arXiv 1904.01186)."""

from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.algorithm import Method


def method(config, train_head=False, split=None, whole=None):
  g, s = config.loss.generator, config.loss.student
  temperature = config.loss.kd_temperature
  generator_terms = {
    "one_hot": (g.one_hot, lambda v: losses.cross_entropy(v.teacher.logits, v.teacher.logits.argmax(axis=-1))),
    "activation": (g.activation, lambda v: losses.inactivity(v.teacher.pooled)),
    "balance": (g.balance, lambda v: losses.imbalance(v.teacher.logits)),
  }
  student_terms = {
    "kd": (s.kd, lambda v: losses.kl(stop_gradient(v.teacher.logits), v.student.logits, temperature)),
  }
  return Method(generator_terms, student_terms)
