"""Named random streams: every key of a run is derived here, so that no two uses can share one by accident.

`jax.random.split(key, n)[i]` equals `jax.random.fold_in(key, i)`, so keys derived by number from one parent collide as
soon as two pieces of code count from 0. A stream is folded in by the hash of its name instead, and only what counts
within one stream goes by number.
"""

import enum
import zlib

import jax


class Stream(enum.StrEnum):
  """What a key is for. Children of one parent differ by their stream."""

  # of a run, from its seed: its two phases, the samples that are shown, and what diagnoses draw
  TEACHER = "teacher"
  DISTILLATION = "distillation"
  SAMPLE_SHEET = "sample_sheet"
  PROBES = "probes"
  DIAGNOSIS = "diagnosis"
  # of a phase
  GENERATOR_INIT = "generator_init"
  STUDENT_INIT = "student_init"
  HEAD_INIT = "head_init"
  KERNELS_INIT = "kernels_init"
  METHOD_INIT = "method_init"
  PRIOR = "prior"
  TRAINING = "training"
  # of training, one per iteration, and of an iteration
  ITERATIONS = "iterations"
  BEGIN = "begin"
  GENERATOR_STEPS = "generator_steps"
  KEEP = "keep"
  STUDENT_STEPS = "student_steps"
  # of the start of an iteration or of a step
  LATENTS = "latents"
  LABELS = "labels"
  OFFSET = "offset"
  BETWEEN = "between"
  SOURCE = "source"
  AUGMENTATION = "augmentation"
  DROPOUT = "dropout"
  TERMS = "terms"
  ORDER = "order"
  # of a term or a source
  NEGATIVES = "negatives"
  LOCAL_VIEWS = "local_views"
  SYNTHESIS_TRIPLETS = "synthesis_triplets"
  STUDENT_TRIPLETS = "student_triplets"
  PARTS = "parts"


TAGS = {stream: zlib.crc32(stream.encode()) for stream in Stream}


def key(parent: jax.Array, stream: Stream) -> jax.Array:
  """The key of `stream` under `parent`, both ()."""
  return jax.random.fold_in(parent, TAGS[stream])


def keys(parent: jax.Array, stream: Stream, number: int) -> jax.Array:
  """`number` keys of one stream, (number,)."""
  return jax.random.split(key(parent, stream), number)


def nth(parent: jax.Array, stream: Stream, index: jax.Array | int) -> jax.Array:
  """Key number `index` of a stream whose length is not known beforehand, ()."""
  return jax.random.fold_in(key(parent, stream), index)


def root(seed: int) -> jax.Array:
  """The key that all others of a run come from, ()."""
  return jax.random.key(seed)
