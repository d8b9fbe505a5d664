"""CPSC-DFKD: conditional pseudo-supervised contrast (Shao, Zhang, Wang; Pattern Recognition 143:109781, 2023)."""

import functools

import jax.numpy as jnp
from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.algorithm import Method


def method(config, train_head=False, split=None, whole=None):
  g, s, form = config.loss.generator, config.loss.student, config.loss.ikd_form
  double, confidence = config.quirks.double_softmax, config.loss.confidence
  supervised_contrast = losses.supervised_contrast
  if config.loss.contrast == "blockwise":
    supervised_contrast = functools.partial(
      losses.supervised_contrast_blockwise, block=config.loss.contrast_block, split=split, whole=whole
    )
  contrast = lambda student, v: supervised_contrast(
    jnp.stack([student, v.teacher.features], axis=1), v.labels, config.loss.temperature
  )
  generator_terms = {
    "adversarial": (g.adversarial, lambda v: -losses.kl(v.teacher.logits, v.student.logits)),
    "ikd": (g.ikd, lambda v: losses.ikd_generator(v.teacher.logits, v.student.logits, form)),
    "bn": (g.bn, lambda v: losses.bn_statistics(v.moments, v.running)),
    "scl": (g.scl, lambda v: contrast(v.student.features, v)),
    "ce": (g.ce, lambda v: losses.cross_entropy_until_confident(v.teacher.logits, v.labels, confidence, double)),
  }
  student_terms = {
    "kd": (s.kd, lambda v: losses.kl(stop_gradient(v.teacher.logits), v.student.logits, config.loss.kd_temperature)),
    "l2": (s.l2, lambda v: losses.ikd_student(v.teacher.logits, v.student.logits, form)),
    "ce": (s.ce, lambda v: losses.cross_entropy(v.student.logits, v.labels, double)),
    "head": (s.head if train_head else 0.0, lambda v: contrast(v.student.head_features, v)),
  }
  return Method(generator_terms, student_terms)
