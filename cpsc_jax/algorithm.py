"""The game: a generator looks for samples that the student gets wrong, the student learns from them.

There are two schedules. `alternate` is CPSC-DFKD's algorithm; `generator_step` and `student_step` are its two lines.
`invert` is RGAL's and its kin's: `start_afresh`, `inversion_step`, `keep_best`, `pool_step`. `compile_epoch` is the one
jit.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import nets, pool
from cpsc_jax.mesh import axis_sharding, batch_sharding, replicated
from cpsc_jax.state import DistillState, TrainState, View, step_counter

Terms = dict[str, tuple[float, Callable[[View], jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Method:
  """Named terms as {name: (weight, view -> scalar)}; a term of weight 0 is neither computed nor logged.

  Attributes:
    inverts: the schedule is `invert`, not `alternate`.
    critic: a flax module that the generator's terms may call (`View.criticise`); it is trained with the generator by
      the same loss, and kept when the generator starts afresh. None: there is none, and no bank.
    critic_width: the teacher's `Output`, as shapes -> width of what the critic reads.
    remember: view -> (N, D), what is kept in the bank of a batch that joins the pool.
    bank_width: the same shapes -> D.
  """

  generator_terms: Terms
  student_terms: Terms
  inverts: bool = False
  critic: Any = None
  critic_width: Callable[[Any], int] | None = None
  remember: Callable[[View], jax.Array] | None = None
  bank_width: Callable[[Any], int] | None = None


@dataclasses.dataclass(frozen=True)
class Game:
  """What stays fixed while a distillation runs: the nets, the terms, the optimisers, the numbers of the schedule.

  `augment` is (key, images) -> images, applied to what the student learns from, or None; `vary` the same for what both
  nets see of the generator's images in its steps. `labelled`: the label asked for has a meaning. `pool_slots`,
  `pool_batch` and `bank_slots` are the config's section `pool`, in batches. `quirks` is the config's section of that
  name: each switch is explained in configs/default.py.
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
  vary: Callable[[jax.Array, jax.Array], jax.Array] | None
  labelled: bool
  pool_slots: int
  pool_batch: int
  bank_slots: int
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


def invert(begin, g_step, keep, s_step, n_g, n_s):
  """A fresh generator and one fresh batch, n_g updates of both, the best into the pool; n_s student updates from it."""

  def iteration(state, _):
    keys = jax.random.split(jax.random.fold_in(state.key, state.step), n_g + n_s + 1)
    state = begin(state, keys[0])
    state, g = jax.lax.scan(g_step, state, keys[1 : n_g + 1])  # min L_G over G and z; S, T fixed
    state, s = jax.lax.scan(s_step, keep(state), keys[n_g + 1 :])  # min L_S over S on the pool; T fixed
    return state.tick(), {"generator": g, "student": s}

  return iteration


def generator_step(game, teacher):
  def step(state, key):
    z, y = draw(game, key, game.batch_size)
    state, aux = generator_update(game, teacher, state, z, y, key)
    return state, aux["terms"]

  return step


def student_step(game, teacher):
  def step(state, key):
    z, y = draw(game, key, game.batch_size)
    x, state = imagine(game, state, z, y)
    return learn(game, teacher, state, x, y, key)

  return step


def learn(game, teacher, state, x, y, key):
  """One update of the student on images x (N, H, W, K) and labels y (N,), after the crops and flips asked for."""
  if game.augment:
    x = game.augment(jax.random.fold_in(key, 1), x)
  student, terms = student_update(game, teacher, state.student, x, y, key)
  return state.replace(student=student), terms


def start_afresh(game):
  """A new generator, new latents and new labels in place of the last ones."""

  def begin(state, key):
    key_g, key_z = jax.random.split(key)
    z, y = draw(game, key_z, game.pool_batch)
    generator = train_state(nets.init(game.generator, key_g, z, y), game.generator_tx)
    state = state.replace(generator=same_types(generator, state.generator))
    x, _ = imagine(game, state, z, y)
    latent_state = game.generator_tx.init(z)
    new = {"latent": z, "labels": y, "latent_state": latent_state, "loss": jnp.array(jnp.inf), "images": x}
    draft = state.memory["draft"]
    draft = {**draft, **same_types(new, {name: draft[name] for name in new})}
    return state.replace(memory={**state.memory, "draft": draft})

  return begin


def same_types(tree, like):
  return jax.tree.map(lambda new, old: new.astype(old.dtype), tree, like)


def inversion_step(game, teacher):
  """One update of the generator and its latents, and of the critic; the batch of the least loss is remembered."""

  def step(state, key):
    memory, draft = state.memory, state.memory["draft"]
    z, y = jax.lax.with_sharding_constraint((draft["latent"], draft["labels"]), batch_sharding(game.mesh))
    moved = {"params": state.generator.params, "latent": z}
    if game.method.critic:
      moved["critic"] = memory["critic"].params
    loss = generator_loss(game, teacher, state, y, key)
    (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(moved)
    better = value < draft["loss"]
    now = {"loss": value, "images": aux["image"]}
    if game.method.critic:
      now["remembered"] = aux["remembered"]
      memory = {**memory, "critic": memory["critic"].updated(game.generator_tx, grads["critic"], {})}
    best = {name: jnp.where(better, new, draft[name]) for name, new in now.items()}
    change, latent_state = game.generator_tx.update(grads["latent"], draft["latent_state"])
    draft = {**draft, **best, "latent": z + change, "latent_state": latent_state}
    return (
      state.replace(
        generator=state.generator.updated(game.generator_tx, grads["params"], aux["generator_stats"]),
        student=state.student.replace(batch_stats=aux["student_stats"]),
        memory={**memory, "draft": draft},
      ),
      aux["terms"],
    )

  return step


def keep_best(game):
  """Puts the best batch into the pool, and what is remembered of it into the bank."""

  def keep(state):
    memory, draft = state.memory, state.memory["draft"]
    kept = {"pool": pool.add(memory["pool"], images=draft["images"], labels=draft["labels"])}
    if game.method.critic:
      kept["bank"] = pool.add(memory["bank"], features=draft["remembered"])
    return state.replace(memory={**memory, **kept})

  return keep


def pool_step(game, teacher):
  def step(state, key):
    drawn = pool.draw(state.memory["pool"], jax.random.fold_in(key, 2), game.batch_size)
    x, y = jax.lax.with_sharding_constraint((drawn["images"], drawn["labels"]), batch_sharding(game.mesh))
    return learn(game, teacher, state, x, y, key)

  return step


def generator_update(game, teacher, state, z, y, key=None):
  """One update of the generator on latents z (N, nz) and labels y (N,); returns (state, {"terms", "latent", ...})."""
  moved = {"params": state.generator.params, "latent": z}
  loss = generator_loss(game, teacher, state, y, key)
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


def generator_loss(game, teacher, state, y, key=None):
  """L_G as a function of {"params", "latent"} with aux; gradients flow through teacher and student into the image.

  With a critic its parameters belong to the argument too. `key` is needed by terms that draw, and by `vary`.
  """

  def loss(moved):
    variables = {"params": moved["params"], "batch_stats": state.generator.batch_stats}
    x, generator_stats = nets.forward(game.generator, variables, moved["latent"], y, train=True)
    seen = game.vary(jax.random.fold_in(key, 3), x) if game.vary else x
    t, moments, running = nets.forward_observed(game.teacher, teacher, seen)
    s, student_stats = nets.forward(
      game.student, state.student.variables, seen, train=game.quirks.student_trains_in_generator_step
    )
    view = View(y, t, s, moments, running, images=x, key=None if key is None else jax.random.fold_in(key, 4))
    if game.method.critic:
      view = view.replace(
        bank=state.memory["bank"],
        teach=lambda images: game.teacher.apply(teacher, images, train=False),
        criticise=lambda features: game.method.critic.apply({"params": moved["critic"]}, features),
      )
    value, terms = weigh(game.method.generator_terms, view)
    return value, {
      "terms": terms,
      "remembered": jax.lax.stop_gradient(game.method.remember(view)) if game.method.critic else None,
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


def student_update(game, teacher, student, x, y, key=None):
  """One update of the student on constant images x (N, H, W, K) with labels y (N,): (TrainState, terms)."""
  grads, aux = jax.grad(student_loss(game, teacher, student, x, y, key), has_aux=True)(student.params)
  return student.updated(game.student_tx, grads, aux["student_stats"]), aux["terms"]


def student_loss(game, teacher, student, x, y, key=None):
  """L_S as a function of the student's parameters, with aux; the teacher's outputs are constants of it.

  `key` is needed by terms that draw.
  """
  key = None if key is None else jax.random.fold_in(key, 4)
  t = game.teacher.apply(teacher, x, train=False)

  def loss(params):
    s, stats = nets.forward(game.student, {"params": params, "batch_stats": student.batch_stats}, x, train=True)
    value, terms = weigh(game.method.student_terms, View(y, t, s, key=key))
    return value, {"terms": terms, "teacher": t, "student": s, "student_stats": stats}

  return loss


def weigh(terms, view):
  """(weighted sum, {name: unweighted value, "total": sum}) over the terms whose weight is not 0."""
  values = {name: term(view) for name, (weight, term) in terms.items() if weight}
  total = sum(terms[name][0] * value for name, value in values.items())
  return total, {**values, "total": total}


def draw(game, key, number):
  """`number` standard normal latents (N, nz) and uniform labels (N,), split over the devices."""
  key_z, key_y = jax.random.split(key)
  z = jax.random.normal(key_z, (number, game.latent_dim))
  y = jax.random.randint(key_y, (number,), 0, game.num_labels)
  return jax.lax.with_sharding_constraint((z, y), batch_sharding(game.mesh))


def initial_state(game, seed, image_shape):
  """A DistillState with fresh generator and student; the same on every device count."""
  key = jax.random.key(seed)
  key_g, key_s, key_run = jax.random.split(key, 3)
  image = jnp.zeros((2, *image_shape))
  latent, labels = jnp.zeros((2, game.latent_dim)), jnp.zeros((2,), jnp.int32)
  generator = train_state(nets.init(game.generator, key_g, latent, labels), game.generator_tx)
  student = train_state(nets.init(game.student, key_s, image), game.student_tx)
  memory = initial_memory(game, jax.random.fold_in(key, 3), image_shape) if game.method.inverts else {}
  return DistillState(step_counter(), key_run, generator, student, memory)


def initial_memory(game, key, image_shape):
  """An empty pool, a blank draft and, where the method has one, a fresh critic with an empty bank."""
  n, method = game.pool_batch, game.method
  latent = jnp.zeros((n, game.latent_dim))
  draft = {
    "latent": latent,
    "labels": jnp.zeros((n,), jnp.int32),
    "latent_state": jax.jit(game.generator_tx.init)(latent),
    "loss": jnp.zeros(()),
    "images": jnp.zeros((n, *image_shape)),
  }
  images, labels = (image_shape, jnp.float32), ((), jnp.int32)
  memory = {"pool": pool.empty(game.pool_slots, n, images=images, labels=labels), "draft": draft}
  if method.critic:
    shapes = nets.output_shapes(game.teacher, image_shape)
    width = method.bank_width(shapes)
    variables = jax.jit(method.critic.init)(key, jnp.zeros((2, method.critic_width(shapes))))
    memory["critic"] = train_state({**variables, "batch_stats": {}}, game.generator_tx)
    memory["bank"] = pool.empty(game.bank_slots, n, features=((width,), jnp.float32))
    draft["remembered"] = jnp.zeros((n, width))
  return memory


def train_state(variables, tx):
  return TrainState(variables["params"], variables["batch_stats"], jax.jit(tx.init)(variables["params"]))


def shardings(game):
  """Where the parts of a DistillState lie: all on every device, but what the pool and the bank hold is shared out."""
  whole, batch, slots = replicated(game.mesh), batch_sharding(game.mesh), axis_sharding(game.mesh, pool.BATCH_AXIS)
  memory = {}
  if game.method.inverts:
    draft = {**dict.fromkeys(("latent", "labels", "latent_state", "loss"), whole), "images": batch}
    memory = {"pool": {"images": slots, "labels": slots, "count": whole}, "draft": draft}
  if game.method.critic:
    memory |= {"critic": whole, "bank": {"features": slots, "count": whole}}
    memory["draft"]["remembered"] = batch
  return DistillState(whole, whole, whole, whole, memory)


def compile_epoch(game, iterations):
  """(state, teacher variables) -> (state, terms): one epoch as one program. The state is donated.

  The terms are {"generator": {name: (iterations, n_g)}, "student": {name: (iterations, n_s)}}.
  """

  def epoch(state, teacher):
    counts = game.generator_steps, game.student_steps
    if game.method.inverts:
      steps = start_afresh(game), inversion_step(game, teacher), keep_best(game), pool_step(game, teacher)
      iteration = invert(*steps, *counts)
    else:
      iteration = alternate(generator_step(game, teacher), student_step(game, teacher), *counts)
    return jax.lax.scan(iteration, state, length=iterations)

  everywhere, places = replicated(game.mesh), shardings(game)
  return jax.jit(epoch, in_shardings=(places, everywhere), out_shardings=(places, everywhere), donate_argnums=0)
