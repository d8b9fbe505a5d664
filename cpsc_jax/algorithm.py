"""The game: a generator looks for samples that the student gets wrong, the student learns from them.

`alternate` is the paper's algorithm; `generator_step` and `student_step` are its two lines; `compile_epoch` is the
one jit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import nets
from cpsc_jax.mesh import replicated, split_batch
from cpsc_jax.state import DistillState, TrainState, View, step_counter

Terms = dict[str, tuple[float, Callable[[View], jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Method:
  """Named terms as {name: (weight, view -> scalar)}; a term of weight 0 is neither computed nor logged."""

  generator_terms: Terms
  student_terms: Terms


@dataclasses.dataclass(frozen=True)
class Game:
  """What stays fixed while a distillation runs: the nets, the terms, the optimisers, the numbers of the schedule.

  `augment` is (key, images) -> images, applied to what the student learns from, or None. `quirks` is the config's
  section of that name: each switch is explained in configs/default.py.
  """

  generator: Any  # this and the next two: a flax.linen.Module
  teacher: Any
  student: Any
  method: Method
  generator_tx: optax.GradientTransformation
  student_tx: optax.GradientTransformation
  latent_dim: int
  num_labels: int
  batch_size: int
  generator_steps: int
  student_steps: int
  augment: Callable[[jax.Array, jax.Array], jax.Array] | None
  quirks: Any
  mesh: jax.sharding.Mesh


def alternate(g_step, s_step, n_g, n_s):
  """n_g generator updates, then n_s student updates, fresh (z, y) for each."""

  def iteration(state, _):
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), n_g + n_s)
    state, g = jax.lax.scan(g_step, state, keys[:n_g])  # min L_G over G; S, T fixed
    state, s = jax.lax.scan(s_step, state, keys[n_g:])  # min L_S over S; G, T fixed
    return state.tick(), {"generator": g, "student": s}

  return iteration


def generator_step(game, teacher):
  def step(state, key):
    z, y = draw(game, key)
    state, aux = generator_update(game, teacher, state, z, y)
    return state, aux["terms"]

  return step


def student_step(game, teacher):
  def step(state, key):
    z, y = draw(game, key)
    x, state = imagine(game, state, z, y)
    if game.augment:
      x = game.augment(jax.random.fold_in(key, 1), x)
    student, terms = student_update(game, teacher, state.student, x, y)
    return state.replace(student=student), terms

  return step


def generator_update(game, teacher, state, z, y):
  """One update of the generator on latents z (N, nz) and labels y (N,); returns (state, {"terms", "latent", ...})."""
  moved = {"params": state.generator.params, "latent": z}
  loss = generator_loss(game, teacher, state, y)
  if not game.quirks.latent_step:
    loss_of_both, moved = loss, {"params": moved["params"]}
    loss = lambda m: loss_of_both({**m, "latent": z})
  grads, aux = jax.grad(loss, has_aux=True)(moved)
  generator = state.generator
  if game.quirks.fresh_adam:
    generator = generator.replace(opt_state=game.generator_tx.init(generator.params))
  generator = generator.updated(game.generator_tx, grads["params"], aux["generator_stats"])
  if game.quirks.latent_step:
    step, _ = game.generator_tx.update(grads["latent"], game.generator_tx.init(z))
    aux["latent"] = z + step
  student = state.student.replace(batch_stats=aux["student_stats"])
  return state.replace(generator=generator, student=student), aux


def generator_loss(game, teacher, state, y):
  """L_G as a function of {"params", "latent"} with aux; gradients flow through teacher and student into the image."""

  def loss(moved):
    variables = {"params": moved["params"], "batch_stats": state.generator.batch_stats}
    x, generator_stats = nets.forward(game.generator, variables, moved["latent"], y, train=True)
    t, moments, running = nets.forward_observed(game.teacher, teacher, x)
    s, student_stats = nets.forward(
      game.student, state.student.variables, x, train=game.quirks.student_trains_in_generator_step
    )
    value, terms = weigh(game.method.generator_terms, View(y, t, s, moments, running))
    return value, {
      "terms": terms,
      "image": x,
      "teacher": t,
      "student": s,
      "generator_stats": generator_stats,
      "student_stats": student_stats,
    }

  return loss


def imagine(game, state, z, y):
  """Images for the student, normalised by their own batch: ((N, H, W, K), state)."""
  x, stats = nets.forward(game.generator, state.generator.variables, z, y, train=True)
  if game.quirks.generator_stats_in_student_step:
    state = state.replace(generator=state.generator.replace(batch_stats=stats))
  return jax.lax.stop_gradient(x), state


def student_update(game, teacher, student, x, y):
  """One update of the student on constant images x (N, H, W, K) with labels y (N,): (TrainState, terms)."""
  grads, aux = jax.grad(student_loss(game, teacher, student, x, y), has_aux=True)(student.params)
  return student.updated(game.student_tx, grads, aux["student_stats"]), aux["terms"]


def student_loss(game, teacher, student, x, y):
  """L_S as a function of the student's parameters, with aux; the teacher's outputs are constants of it."""
  t = game.teacher.apply(teacher, x, train=False)

  def loss(params):
    s, stats = nets.forward(game.student, {"params": params, "batch_stats": student.batch_stats}, x, train=True)
    value, terms = weigh(game.method.student_terms, View(y, t, s))
    return value, {"terms": terms, "teacher": t, "student": s, "student_stats": stats}

  return loss


def weigh(terms, view):
  """(weighted sum, {name: unweighted value, "total": sum}) over the terms whose weight is not 0."""
  values = {name: term(view) for name, (weight, term) in terms.items() if weight}
  total = sum(terms[name][0] * value for name, value in values.items())
  return total, {**values, "total": total}


def draw(game, key):
  """Standard normal latents (N, nz) and uniform labels (N,), split over the devices."""
  key_z, key_y = jax.random.split(key)
  z = jax.random.normal(key_z, (game.batch_size, game.latent_dim))
  y = jax.random.randint(key_y, (game.batch_size,), 0, game.num_labels)
  return jax.lax.with_sharding_constraint((z, y), split_batch(game.mesh))


def initial_state(game, seed, image_shape):
  """A DistillState with fresh generator and student; the same on every device count."""
  key = jax.random.key(seed)
  key_g, key_s, key_run = jax.random.split(key, 3)
  image = jnp.zeros((2, *image_shape))
  latent, labels = jnp.zeros((2, game.latent_dim)), jnp.zeros((2,), jnp.int32)
  generator = train_state(nets.init(game.generator, key_g, latent, labels), game.generator_tx)
  student = train_state(nets.init(game.student, key_s, image), game.student_tx)
  return DistillState(step_counter(), key_run, generator, student, memory={})


def train_state(variables, tx):
  return TrainState(variables["params"], variables["batch_stats"], jax.jit(tx.init)(variables["params"]))


def compile_epoch(game, iterations):
  """(state, teacher variables) -> (state, terms): one epoch as one program. The state is donated.

  The terms are {"generator": {name: (iterations, n_g)}, "student": {name: (iterations, n_s)}}.
  """

  def epoch(state, teacher):
    iteration = alternate(
      generator_step(game, teacher), student_step(game, teacher), game.generator_steps, game.student_steps
    )
    return jax.lax.scan(iteration, state, length=iterations)

  everywhere = replicated(game.mesh)
  return jax.jit(epoch, in_shardings=everywhere, out_shardings=everywhere, donate_argnums=0)
