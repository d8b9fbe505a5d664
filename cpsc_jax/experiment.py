"""From a config to what trains: nets, optimisers, method and source."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import datasets, initial, methods, nets, optim, sources, streams, tasks
from cpsc_jax import prior as priors
from cpsc_jax.config import EMBEDDINGS, Config, inverts, prior_shares, read_embedding
from cpsc_jax.datasets import Dataset
from cpsc_jax.gradients import Policy
from cpsc_jax.mesh import replicated
from cpsc_jax.progress import say, working
from cpsc_jax.setup import Method, Noise, Player, Setup, Term
from cpsc_jax.state import PRIOR, Batch, Hyper, State, Tree, View
from cpsc_jax.streams import Stream

GENERATING_ARMS = ("distill", "untrained_generator")  # which draw labels


def build(config: Config, spec: Dataset, teacher: Any, card: dict, mesh: jax.sharding.Mesh) -> Setup:
  """The setup of a resolved config.

  Args:
    spec: what is known about the data set.
    teacher: the teacher's module.
    card: `mean` and `std` of the teacher's input.
  """
  task, whole = tasks.of(config), spec
  student, has_head = build_student(config, spec, teacher)
  more = task.terms(config, student, spec.image_shape, spec.num_classes)
  spec = dataclasses.replace(spec, num_classes=task.known(config, spec))  # of which the generator draws
  generator = build_generator(config, spec, teacher, card)
  kept_layer = nets.classifier_path(student, spec.image_shape) if config.student.classifier == "teacher" else None
  iterations = config.schedule.iterations
  noise = Noise(
    latent_dim=getattr(generator.net, "latent_dim", config.generator.latent_dim),
    num_labels=min(config.generator.label_limit or spec.num_classes, spec.num_classes),
    labelled=config.generator.conditional or inverts(config),
    mesh=mesh,
    balanced=config.generator.labels == "balanced",
    between=config.generator.between,
  )
  trained_head = has_head and config.student.head == "trained"
  form, augment = generator.net.form, augmentation(config.student, card)
  parts = config, noise, generator, teacher, spec.image_shape, mesh, trained_head
  method = methods.method(methods.Parts(*parts, form.mean, form.std, spec.num_classes, augment, more))
  if "bn" in method.generator_terms and not nets.has_statistics(teacher, spec.image_shape):
    say("the teacher has no batch norm, so the term config.loss.generator.bn has nothing to compare and is off")
    terms = {name: term for name, term in method.generator_terms.items() if name != "bn"}
    method = dataclasses.replace(method, generator_terms=terms)
  if config.arm in GENERATING_ARMS and config.generator.prior != "uniform":
    method = with_prior(config, method, whole, mesh)
  if config.arm == "gaussian_noise":
    generator, method = None, on_noise(config, method, spec, mesh)
  steps = iterations * config.student.steps
  method = task.method(config, methods.with_warmup(config, method, iterations), iterations)
  optimiser = optim.student_optimiser(config, steps, tasks.waiting_epochs(config), kept_layer)
  return Setup(
    student=Player(
      net=student,
      optimiser=task.optimiser(config, optimiser, steps, student, spec.image_shape),
      steps=config.student.steps,
      policy=policy(config, config.student.micro_batches),
      augment=augment,
      loss_scaling=scales_loss(config),
      init=config.student.init,
      norm_parts=config.student.norm_parts,
    ),
    method=method,
    mesh=mesh,
    weights=weights(config, method),
    teacher=teacher,
    generator=generator,
    student_trains_in_generator_steps=config.generator.student_mode == "train",
  )


def weights(config: Config, method: Method) -> dict[str, dict[str, float]]:
  """The config's weights of a method's terms, as `Setup` has them."""
  return {
    "generator": {name: config.loss.generator[name] for name in method.generator_terms},
    "student": {name: config.loss.student[name] for name in method.student_terms},
  }


def with_prior(config: Config, method: Method, spec: Dataset, mesh: jax.sharding.Mesh) -> Method:
  """A method whose labels have the prior of a config; under "need" it follows what the student learns.

  Args:
    spec: the whole data set, new classes included.
  """
  c, number = config.generator, method.noise.num_labels
  start = priors.start(c.prior, number, prior_shares(config, spec) if c.prior == "given" else None)
  need = priors.Need(c.prior_floor, c.prior_momentum)

  def init(key: jax.Array) -> tuple[dict, Tree]:
    trained, memory = method.init(key)
    return trained, {**memory, PRIOR: jax.tree.map(lambda x: jnp.asarray(x, float), start)}

  def learned(state: State, batch: Batch, outputs: Tree) -> State:
    """A sample between classes counts for each by its share, and one of a class that is not drawn for none."""
    taught = outputs["teacher_logits"]
    ours = outputs["student"].logits[:, : taught.shape[-1]]  # among the teacher's classes
    disagree = jnp.argmax(ours, axis=-1) != jnp.argmax(taught, axis=-1)
    members = jax.nn.one_hot(batch.labels, number) if batch.targets is None else batch.targets[:, :number]
    return state.with_prior(priors.followed(state.prior, need, members, disagree))

  changed = {"init": init, **({"learned": learned} if c.prior == "need" else {})}
  if method.shardings:
    trained, memory = method.shardings
    changed["shardings"] = trained, {**memory, PRIOR: replicated(mesh)}
  return dataclasses.replace(method, **changed)


def on_noise(config: Config, method: Method, spec: Dataset, mesh: jax.sharding.Mesh) -> Method:
  """The student's terms of a method on images of noise, whose labels are what the teacher takes them for."""

  def by_teacher(term: Term) -> Term:
    def value(v: View) -> jax.Array:
      return term.value(v.replace(labels=jnp.argmax(v.teacher.logits, axis=-1)))

    return Term(value, term.couples_batch)

  return Method(
    generator_terms={},
    student_terms={name: by_teacher(term) for name, term in method.student_terms.items()},
    source=sources.gaussian(config.schedule.batch_size, spec.image_shape, mesh),
  )


def initial_state(
  config: Config, setup: Setup, key: jax.Array, image_shape: tuple[int, int, int], teacher: Tree | None
) -> State:
  """The state that a phase begins with, on the setup's devices.

  Under config.student.inherit a student, which has a teacher, starts with layers of it; under config.student.classifier
  "teacher" it has its classifier. A generator that starts from an embedding of the classes is given it, and a prior
  that is the teacher's is estimated.

  Raises:
    Refusal: a net has no classifier that can be found.
  """
  with working("drawing the initial weights"):
    state = initial.state(setup, key, image_shape)
    if config.student.inherit and teacher is not None:
      state = _with_inherited(state, teacher)
    if config.student.classifier == "teacher" and teacher is not None:
      state = _with_classifier(setup, state, image_shape, teacher)
    if config.generator.embedding and state.generator is not None:
      state = _with_embedding(config, setup, state, image_shape, teacher)
    if config.generator.prior == "teacher" and state.prior is not None and teacher is not None:
      state = _with_prior(setup, state, streams.key(key, Stream.PRIOR), image_shape, teacher)
    if teacher is not None:
      state = tasks.of(config).begin(config, setup, state, image_shape, teacher)
    return initial.placed(setup, state)


def _with_prior(setup: Setup, state: State, key: jax.Array, image_shape: tuple[int, int, int], teacher: Tree) -> State:
  net, variables = nets.deployed(setup.teacher, teacher)
  shares = priors.of_teacher(net, variables, key, image_shape)
  shares = priors.first(shares, state.prior.shares.shape[-1]).astype(state.prior.shares.dtype)
  return state.with_prior(state.prior.replace(shares=shares))


def _with_inherited(state: State, teacher: Tree) -> State:
  variables, taken = nets.inherited(state.student.variables, teacher)
  number = f"{taken:,} of the student's {nets.count_parameters(variables['params']):,} parameters"
  why = "" if taken else ": the two nets have no layer of the same name and kernel"
  say(f"{number} start as the teacher's{why}")
  # An epoch consumes its state, which must not have the teacher's own arrays.
  return state.replace(student=state.student.replace(**jax.tree.map(jnp.copy, variables)))


def _with_classifier(setup: Setup, state: State, image_shape: tuple[int, int, int], teacher: Tree) -> State:
  layer = jax.tree.map(jnp.copy, nets.classifier_layer(setup.teacher, teacher, image_shape))
  path = nets.classifier_path(setup.student.net, image_shape)
  params = nets.with_classifier(state.student.params, path, layer)
  return state.replace(student=state.student.replace(params=params))


def _with_embedding(
  config: Config, setup: Setup, state: State, image_shape: tuple[int, int, int], teacher: Tree
) -> State:
  kind, net = config.generator.embedding, setup.generator.net
  if kind in ("learned", "one_hot"):
    return state
  if kind == "classifier":
    rows = nets.classifier_layer(setup.teacher, teacher, image_shape)["kernel"].T.astype(jnp.float32)
    rows = (rows - rows.mean(axis=1, keepdims=True)) / rows.std(axis=1, keepdims=True)
  else:
    rows = jnp.asarray(read_embedding(kind, net.num_classes))
  stats = nets.with_embedding(state.generator.batch_stats, rows)
  return state.replace(generator=state.generator.replace(batch_stats=stats))


def build_teacher(config: Config, card: dict) -> Any:
  """The module of a card, computing in the config's precision."""
  return nets.classifier(card["net"], card["num_classes"], compute_dtype(config))


def build_generator(config: Config, spec: Dataset, teacher: Any, card: dict) -> Player:
  c = config.generator
  classes = spec.num_classes if c.conditional else 1
  form, dtype = nets.Form.of(c, card), compute_dtype(config)
  net = nets.generator(c.net, classes, spec.image_size, spec.channels, c.width, dtype, form)
  if c.embedding:
    layers = -(-config.pool.batch_size // spec.num_classes)
    width, learned = embedding_width(config, spec, teacher), c.embedding == "learned"
    net = nets.NoisyLayers(net, spec.num_classes, c.latent_dim, layers, width, learned)
  iterations = config.schedule.iterations
  every = (c.steps, 1) if inverts(config) else (iterations * c.steps, None)
  return Player(
    net=net,
    optimiser=optim.generator_optimiser(config, *every),
    steps=0 if config.arm == "untrained_generator" else c.steps,
    policy=policy(config, c.micro_batches),
    augment=augmentation(c, card),
    loss_scaling=scales_loss(config),
  )


def learning_rates(config: Config, epoch: jax.Array, hyper: Hyper) -> dict[str, jax.Array]:
  """{"student", "generator"}: the learning rate of the last update of an epoch, (); of a student that waits still, NaN.

  There is none of a generator that takes no update, or whose optimiser starts again in every iteration.
  """
  waiting, steps = tasks.waiting_epochs(config), config.schedule.iterations
  updates = (epoch - waiting) * steps * config.student.steps
  schedule = optim.student_schedule(config, steps * config.student.steps, waiting)
  rate = tasks.of(config).learning_rate(config, epoch, schedule(updates - 1))
  rates = {"student": jnp.where(updates > 0, hyper.student.lr * rate, jnp.nan)}
  if config.arm == "distill" and not inverts(config):
    schedule = optim.generator_schedule(config, steps * config.generator.steps)
    rate = schedule(epoch * steps * config.generator.steps - 1) if callable(schedule) else schedule
    rates["generator"] = hyper.generator.lr * rate
  return rates


def embedding_width(config: Config, spec: Dataset, teacher: Any) -> int:
  """Width of the embedding of a class that config.generator.embedding names."""
  kind = config.generator.embedding
  if kind == "one_hot":
    return spec.num_classes
  if kind in EMBEDDINGS:
    return nets.feature_width(teacher, spec.image_shape)
  return read_embedding(kind, spec.num_classes).shape[-1]


def build_student(config: Config, spec: Dataset, teacher: Any) -> tuple[Any, bool]:
  """(the student's module, whether it has a feature head because its features are not as wide as the teacher's)."""
  student = nets.classifier(config.student.net, spec.num_classes, compute_dtype(config))
  student = tasks.of(config).student(config, student, spec.image_shape)
  ours, theirs = (nets.feature_width(net, spec.image_shape) for net in (student, teacher))
  if ours != theirs:
    student = nets.FeatureHead(student, theirs, normalise=config.student.head == "trained")
  if config.loss.student.channel:
    stages = nets.output_shapes(teacher, spec.image_shape).stages
    student = nets.StageProjections(student, tuple(stage.shape[-1] for stage in stages))
  return student, ours != theirs


def compute_dtype(config: Config) -> jnp.dtype | None:
  """What convolutions and the generator's linear layer compute in; None: float32."""
  return jnp.dtype(config.precision) if config.precision in ("bfloat16", "float16") else None


def policy(config: Config, micro_batches: int) -> Policy:
  return Policy(config.rematerialise, micro_batches)


def scales_loss(config: Config) -> bool:
  return config.precision == "float16" and config.loss_scaling


def augmentation(section: Config, card: dict) -> Callable[[jax.Array, jax.Array], jax.Array] | None:
  """(key, normalised images) -> images by a section's crop_pad and flip, or None where it asks for neither."""
  if not (section.crop_pad or section.flip):
    return None
  if section.get("jitter") == "rolls":
    return lambda key, x: datasets.jitter(key, x, section.crop_pad, section.flip)
  black = black_of(card["mean"], card["std"])

  def augment(key: jax.Array, x: jax.Array) -> jax.Array:
    return datasets.augment(key, x, section.crop_pad, section.flip, fill=black)

  return augment


def black_of(mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
  """A black pixel in normalised space, (K,)."""
  return -np.asarray(mean) / np.asarray(std)
