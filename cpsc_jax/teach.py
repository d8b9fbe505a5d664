"""Training on real labelled data: teachers, and the control arms that data-free distillation is held against.

This is the only room that may open a training split.
"""

import pathlib

import jax
import jax.numpy as jnp

from cpsc_jax import algorithm, checkpoint, datasets, evaluate, losses, nets, optim, saved
from cpsc_jax.errors import Refusal
from cpsc_jax.loop import Plan, train
from cpsc_jax.mesh import batch_sharding, replicate, replicated
from cpsc_jax.progress import say
from cpsc_jax.state import SupervisedState, step_counter


def obtain_teacher(config, test, workdir, mesh):
  """(net, variables, card) of the run's teacher: the given checkpoint, the one trained here before, or one trained now.

  The card says what the teacher is: net, num_classes, image_size, channels, mean, std, dataset, digest.

  Raises:
    Refusal: a checkpoint that does not fit the data set.
  """
  spec = datasets.describe(config.dataset.name, config.dataset.data_dir)
  folder = pathlib.Path(config.teacher.checkpoint) if config.teacher.checkpoint else workdir / "teacher"
  if config.teacher.checkpoint or (folder / checkpoint.CARD).exists():
    net, variables, card = saved.load(folder)
    return net, replicate(variables, mesh), card
  net = nets.classifier(config.teacher.net, spec.num_classes)
  outcome = _train_teacher(config, net, spec, test, workdir, mesh)
  card = {
    "net": config.teacher.net,
    "num_classes": spec.num_classes,
    "image_size": spec.image_size,
    "channels": spec.channels,
    "mean": list(spec.mean),
    "std": list(spec.std),
    "dataset": config.dataset.name,
    "seed": config.seed,
    "epochs": config.teacher.epochs,
    "best_epoch": outcome.best_epoch,
    "seconds": outcome.seconds,
    "history": outcome.history,
  }
  variables = outcome.state.net.variables
  return net, variables, checkpoint.save_net(folder, variables, card)


def check_teacher(config):
  """The card of config.teacher.checkpoint, if it fits the data set; reads no arrays.

  Raises:
    Refusal: nothing saved there; an unknown net; other classes, image size or channels than the data set's.
  """
  card = checkpoint.read_card(config.teacher.checkpoint)
  spec = datasets.describe(config.dataset.name, config.dataset.data_dir)
  for key in ("num_classes", "image_size", "channels"):
    if card.get(key) != getattr(spec, key):
      raise Refusal(
        f"the teacher in {config.teacher.checkpoint} has {key} {card.get(key)}, data set '{config.dataset.name}' has"
        f" {getattr(spec, key)}; name the data set that it was trained for in config.dataset.name."
      )
  nets.classifier(card["net"], card["num_classes"])
  return card


def _train_teacher(config, net, spec, test, workdir, mesh):
  c = config.teacher
  data = datasets.load_train(config.dataset.name, config.dataset.data_dir).put(replicated(mesh))
  steps = len(data) // c.batch_size
  tx = optim.supervised_optimiser(c, steps, published=config.quirks.stepped_schedule)
  say(f"teacher: {c.net} on the {len(data)} training images of '{config.dataset.name}'")

  key_init, key_run = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 1))
  variables = nets.init(net, key_init, jnp.zeros((2, *spec.image_shape)))
  state = SupervisedState(step_counter(), key_run, algorithm.train_state(variables, tx))
  update = {"teacher": label_update(net, tx, c.label_smoothing)}
  epoch = compile_epoch_on_data(update, preparation(c, spec, spec.mean, spec.std), c.batch_size, steps, mesh)
  classify = evaluate.compile_classifier(net, spec.mean, spec.std, config.evaluate.batch_size, mesh)
  plan = Plan(
    title="teacher",
    epoch=lambda state: epoch(state, data.images, data.labels),
    measure=lambda state: {"accuracy": evaluate.share_equal(classify(state.net.variables, test.images), test.labels)},
    variables=lambda state: {},
    epochs=c.epochs,
    measure_every=config.evaluate.every,
    save_every=config.checkpoint.every,
    save_minutes=config.checkpoint.minutes,
    workdir=workdir / "teacher_training",
  )
  return train(plan, replicate(state, mesh))


def real_arm(config, game, teacher_variables, card):
  """(epoch program, initial state) of a student trained on real data, with a distillation's optimiser and steps.

  The arm "real_kd" keeps the student's terms, teacher and all, on real images and labels; "real_labels" has only
  their cross-entropy. The epoch is a function of the state; the state is a SupervisedState.
  """
  spec = datasets.describe(config.dataset.name, config.dataset.data_dir)
  data = datasets.load_train(config.dataset.name, config.dataset.data_dir).put(replicated(game.mesh))
  update = label_update(game.student, game.student_tx)
  if config.arm == "real_kd":
    update = lambda state, x, y, key: algorithm.student_update(game, teacher_variables, state, x, y, key)
  start = algorithm.initial_state(game, config.seed, spec.image_shape)
  state = SupervisedState(start.step, start.key, start.student)
  prepare = preparation(config.teacher, spec, card["mean"], card["std"])
  epoch = compile_epoch_on_data(
    {"student": update}, prepare, game.batch_size, config.schedule.iterations * game.student_steps, game.mesh
  )
  return lambda state: epoch(state, data.images, data.labels), replicate(state, game.mesh)


def preparation(c, spec, mean, std):
  """(key, uint8 images) -> what a net is trained on: cropped and flipped as the teacher's section `c` says."""
  flip = c.flip and spec.photographs
  return lambda key, images: datasets.normalise(datasets.augment(key, images, c.crop_pad, flip), mean, std)


def label_update(net, tx, label_smoothing=0.0):
  """(TrainState, x, y, key) -> (TrainState, terms): one update by cross-entropy on the labels."""

  def update(state, x, y, _):
    def loss(params):
      out, stats = nets.forward(net, {"params": params, "batch_stats": state.batch_stats}, x, train=True)
      return losses.cross_entropy(out.logits, y, label_smoothing=label_smoothing), stats

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.updated(tx, grads, stats), {"ce": value, "total": value}

  return update


def compile_epoch_on_data(update, prepare, batch_size, steps, mesh):
  """(state, images, labels) -> (state, terms): `steps` updates on shuffled batches of resident data, one program.

  `update` is {player: (TrainState, x, y, key) -> (TrainState, terms)} with one entry; `prepare` is (key, uint8 images)
  -> x. The order runs through whole permutations of the data, as many as the steps take.
  """
  ((player, step_on),) = update.items()

  def epoch(state, images, labels):
    key_order, key_steps = jax.random.split(jax.random.fold_in(state.key, state.step))
    order = shuffled(key_order, labels.shape[0], steps * batch_size).reshape(steps, batch_size)

    def step(net, inputs):
      key, rows = inputs
      x, y = jax.lax.with_sharding_constraint((images[rows], labels[rows]), batch_sharding(mesh))
      return step_on(net, prepare(key, x), y, key)

    net, terms = jax.lax.scan(step, state.net, (jax.random.split(key_steps, steps), order))
    return state.replace(net=net).tick(), {player: terms}

  everywhere = replicated(mesh)
  return jax.jit(epoch, in_shardings=everywhere, out_shardings=everywhere, donate_argnums=0)


def shuffled(key, size, count):
  """`count` indices below `size`: as many random permutations in a row as it takes, (count,) int32."""
  rounds = -(-count // size)
  permute = lambda k: jax.random.permutation(k, size)
  return jax.vmap(permute)(jax.random.split(key, rounds)).reshape(-1)[:count]
