"""Data-free class-incremental learning: the student is the previous network, which learns new classes.

Its batches are real images of the new classes, first, and then what the method draws of the old ones from the previous
network, which is the teacher. Labels of old classes come first. `cpsc_jax.phases` goes from phase to phase.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.lax import stop_gradient

from cpsc_jax import losses, methods, nets, optim, prior, schema, sources, streams
from cpsc_jax.datasets import Dataset
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import check_divisible, replicated
from cpsc_jax.methods import terms as shared
from cpsc_jax.setup import Method, Setup, Term
from cpsc_jax.state import State, Tree, View
from cpsc_jax.streams import Stream
from cpsc_jax.tasks.base import Task

Config = ml_collections.ConfigDict | ml_collections.FrozenConfigDict

OWN = ("local", "balanced", "classifier", "lwf", "old_logits", "old_features", "relation", "refine")  # of the student
ARMS = schema.INCREMENTAL_ARMS  # controls without a generator
REFINED = ("refine", "old_logits")  # the terms of refinement
OLD_CLASSIFIER = "old_classifier"  # in `State.memory`
CONFIDENT_TEMPERATURE = 1000.0  # ABD, in its published code
LWF_TEMPERATURE = 2.0  # Li and Hoiem, TPAMI 2018, section 4


def sizes(config: Config, num_classes: int) -> tuple[int, ...]:
  """How many classes each phase of a run brings.

  Raises:
    Refusal: the phases cannot be equal, or are more than there are classes.
  """
  c = config.incremental
  first, others = (c.first, c.phases - 1) if c.first else (0, c.phases)
  rest = num_classes - first
  if rest < others or rest % others:
    of = f"the {rest} classes after the first {first}" if first else f"{num_classes} classes"
    fitting = [n + bool(first) for n in range(1, rest + 1) if rest % n == 0]
    raise Refusal(
      f"config.incremental.phases is {c.phases}, into which {of} of '{config.dataset.name}' cannot be divided equally;"
      f" choose one of {', '.join(map(str, fitting)) or 'none: make config.incremental.first smaller'}."
    )
  return (*([first] if first else []), *([rest // others] * others))


def class_order(config: Config, num_classes: int) -> tuple[int, ...]:
  """The classes in the order in which they come, by config.incremental.order.

  Raises:
    Refusal: neither empty, nor a seed, nor a permutation.
  """
  order = config.incremental.order.replace(" ", "")
  if not order:
    return tuple(range(num_classes))
  parts = order.split(",")
  if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
    raise Refusal(
      f"config.incremental.order is '{order}'; it must be empty, the seed of a shuffle, or all classes by their numbers"
      " with commas between."
    )
  numbers = tuple(map(int, parts))
  if len(numbers) == 1 and num_classes > 1:
    key = jax.random.key(numbers[0])
    return tuple(map(int, jax.random.permutation(streams.key(key, Stream.ORDER), num_classes)))
  if sorted(numbers) != list(range(num_classes)):
    raise Refusal(
      f"config.incremental.order has {len(numbers)} numbers that are no permutation of the {num_classes} classes of"
      f" '{config.dataset.name}'; each from 0 to {num_classes - 1} must stand there once."
    )
  return numbers


def check(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  """Phases, order and arms that there are; and nothing else that touches the student's classes."""
  c = config.incremental
  check_divisible(mesh, "config.incremental.batch_size", c.batch_size)
  if not c.known:
    first = sizes(config, spec.num_classes)[0]
    class_order(config, spec.num_classes)
    if config.generator.prior == "given":
      shares = prior.read(config.generator.prior_shares)
      if not shares[: min(config.generator.label_limit or first, first)].max() > 0:
        raise Refusal(
          f"config.generator.prior_shares has nothing but 0 for the {first} classes of the first phase, from which the"
          " second draws labels; give one of them a share."
        )
  if "train" not in spec.sizes:
    raise Refusal(f"data set '{config.dataset.name}' has no training split, of which every phase learns new classes.")
  for key, value, wanted in (
    ("reference", config.reference, False),
    ("student.classifier", config.student.classifier, "own"),
    ("student.micro_batches", config.student.micro_batches, 1),
    ("dataset.imbalance", config.dataset.imbalance, 1.0),
  ):
    if value != wanted:
      raise Refusal(f"config.{key} is {value}, which class-incremental learning does not have; set it to {wanted}.")
  both = c.batch_size + config.schedule.batch_size
  if both % config.student.norm_parts:
    raise Refusal(
      f"config.student.norm_parts is {config.student.norm_parts}, which does not divide the {both} images that a"
      " student's batch has, incremental.batch_size and schedule.batch_size together; choose a divisor, such as 2 for"
      " equal sizes."
    )
  if config.loss.student.channel and config.loss.student.relation:
    raise Refusal("config.loss.student.channel and relation each put something around the student; set one to 0.")
  both = methods.waiting_epochs(config) + c.refine
  if both >= config.schedule.epochs:
    raise Refusal(
      f"config.generator.warmup_epochs and incremental.refine are {both} epochs together, and config.schedule.epochs is"
      f" {config.schedule.epochs}: the student would not learn between them; make them shorter or the run longer."
    )
  if c.rests and not config.generator.warmup_epochs:
    raise Refusal("config.incremental.rests is True, but generator.warmup_epochs is 0: the generator would not learn.")
  inverts, episodes = getattr(methods.METHODS[config.method], "INVERTS", False), "episodes" in config
  if c.rests and inverts and config.pool.fresh_share:
    raise Refusal(
      f"config.incremental.rests is True, but method '{config.method}' begins every iteration with an untrained"
      f" generator, whose share of a batch, config.pool.fresh_share, is {config.pool.fresh_share}; set that to 0."
    )
  batches = config.generator.warmup_epochs * config.schedule.iterations
  if c.rests and episodes and batches <= config.episodes.warmup:
    raise Refusal(
      f"config.incremental.rests is True after {batches} batches, and the student waits for more than"
      f" config.episodes.warmup, {config.episodes.warmup}: it would never learn; make generator.warmup_epochs longer."
    )
  hard = [name for name in ("balanced", "classifier", "refine") if config.loss.student[name]]
  if config.generator.between_share and hard and config.arm not in ARMS:
    raise Refusal(
      f"config.generator.between_share is {config.generator.between_share}, but loss.student.{hard[0]} takes a sample"
      " between two classes for one of them; set one of the two to 0."
    )
  if c.refine and not config.loss.student.refine:
    raise Refusal("config.incremental.refine needs config.loss.student.refine, whose weight is 0; set one of the two.")
  if config.loss.student.refine and not c.refine:
    raise Refusal(
      f"config.loss.student.refine is {config.loss.student.refine}, but config.incremental.refine is 0, so that there"
      " is no refinement; set one of the two."
    )


def known(config: Config, spec: Dataset) -> int:
  return config.incremental.known or spec.num_classes


def of_teacher(config: Config, card: dict) -> Config:
  """The student is the previous network.

  Raises:
    Refusal: the config is that of all phases, which is several runs.
  """
  if not config.incremental.known:
    raise Refusal(
      "class-incremental learning is a run for each phase; start it by cpsc-jax --config, or cpsc_jax.phases.run from"
      " Python: neither sweeps nor cpsc_jax.distill go through phases."
    )
  config = ml_collections.ConfigDict(config.to_dict())
  config.student.net, config.student.inherit = card["net"], config.arm != "joint"
  return config


def factors(config: Config, old: int, new: int) -> dict[str, float]:
  """What the weights of terms are multiplied by for so many `old` and `new` classes; those not named: 1.

  "rdfcil" is Gao et al., ECCV 2022 (arXiv 2203.13104); "abd" Smith et al., ICCV 2021 (arXiv 2106.09701).
  """
  if config.incremental.balance == "rdfcil":
    alpha, beta = math.log2(new / 2 + 1), math.sqrt(old / new)
    return {"local": (1 + 1 / alpha) / beta, "old_logits": alpha * beta, "relation": alpha * beta}
  if config.incremental.balance == "abd":
    return {"local": new / (old + new)}
  return {}


def student(config: Config, net: Any, image_shape: tuple[int, int, int]) -> Any:
  return nets.RelationMaps(net) if config.loss.student.relation and config.arm not in ARMS else net


def terms(config: Config, net: Any, image_shape: tuple[int, int, int], seen: int) -> dict[str, dict[str, Term]]:
  """Terms of both players that this task adds to a method's.

  The student's see a batch whose first config.incremental.batch_size images are real. The generator's are those by
  which ABD and R-DFCIL fit it to the previous network.

  Args:
    net: the student.
    seen: classes that it has.
  """
  real, old, balance = config.incremental.batch_size, config.incremental.known, config.incremental.balance
  new = max(seen - old, 1)
  share, factor = old / (old + new), factors(config, max(old, 1), new)

  def local(v: View) -> jax.Array:
    return new_cross_entropy(v.student.logits[:real], v.labels[:real], old)

  def balanced(v: View) -> jax.Array:
    """All classes weigh the same, however many images of each there are, and 1 on average."""
    number = v.labels.shape[0]
    of_new, of_old = (1 - share) * number / real, share * number / max(number - real, 1)
    weights = jnp.where(v.labels >= old, of_new, of_old)
    return weights * losses.cross_entropy(v.student.logits, v.labels)

  def classifier(v: View) -> jax.Array:
    layer = nets.classifier_layer(net, {"params": v.student_params}, image_shape)
    logits = through(layer, stop_gradient(v.student.pooled))
    weights = jnp.where(v.labels >= old, 1 - share, share) if balance == "abd" else 1.0
    return weights * losses.cross_entropy(logits, v.labels)

  def lwf(v: View) -> jax.Array:
    return old_prediction(v.teacher.logits[:real], v.student.logits[:real], old)

  def old_logits(v: View) -> jax.Array:
    return jnp.mean(jnp.abs(stop_gradient(v.teacher.logits[real:]) - v.student.logits[real:, :old]), axis=-1)

  def old_features(v: View) -> jax.Array:
    ours = through(v.memory[OLD_CLASSIFIER], v.student.pooled)
    return jnp.mean(jnp.square(stop_gradient(v.teacher.logits) - ours), axis=-1)

  def relation(v: View) -> jax.Array:
    maps = v.student_params["maps"]
    before = stop_gradient(v.teacher.pooled[:real]) @ maps["before"]
    return jnp.mean(jnp.abs(losses.angles(before) - losses.angles(v.student.pooled[:real] @ maps["now"])))

  values = (local, balanced, classifier, lwf, old_logits, old_features, relation, balanced)
  student = {
    name: _scaled(Term(value, couples_batch=value is relation), factor.get(name, 1.0))
    for name, value in zip(OWN, values, strict=True)
  }
  generator = {
    "confident": Term(lambda v: losses.confident(v.teacher.logits, CONFIDENT_TEMPERATURE)),
    "even": Term(lambda v: losses.even(v.teacher.logits), couples_batch=True),
    "moments": Term(lambda v: losses.moments_divergence(v.teacher.statistics), couples_batch=True),
    "smooth": Term(lambda v: losses.roughness(v.images)),
  }
  return {"generator": generator, "student": student}


def new_cross_entropy(logits: jax.Array, labels: jax.Array, old: int) -> jax.Array:
  """Cross-entropy (N,) of images of new classes among these alone; the first `old` logits are left out."""
  return losses.cross_entropy(logits[:, old:], labels - old)


def old_prediction(teacher: jax.Array, student: jax.Array, old: int) -> jax.Array:
  """Divergence (N,) of the student's old classes from the previous network (Li and Hoiem, TPAMI 2018, equation 2)."""
  return losses.kl(stop_gradient(teacher), student[:, :old], LWF_TEMPERATURE)


def through(layer: Tree, features: jax.Array) -> jax.Array:
  """Logits (N, C) of features (N, D)."""
  return features @ layer["kernel"] + layer.get("bias", 0.0)


def _scaled(term: Term, factor: float | Callable[[View], jax.Array]) -> Term:
  """A term times a number, or times what a view says."""

  def value(v: View) -> jax.Array:
    return (factor(v) if callable(factor) else factor) * term.value(v)

  return Term(value, term.couples_batch)


def method(config: Config, base: Method, iterations: int) -> Method:
  """The method's terms on old classes alone, the student's on drawn images alone; and which rest when."""
  c, old = config.incremental, config.incremental.known
  warmup = config.generator.warmup_epochs * iterations
  refinement = (config.schedule.epochs - c.refine) * iterations

  def on_old(term: Term) -> Term:
    def value(v: View) -> jax.Array:
      return term.value(v.replace(student=v.student.replace(logits=v.student.logits[:, :old])))

    return Term(value, term.couples_batch)

  def on_drawn(term: Term) -> Term:
    def value(v: View) -> jax.Array:
      v = v.replace(memory=None, student_params=None)
      parts = v.labels, v.teacher, v.student, v.targets
      names = "labels", "teacher", "student", "targets"
      cut = dict(zip(names, jax.tree.map(lambda x: x[c.batch_size :], parts), strict=True))
      return on_old(term).value(v.replace(**cut))

    return Term(value, term.couples_batch)

  def in_its_time(name: str, term: Term) -> Term:
    if not c.refine:
      return term
    late, early = name in REFINED, name != "refine"
    return _scaled(term, lambda v: jnp.where(v.memory["refining"], float(late), float(early)))

  student_terms = {name: term if name in OWN else on_drawn(term) for name, term in base.student_terms.items()}
  return dataclasses.replace(
    base,
    generator_terms={name: on_old(term) for name, term in base.generator_terms.items()},
    student_terms={name: in_its_time(name, term) for name, term in student_terms.items()},
    rests=(lambda state: state.step >= warmup) if c.rests else base.rests,
    begin=lambda state, key: _marked(base.begin(state, key), refinement),
  )


def _marked(state: State, refinement: int) -> State:
  return state.replace(memory={**state.memory, "refining": state.step >= refinement})


def begin(config: Config, setup: Setup, state: State, image_shape: tuple[int, int, int], teacher: Tree) -> State:
  """The classifier keeps the rows of the old classes; those of the new ones are as they were drawn."""
  if config.arm == "joint":
    return state
  net, old = setup.student.net, config.incremental.known
  bare, _ = nets.deployed(net, {})  # the teacher's net, but for the number of classes
  theirs = nets.classifier_layer(bare, teacher, image_shape)
  ours = nets.classifier_layer(net, state.student.variables, image_shape)
  grown = {name: leaf.at[..., :old].set(theirs[name]) for name, leaf in ours.items()}
  params = nets.with_classifier(state.student.params, nets.classifier_path(net, image_shape), grown)
  if needs_old_classifier(config):
    state = state.replace(memory={**state.memory, OLD_CLASSIFIER: jax.tree.map(jnp.copy, theirs)})
  return state.replace(student=state.student.replace(params=params))


def needs_old_classifier(config: Config) -> bool:
  return bool(config.loss.student.old_features) and config.arm not in ARMS


def optimiser(
  config: Config, tx: optax.GradientTransformation, steps: int, net: Any, image_shape: tuple[int, int, int]
) -> optax.GradientTransformation:
  """In refinement the classifier alone moves, by SGD at a rate of its own."""
  c = config.incremental
  if not c.refine or config.arm in ARMS:
    return tx
  epochs = config.schedule.epochs - methods.waiting_epochs(config) - c.refine
  late = optim.sgd(c.refine_lr, config.student.momentum, config.student.weight_decay)
  return optim.followed_by(epochs * steps, tx, optim.alone(late, nets.classifier_path(net, image_shape)))


def images(config: Config) -> int:
  """New classes' images, and samples or, of some control arms, kept images or none."""
  others = 0 if config.arm in ARMS and config.arm != "real_rehearsal" else config.schedule.batch_size
  return config.incremental.batch_size + others


def learning_rate(config: Config, epoch: jax.Array, rate: jax.Array) -> jax.Array:
  c = config.incremental
  refining = epoch > config.schedule.epochs - c.refine
  return jnp.where(refining, c.refine_lr, rate) if c.refine and config.arm not in ARMS else rate


def with_real(config: Config, setup: Setup, size: int, card: dict) -> Setup:
  """The setup with batches that begin with real images, of {"new": a split of `size` images, "kept": another or None}.

  Of the control arms it has the terms, too.
  """
  c, mesh, iterations = config.incremental, setup.mesh, config.schedule.iterations
  base, controlled = setup.method, config.arm in ARMS
  length, normalised = iterations * setup.student.steps * c.batch_size, (card["mean"], card["std"], mesh)
  parts = [sources.real(c.batch_size, *normalised, of=lambda data: data["new"])]
  if config.arm == "real_rehearsal":
    parts.append(sources.drawn(config.schedule.batch_size, *normalised, of=lambda data: data["kept"]))
  elif not controlled:
    parts.append(base.source)

  def init(key: jax.Array) -> tuple[dict, Tree]:
    trained, memory = ({}, {}) if controlled else base.init(key)
    return trained, {**memory, **sources.empty_order(length), "refining": jnp.zeros((), bool)}

  def begin(state: State, key: jax.Array) -> State:
    """New orders of the real images are drawn once in an epoch."""
    order = streams.key(key, Stream.ORDER)
    state = state if controlled else base.begin(state, key)
    again = state.step % iterations == 0
    return jax.lax.cond(again, lambda s: sources.shuffle(s, order, size), lambda s: s, state)

  source = sources.mixture(parts, mesh) if len(parts) > 1 else parts[0]
  if controlled:
    student_terms, weights = _of_arm(config)
    method = Method(generator_terms={}, student_terms=student_terms, source=source, init=init, begin=begin)
    method = methods.with_warmup(config, method, iterations)
    teacher = setup.teacher if config.arm == "lwf" else None
    # Parts of a batch are its two kinds of images, of which most arms have one.
    parts_of_norms = setup.student.norm_parts if config.arm == "real_rehearsal" else 1
    changed = {"method": method, "weights": {"student": weights}, "teacher": teacher, "generator": None}
    changed["student"] = dataclasses.replace(setup.student, norm_parts=parts_of_norms)
    return dataclasses.replace(setup, **changed)
  shardings = base.shardings
  if shardings:
    more = ("order", "position", "refining", *([OLD_CLASSIFIER] if needs_old_classifier(config) else []))
    shardings = shardings[0], {**shardings[1], **dict.fromkeys(more, replicated(mesh))}
  method = dataclasses.replace(base, source=source, init=init, begin=begin, shardings=shardings)
  return dataclasses.replace(setup, method=method)


def _of_arm(config: Config) -> tuple[dict[str, Term], dict[str, float]]:
  """(terms, weights) of a control arm."""
  old = config.incremental.known

  def lwf(v: View) -> jax.Array:
    return old_prediction(v.teacher.logits, v.student.logits, old)

  def local(v: View) -> jax.Array:
    return new_cross_entropy(v.student.logits, v.labels, old)

  if config.arm == "lwf":
    return {"local": Term(local), "lwf": Term(lwf)}, {"local": 1.0, "lwf": 1.0}
  return {"ce": shared.label_cross_entropy()}, {"ce": 1.0}


TASK = Task(
  in_phases=True,
  arms=("distill", "untrained_generator", *ARMS),
  check=check,
  known=known,
  of_teacher=of_teacher,
  student=student,
  terms=terms,
  method=method,
  optimiser=optimiser,
  learning_rate=learning_rate,
  begin=begin,
  with_real=with_real,
  images=images,
)
