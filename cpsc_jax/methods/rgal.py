"""RGAL: relation-guided adversarial learning (Liang and Fu, IJCV 2024; arXiv 2412.11380).

`triplet_terms` are its own idea and can be added to any method.
"""

from jax.lax import stop_gradient

from cpsc_jax import losses
from cpsc_jax.algorithm import Method


def method(config, train_head=False, split=None, whole=None):
  g, s = config.loss.generator, config.loss.student
  temperature = config.loss.kd_temperature
  generator_terms = {
    "bn": (g.bn, lambda v: losses.bn_statistics(v.moments, v.running)),
    "ce": (g.ce, lambda v: losses.cross_entropy(v.teacher.logits, v.labels)),
    "adversarial": (g.adversarial, lambda v: -losses.kl_where_agreed(v.teacher.logits, v.student.logits)),
  }
  student_terms = {
    "kd": (s.kd, lambda v: losses.kl(stop_gradient(v.teacher.logits), v.student.logits, temperature)),
    "channel": (s.channel, lambda v: losses.channel_distillation(v.teacher.stages, v.student.projected)),
  }
  return Method(generator_terms, student_terms, inverts=True)


def triplet_terms(config):
  """RGAL's terms of generator and student, in opposite directions, as two tables of terms.

  Synthesis pushes samples of one class apart and pulls classes together, in the teacher's eyes; the student does the
  opposite with its own. Labels are those that the teacher gives.
  """
  c = config.loss.triplet
  believed = lambda v: v.teacher.logits.argmax(axis=-1)

  def synthesis(v):
    of = v.teacher
    swapped = not config.quirks.unswapped_triplets
    return losses.triplets(of.stages, of.logits, believed(v), v.key, c.margin, focal=c.focal, swapped=swapped)

  def learning(v):
    of = v.student
    return losses.triplets(of.stages, of.logits, believed(v), v.key, c.margin)

  weights = config.loss.generator.triplet, config.loss.student.triplet
  return {"triplet": (weights[0], synthesis)}, {"triplet": (weights[1], learning)}
