"""Algorithm 1: a generator looks for samples that the student gets wrong, and the student learns from them.

`iteration` is the algorithm, `generator_step` and `student_step` are its two updates, `compile_epoch` is the one jit.
What differs between methods stands in their `Method` (cpsc_jax.setup); training on real data is the same without a
generator.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cpsc_jax import gradients, nets, streams
from cpsc_jax.gradients import Aux
from cpsc_jax.initial import shardings
from cpsc_jax.mesh import batch_sharding, replicated
from cpsc_jax.setup import LATENTS, Setup, Teach, Term
from cpsc_jax.state import Batch, Losses, Output, State, Tree, View, Weights
from cpsc_jax.streams import Stream

Step = Callable[[State, jax.Array], tuple[State, Losses]]


def iteration(
  setup: Setup, generator_step: Step, student_step: Step, teach: Teach | None = None
) -> Callable[[State, Any], tuple[State, dict]]:
  """n_g generator updates, then n_s student updates; for scanning."""
  method, generator, student = setup.method, setup.generator, setup.student

  def run(state: State, _: Any) -> tuple[State, dict[str, Losses]]:
    key = streams.nth(state.key, Stream.ITERATIONS, state.step)
    state = method.begin(state, streams.key(key, Stream.BEGIN))
    acts = generator and generator.steps
    generator_keys = streams.keys(key, Stream.GENERATOR_STEPS, generator.steps) if acts else None
    keep_key = streams.key(key, Stream.KEEP)
    student_keys = streams.keys(key, Stream.STUDENT_STEPS, student.steps)

    def synthesise(state: State) -> tuple[State, dict[str, Losses]]:  # min L_G over G; S, T fixed
      losses = {}
      if acts:
        state, losses["generator"] = jax.lax.scan(generator_step, state, generator_keys)
      return method.keep(state, keep_key, teach), losses

    def learn(state: State) -> tuple[State, Losses]:  # min L_S over S; G, T fixed
      return jax.lax.scan(student_step, state, student_keys)

    state, losses = unless(method.rests, synthesise, state)
    state, losses["student"] = unless(method.waits, learn, state)
    return state.tick(), losses

  return run


def unless(
  idle: Callable[[State], jax.Array] | None, work: Callable[[State], tuple[State, Any]], state: State
) -> tuple[State, Any]:
  """What `work` returns; where `idle` says so, the state as it is, and losses of 0."""
  if idle is None:
    return work(state)

  def rest(state: State) -> tuple[State, Any]:
    return state, jax.tree.map(jnp.zeros_like, jax.eval_shape(work, state)[1])

  return jax.lax.cond(idle(state), rest, work, state)


def generator_step(setup: Setup, teacher: Tree) -> Step:
  """One update of the generator, and of what the method trains along with it."""

  def step(state: State, key: jax.Array) -> tuple[State, Losses]:
    z, y = setup.method.draw(state, key)
    state, aux = generator_update(setup, teacher, state, z, y, key)
    return setup.method.observe(state, aux.losses, aux.outputs["recorded"]), aux.losses

  return step


def student_step(setup: Setup, teacher: Tree, data: Any = None) -> Step:
  """One update of the student on a batch of its source."""

  def step(state: State, key: jax.Array) -> tuple[State, Losses]:
    state, batch = setup.method.source(state, streams.key(key, Stream.SOURCE), data)
    if setup.student.augment and batch.logits is None:
      images = setup.student.augment(streams.key(key, Stream.AUGMENTATION), batch.images)
      batch = batch.replace(images=images)
    state, aux = student_update(setup, teacher, state, batch, key)
    return setup.method.learned(state, batch, aux.outputs), aux.losses

  return step


def generator_update(
  setup: Setup, teacher: Tree, state: State, z: jax.Array, y: jax.Array, key: jax.Array
) -> tuple[State, Aux]:
  """The state after one generator update on latents z (N, nz) and labels y (N,), and what its loss returned."""
  parts = {"generator": state.generator, **state.trained}
  params = {name: part.params for name, part in parts.items()}
  stats = {"generator": state.generator.batch_stats, "student": state.student.batch_stats}
  loss, policy = generator_loss(setup, teacher, state), setup.generator.policy
  got = gradients.take(loss, params, stats, (z, y), key, policy, state.generator.loss_scale)
  new_stats, factor = got.aux.stats, state.hyper.generator.lr
  moved = {
    name: part.updated(setup.optimiser_of(name), got.grads[name], new_stats.get(name, part.batch_stats), factor)
    for name, part in parts.items()
  }
  new = state.replace(
    generator=moved.pop("generator"),
    student=state.student.replace(batch_stats=new_stats["student"]),
    trained=moved,
  )
  new = gradients.keep_finite(got.finite, new, state)
  return new.replace(generator=new.generator.replace(loss_scale=got.loss_scale)), got.aux


def generator_loss(setup: Setup, teacher: Tree, state: State) -> Callable[..., tuple[jax.Array, Aux]]:
  """L_G as a loss for `gradients.take`; gradients flow through teacher and student into the image.

  Its parameters are {"generator": ..., and one entry for each of `State.trained`}, its batch is (latents, labels).
  Latents among the parameters take the place of those in the batch.
  """

  def loss(params: Tree, stats: Tree, batch: Tree, _: None, key: jax.Array) -> tuple[jax.Array, Aux]:
    images, y, generator_stats = generated(setup, params, stats["generator"], *batch)
    trained = {name: part for name, part in params.items() if name != "generator"}
    view, student_stats = view_of(setup, teacher, state, images, y, trained, stats["student"], key)
    losses = weighted_sum(setup.method.generator_terms, state.hyper.generator.terms, view)
    recorded = jax.lax.stop_gradient(setup.method.record(view))
    t = view.teacher.replace(statistics=None)
    outputs = {"recorded": recorded, "images": images, "teacher": t, "student": view.student}
    return losses.total, Aux(losses, {"generator": generator_stats, "student": student_stats}, outputs)

  return loss


def generated(setup: Setup, params: Tree, stats: Tree, z: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array, Tree]:
  """(images, labels, the generator's batch statistics) of a generator update; `params` as in `generator_loss`."""
  z, y = jax.lax.with_sharding_constraint((params.get(LATENTS, z), y), batch_sharding(setup.mesh))
  variables = {"params": params["generator"], "batch_stats": stats}
  images, stats = nets.forward(setup.generator.net, variables, z, y, train=True)
  return images, y, stats


def view_of(
  setup: Setup,
  teacher: Tree,
  state: State,
  images: jax.Array,
  y: jax.Array,
  trained: dict[str, Tree],
  student_stats: Tree,
  key: jax.Array,
) -> tuple[View, Tree]:
  """What the generator's terms see of images (N, H, W, K) for labels y (N,), and the student's batch statistics."""
  generator, student = setup.generator, setup.student

  def teach(images: jax.Array) -> Any:
    return nets.forward_observed(setup.teacher, teacher, images)

  x = generator.augment(streams.key(key, Stream.AUGMENTATION), images) if generator.augment else images
  t = nets.forward_observed(setup.teacher, teacher, x)
  variables = {"params": state.student.params, "batch_stats": student_stats}
  train, dropout = setup.student_trains_in_generator_steps, streams.key(key, Stream.DROPOUT)
  options = {"train": train, "key": dropout, "norm_parts": student.norm_parts}
  s, student_stats = nets.forward(student.net, variables, x, **options)
  return View(y, t, s, images, streams.key(key, Stream.TERMS), trained, state.memory, teach), student_stats


def student_update(setup: Setup, teacher: Tree, state: State, batch: Batch, key: jax.Array) -> tuple[State, Aux]:
  """The state after one student update on a batch, and what its loss returned."""
  student, loss = state.student, student_loss(setup, state.hyper.student, state.memory)

  def teach(batch: Batch) -> Output | None:
    if batch.logits is not None:
      return Output(batch.logits)
    return teach_with(setup, teacher)(batch.images) if setup.teacher else None

  stats, policy = student.batch_stats, setup.student.policy
  got = gradients.take(loss, student.params, stats, batch, key, policy, student.loss_scale, teach)
  new = student.updated(setup.student.optimiser, got.grads, got.aux.stats, state.hyper.student.lr)
  new = gradients.keep_finite(got.finite, new, student).replace(loss_scale=got.loss_scale)
  return state.replace(student=new), got.aux


def student_loss(setup: Setup, weights: Weights, memory: Tree = None) -> Callable[..., tuple[jax.Array, Aux]]:
  """L_S as a loss for `gradients.take`: of the student's parameters, a batch and the teacher's output on it.

  `memory` is the state's, for terms that look something up in it.
  """

  def loss(params: Tree, stats: Tree, batch: Batch, t: Output | None, key: jax.Array) -> tuple[jax.Array, Aux]:
    dropout = streams.key(key, Stream.DROPOUT)
    variables = {"params": params, "batch_stats": stats}
    options = {"train": True, "key": dropout, "norm_parts": setup.student.norm_parts}
    s, stats = nets.forward(setup.student.net, variables, batch.images, **options)
    known = {"targets": batch.targets, "memory": memory, "student_params": params}
    view = View(batch.labels, t, s, key=streams.key(key, Stream.TERMS), **known)
    losses = weighted_sum(setup.method.student_terms, weights.terms, view)
    return losses.total, Aux(losses, stats, {"student": s, "teacher_logits": None if t is None else t.logits})

  return loss


def weighted_sum(terms: dict[str, Term], weights: dict[str, jax.Array], view: View) -> Losses:
  """The terms' means over the batch and their sum, weighted by {name: ()}."""
  values = {name: jnp.mean(term.value(view)) for name, term in terms.items()}
  return Losses(sum(weights[name] * value for name, value in values.items()), values)


def teach_with(setup: Setup, teacher: Tree) -> Teach:
  """images (N, H, W, K) -> the teacher's `Output`."""
  return lambda images: setup.teacher.apply(teacher, images, train=False)


def epoch(setup: Setup, iterations: int) -> Callable[[State, Tree, Any], tuple[State, dict[str, Losses]]]:
  """(state, teacher variables, data) -> (state, losses of each player, (iterations, steps)), for jit and vmap."""

  def run(state: State, teacher: Tree, data: Any = None) -> tuple[State, dict[str, Losses]]:
    steps = generator_step(setup, teacher), student_step(setup, teacher, data)
    return jax.lax.scan(iteration(setup, *steps, teach_with(setup, teacher)), state, length=iterations)

  return run


def compile_epoch(
  setup: Setup, iterations: int, real_data: bool = False
) -> Callable[..., tuple[State, dict[str, Losses]]]:
  """One epoch as one program, (state, teacher variables) -> (state, losses). The state is donated.

  With `real_data` it takes the training split as a third argument.
  """
  whole, places = replicated(setup.mesh), shardings(setup)
  inputs = (places, whole, whole) if real_data else (places, whole)
  return jax.jit(epoch(setup, iterations), in_shardings=inputs, out_shardings=(places, whole), donate_argnums=0)
