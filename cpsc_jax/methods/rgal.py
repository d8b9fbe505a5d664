"""RGAL: relation-guided adversarial learning (Liang and Fu, IJCV 2024; arXiv 2412.11380).

`triplet_terms` are its own idea and can be added to any method.
"""

import jax
import ml_collections

from cpsc_jax import losses, streams
from cpsc_jax.methods import inversion, terms
from cpsc_jax.methods.base import Parts
from cpsc_jax.setup import Method, Term
from cpsc_jax.state import View
from cpsc_jax.streams import Stream

INVERTS = True
check = inversion.check


def method(parts: Parts) -> Method:
  channel = Term(lambda v: losses.channel_distillation(v.teacher.stages, v.student.projected))
  generator_terms = {
    "bn": terms.BN,
    "ce": terms.CE,
    "adversarial": terms.divergence(losses.kl_where_agreed),
    "activation": terms.ACTIVATION,
    "balance": terms.BALANCE,
  }
  return inversion.inverting(parts, generator_terms, {"kd": terms.kd(parts.config), "channel": channel})


def triplet_terms(config: ml_collections.ConfigDict) -> tuple[dict[str, Term], dict[str, Term]]:
  """RGAL's terms of generator and student, in opposite directions, as two tables of terms.

  Synthesis pushes samples of one class apart and pulls classes together, in the teacher's features; the student does
  the opposite with its own. Labels are the teacher's predictions.
  """
  c = config.loss.triplet

  def synthesis(v: View) -> jax.Array:
    of = v.student if c.synthesis_of == "student" else v.teacher
    stages, key = of.stages[c.synthesis_from :], streams.key(v.key, Stream.SYNTHESIS_TRIPLETS)
    return losses.triplets(stages, of.logits, predicted(v), key, c.margin, focal=c.focal, swapped=c.swapped)

  def learning(v: View) -> jax.Array:
    of, key = v.student, streams.key(v.key, Stream.STUDENT_TRIPLETS)
    features = (of.pooled[:, None],) if c.student_features == "pooled" else of.stages
    return losses.triplets(features, of.logits, predicted(v), key, c.margin)

  return {"triplet": Term(synthesis, couples_batch=True)}, {"triplet": Term(learning, couples_batch=True)}


def predicted(v: View) -> jax.Array:
  return v.teacher.logits.argmax(axis=-1)
