"""Training on real labelled data: teachers, and the control arms that data-free distillation is compared with.

This is the only room that may open a training split; it hands sources a split.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from cpsc_jax import (
  algorithm,
  checkpoint,
  datasets,
  evaluate,
  experiment,
  methods,
  nets,
  optim,
  saved,
  sources,
  streams,
  tasks,
)
from cpsc_jax.config import Config
from cpsc_jax.datasets import Data, Split
from cpsc_jax.errors import Refusal
from cpsc_jax.loop import Plan, train
from cpsc_jax.mesh import primary_first, replicate, replicated
from cpsc_jax.methods import terms
from cpsc_jax.progress import say
from cpsc_jax.setup import Method, Player, Setup, Term
from cpsc_jax.state import State, Tree
from cpsc_jax.streams import Stream

Phase = tuple[Callable[[State], tuple[State, dict]], State]


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A teacher: its module, its variables, and the card that says what it is.

  A card has net, num_classes, image_size, channels, mean, std and, once there are variables, their digest.
  `seconds` were spent on its training in this run, `earlier_seconds` of them before this process.
  """

  net: Any
  variables: Tree
  card: dict
  seconds: float = 0.0
  earlier_seconds: float = 0.0


def describe_teacher(config: Config, data: Data) -> dict:
  """The card of the teacher that a run will use, from the given checkpoint or of the one to be trained; no arrays.

  Raises:
    Refusal: nothing saved there; an unknown net; other classes, image size or channels than the data set's; a teacher
      that was trained on the images that the run would evaluate on; a long tail without an image of some class.
  """
  spec, folder = data.spec, config.teacher.checkpoint
  if not folder:
    cut = config.dataset.imbalance > 1 and "train" in spec.sizes
    return {
      "net": config.teacher.net,
      "num_classes": spec.num_classes,
      "image_size": spec.image_size,
      "channels": spec.channels,
      "mean": list(spec.mean or ()),
      "std": list(spec.std or ()),
      "dataset": data.name,
      **({"images_per_class": images_per_class(config, data)} if cut else {}),
    }
  card = checkpoint.read_card(folder)
  if "quantised" in card:
    raise Refusal(f"the net in {folder} is quantised, which a teacher is not; name the float network it was made of.")
  expected = {"num_classes": tasks.of(config).known(config, spec)}
  for key in ("num_classes", "image_size", "channels"):
    if card.get(key) != expected.get(key, getattr(spec, key)):
      raise Refusal(
        f"the teacher in {folder} has {key} {card.get(key)}, data set '{data.name}' has"
        f" {expected.get(key, getattr(spec, key))}; set"
        " config.dataset.name to the data set that it was trained for."
      )
  held_out = config.evaluate.split == "validation" and "train" in spec.sizes
  if held_out and card.get("evaluated_on") == "test":
    raise Refusal(
      f"the teacher in {folder} was trained on the whole training split, the validation part included; train one with"
      " config.evaluate.split=validation, or evaluate on 'test'."
    )
  nets.classifier(card["net"], card["num_classes"])
  return card


def obtain_teacher(
  config: Config,
  net: Any,
  card: dict,
  data: Data,
  test: Split,
  workdir: pathlib.Path,
  mesh: jax.sharding.Mesh,
  origin: Mapping[str, str],
) -> Teacher:
  """The run's teacher: the given checkpoint, the one trained in `workdir` before, or one trained now.

  `origin` is the run's (see `Plan`), and is written into the card of the teacher that is trained.

  Raises:
    Refusal: the teacher is damaged, or that in `workdir` is of another run.
  """
  folder = pathlib.Path(config.teacher.checkpoint or workdir / "teacher")
  if config.teacher.checkpoint:
    _, variables, card = saved.load(folder)
    return Teacher(net, replicate(variables, mesh), card)
  if (folder / checkpoint.CARD).exists():
    return _trained_before(net, folder, mesh, origin)
  outcome = _train_teacher(config, net, card, data, test, workdir, mesh, origin)
  card = {
    **card,
    "seed": config.seed,
    "epochs": config.teacher.epochs,
    "evaluated_on": config.evaluate.split,
    "best_epoch": outcome.best_epoch,
    "seconds": outcome.seconds,
    "environments": outcome.environments,
    "origin": dict(origin),
    "history": outcome.history,
  }
  variables = outcome.state.student.variables
  card = checkpoint.save_net(folder, variables, card)
  return Teacher(net, variables, card, outcome.seconds, outcome.earlier_seconds)


def _trained_before(net: Any, folder: pathlib.Path, mesh: jax.sharding.Mesh, origin: Mapping[str, str]) -> Teacher:
  again = f"delete {folder} and repeat the command, which makes it again from {folder.parent / 'teacher_training'}"
  try:
    _, variables, card = saved.load(folder)
  except Refusal as refusal:
    raise Refusal(f"{str(refusal).removesuffix('.')}; or {again}.") from refusal
  if changed := checkpoint.changed_origin(card.get("origin", {}), origin):
    raise Refusal(
      f"the teacher in {folder} was not trained by this run: it was trained with {changed}, or by an older version of"
      f" this program; put this run's own back, or {again}."
    )
  return Teacher(net, replicate(variables, mesh), card, card["seconds"], card["seconds"])


def training_split(config: Config, data: Data) -> Split:
  """The images to train on, cut to the long tail that config.dataset.imbalance asks for.

  Raises:
    Refusal: a class would be left without an image.
  """
  split = data.load_train(config.evaluate.split)
  if config.dataset.imbalance == 1:
    return split
  rows = datasets.long_tail(np.asarray(split.labels), data.spec.num_classes, config.dataset.imbalance)
  return Split(split.images[rows], split.labels[rows])


def images_per_class(config: Config, data: Data) -> list[int]:
  """How many images of each class `training_split` has, (C,); no image is decoded.

  Raises:
    Refusal: a class would be left without an image.
  """
  primary_first(data.require)
  labels = data.labels("train")
  if config.evaluate.split == "validation":
    labels = labels[~datasets.is_held_out(data.spec)]
  rows = datasets.long_tail(labels, data.spec.num_classes, config.dataset.imbalance)
  return np.bincount(labels[rows], minlength=data.spec.num_classes).tolist()


def _train_teacher(config: Config, net: Any, card: dict, data: Data, test: Split, workdir, mesh, origin):
  c, split = config.teacher, training_split(config, data)
  if c.batch_size > len(split):
    raise Refusal(
      f"config.teacher.batch_size is {c.batch_size}, more than the {len(split)} training images of '{data.name}' that"
      f" config.dataset.imbalance {config.dataset.imbalance:g} leaves; make it smaller."
    )
  origin, split = {**origin, "training_images": split.digest()}, split.put(replicated(mesh))
  steps = len(split) // c.batch_size
  say(f"teacher: {card['net']} on the {len(split)} training images of '{data.name}'")
  player = Player(
    net=net,
    optimiser=optim.optimiser(c, steps, c.epochs),
    steps=steps,
    policy=experiment.policy(config, c.micro_batches),
    augment=experiment.augmentation(c, card),
    loss_scaling=config.precision == "float16",  # also in reference mode, whose teachers were trained in float32
  )
  setup = Setup(
    student=player,
    method=on_real_data({"ce": terms.label_cross_entropy(c.label_smoothing)}, c.batch_size, player, split, card, mesh),
    mesh=mesh,
    weights={"student": {"ce": 1.0}},
  )
  epoch, state = _phase(config, setup, None, split, streams.key(streams.root(config.seed), Stream.TEACHER), data)
  deployed, _ = nets.deployed(net, {})
  classify = evaluate.compile_classifier(deployed, card["mean"], card["std"], config.evaluate.batch_size, mesh)

  def measure(state: State) -> dict[str, jax.Array]:
    predictions = classify(state.student.variables, test.images).labels
    return {"accuracy": evaluate.share_equal(predictions, test.labels)}

  plan = Plan(
    title="teacher",
    epoch=epoch,
    measure=measure,
    variables=lambda state: {},
    epochs=c.epochs,
    measure_every=config.evaluate.every,
    save_every=config.checkpoint.every,
    save_minutes=config.checkpoint.minutes,
    workdir=workdir / "teacher_training",
    origin=origin,
  )
  return train(plan, state)


def real_arm(config: Config, setup: Setup, teacher: Teacher, data: Data) -> tuple[Setup, Phase, dict[str, str]]:
  """(setup, phase, digest of the training images as `Plan.origin` has it) of an arm on real images.

  A student trained on real data with the optimiser, the augmentation and as many steps as in distillation.

  The arm "real_kd" keeps the student's terms, teacher and all, on real images and labels; "real_labels" has only
  their cross-entropy.
  """
  split = training_split(config, data)
  origin, split = {"training_images": split.digest()}, split.put(replicated(setup.mesh))
  steps = config.schedule.iterations * setup.student.steps
  student = dataclasses.replace(setup.student, steps=steps)
  student_terms, weights = setup.method.student_terms, setup.weights["student"]
  if config.arm == "real_labels":
    student_terms, weights = {"ce": terms.label_cross_entropy()}, {"ce": 1.0}
  batch_size, mesh = config.schedule.batch_size, setup.mesh
  method = on_real_data(student_terms, batch_size, student, split, teacher.card, mesh)
  method = tasks.of(config).method(config, methods.with_warmup(config, method, 1), 1)
  net = None if config.arm == "real_labels" else setup.teacher
  setup = Setup(student=student, method=method, mesh=mesh, weights={"student": weights}, teacher=net)
  key = streams.key(streams.root(config.seed), Stream.DISTILLATION)
  return setup, _phase(config, setup, teacher.variables, split, key, data), origin


def new_classes(config: Config, setup: Setup, teacher: Teacher, data: Data) -> tuple[Setup, Phase, dict[str, str]]:
  """As `real_arm`, for a task whose student sees real images of new classes beside what its method draws."""
  split = data.load_train(config.evaluate.split)
  origin = {"training_images": split.digest()}
  kept = data.load_kept(config.evaluate.split, config.incremental.kept) if config.arm == "real_rehearsal" else None
  setup = tasks.of(config).with_real(config, setup, len(split), teacher.card)
  program = algorithm.compile_epoch(setup, config.schedule.iterations, real_data=True)
  key = streams.key(streams.root(config.seed), Stream.DISTILLATION)
  state = experiment.initial_state(config, setup, key, data.spec.image_shape, teacher.variables)
  place = replicated(setup.mesh)
  splits = {"new": split.put(place), "kept": kept and kept.put(place)}
  return setup, (lambda state: program(state, teacher.variables, splits), state), origin


def on_real_data(
  student_terms: dict[str, Term], batch_size: int, student: Player, split: Split, card: dict, mesh: jax.sharding.Mesh
) -> Method:
  """A method without a generator: an iteration goes through new permutations of the split, as many as it takes."""
  size = len(split)

  def begin(state: State, key: jax.Array) -> State:
    return sources.shuffle(state, key, size)

  return Method(
    generator_terms={},
    student_terms=student_terms,
    source=sources.real(batch_size, card["mean"], card["std"], mesh),
    init=lambda key: ({}, sources.empty_order(student.steps * batch_size)),
    begin=begin,
  )


def _phase(config: Config, setup: Setup, teacher: Tree | None, split: Split, key: jax.Array, data: Data) -> Phase:
  """(state -> (state, losses), the state it begins with): an epoch is one iteration."""
  program = algorithm.compile_epoch(setup, 1, real_data=True)
  state = experiment.initial_state(config, setup, key, data.spec.image_shape, teacher)
  return lambda state: program(state, teacher, split), state
