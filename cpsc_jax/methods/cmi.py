"""CMI: Contrastive Model Inversion (Fang et al., IJCAI 2021; arXiv 2105.08584).

A sample's global view (the one that all terms see) and its local view (a zoomed crop) are pulled together and away from
all others, those of a memory bank included. What is compared is the teacher's spatially averaged stages, mapped by a
critic that is trained along.
"""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from cpsc_jax import losses, nets, pool
from cpsc_jax.algorithm import Method

SMALLEST = 0.25  # share of the image's area that a local view shows at least
RATIO = 4 / 3  # of its sides, at most


def method(config, train_head=False, split=None, whole=None):
  g, s, c = config.loss.generator, config.loss.student, config.loss.views
  temperature = config.loss.kd_temperature
  generator_terms = {
    "bn": (g.bn, lambda v: losses.bn_statistics(v.moments, v.running)),
    "ce": (g.ce, lambda v: losses.cross_entropy(v.teacher.logits, v.labels)),
    "adversarial": (g.adversarial, lambda v: -losses.kl_where_agreed(v.teacher.logits, v.student.logits)),
    "views": (g.views, lambda v: instance_contrast(v, c.negatives, c.temperature)),
  }
  student_terms = {
    "kd": (s.kd, lambda v: losses.kl(stop_gradient(v.teacher.logits), v.student.logits, temperature)),
  }
  return Method(
    generator_terms,
    student_terms,
    inverts=True,
    critic=nets.Critic(c.width),
    critic_width=stage_widths,
    remember=lambda v: jnp.concatenate(two_views(v), axis=1),
    bank_width=lambda shapes: 2 * stage_widths(shapes),
  )


def stage_widths(shapes):
  return sum(stage.shape[-1] for stage in shapes.stages)


def two_views(v):
  """What the teacher makes of the local and of the global view, before the critic: two (N, D)."""
  local = v.teach(zoom(jax.random.fold_in(v.key, 0), v.images))
  means = lambda output: jnp.concatenate([jnp.mean(stage, (1, 2)) for stage in output.stages], axis=1)
  return means(local), means(v.teacher)


def instance_contrast(v, negatives, temperature):
  """Each local view is to be told from all global ones, of this batch and of `negatives` from the bank: () (eq. 6)."""
  local, whole = two_views(v)
  number = local.shape[0]
  drawn, there = pool.draw_apart(v.bank, jax.random.fold_in(v.key, 1), negatives)
  banked_local, banked_whole = jnp.split(drawn["features"], 2, axis=1)
  ours = v.criticise(jnp.concatenate([local, banked_local]))
  others = stop_gradient(v.criticise(jnp.concatenate([whole, banked_whole])))
  there = jnp.concatenate([jnp.ones(number, bool), there])
  log_p = jax.nn.log_softmax(jnp.where(there, ours @ others.T / temperature, -jnp.inf), axis=1)
  wrong = -jnp.diagonal(log_p)
  banked = jnp.where(there[number:], wrong[number:], 0.0)
  return jnp.mean(wrong[:number]) + jnp.sum(banked) / jnp.maximum(jnp.sum(there[number:]), 1)


def zoom(key, images_NHWK):
  """A random part of each image, between SMALLEST and all of its area, enlarged to its size; bilinear."""
  n, height, width, channels = images_NHWK.shape
  key_area, key_ratio, key_place = jax.random.split(key, 3)
  area = jax.random.uniform(key_area, (n,), minval=SMALLEST, maxval=1.0)
  ratio = jnp.exp(jax.random.uniform(key_ratio, (n,), minval=-jnp.log(RATIO), maxval=jnp.log(RATIO)))
  shares = jnp.minimum(jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=1), 1.0)
  size = jnp.array([height, width], images_NHWK.dtype)
  corner = jax.random.uniform(key_place, (n, 2)) * (1 - shares) * size

  def one(image, share, corner):
    shape = (height, width, channels)
    return jax.image.scale_and_translate(image, shape, (0, 1), 1 / share, -corner / share, "bilinear", antialias=False)

  return jax.vmap(one)(images_NHWK, shares, corner)
