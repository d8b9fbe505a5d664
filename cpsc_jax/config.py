"""From the config as given to the config that runs: the reference switch, and every check, before any work."""

import json
from typing import Any

import jax
import ml_collections
import numpy as np

from cpsc_jax import files, methods, nets, prior, schema, tasks
from cpsc_jax.datasets import Dataset
from cpsc_jax.errors import Refusal, first_line
from cpsc_jax.mesh import check_divisible, device_memory
from cpsc_jax.schema import REAL_ARMS, flatten
from cpsc_jax.setup import Player

Config = ml_collections.ConfigDict | ml_collections.FrozenConfigDict

# Keys in which a run may differ from the one that its folder was begun with: nothing that it finds depends on them.
FREE = ("dataset.data_dir", "evaluate.diagnostics_every", "evaluate.gradients")

EMBEDDINGS = ("classifier", "one_hot", "learned")
LARGEST_EMBEDDING = 2**30  # bytes of a file


def as_published(config: ml_collections.ConfigDict) -> None:
  """Sets what the published code of CPSC-DFKD does, with its weights and learning rates, in place."""
  generator = {"adversarial": 1.0, "ikd": 5.0, "bn": 1.0, "scl": 0.7, "ce": 0.7}
  student = {"kd": 1.0, "l2": 5.0, "ce": 0.7}
  for section, weights in ((config.loss.generator, generator), (config.loss.student, student)):
    section.update({**dict.fromkeys(section, 0.0), **weights})
  form = "log" if config.dataset.name == "cifar10" else "mse"
  config.precision = "float16" if config.precision == "auto" else config.precision
  config.loss_scaling = False
  config.loss.update({"scl_temperature": 0.07, "confidence": 1.0, "kd_temperature": 1.0, "double_softmax": True})
  config.loss.ikd_form = form
  config.generator.update({"lr": 1e-3, "b1": 0.5, "b2": 0.999, "optimiser": "restarted_adam", "conditional": True})
  config.generator.update({"crop_pad": 0, "flip": False, "label_limit": 100, "labels": "uniform", "clip": 0.0})
  config.generator.update({"prior": "uniform", "prior_shares": ""})
  config.generator.update({"output": "tanh", "init": "torch", "epsilon": 0.0})
  config.generator.update({"student_mode": "train", "stats_in_student_steps": True})
  config.student.update({"crop_pad": 0, "flip": False, "head": "frozen", "optimiser": "sgd", "decay_norms": True})
  resnet = config.student.net.startswith("resnet")
  config.student.update({"init": "torch" if resnet else "kaiming", "clip": 0.0, "lr_end": 0.0})
  config.student.update({"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "schedule": "published_steps"})
  config.student.inherit, config.pool.replay_share, config.generator.ema = False, 0.0, 0.0
  config.student.classifier, config.generator.between_share = "own", 0.0
  config.loss.update({"kl_classes": "sum", "kd_standardise": False})
  config.schedule.lr_batch_size, config.student.norm_parts = 0, 1
  config.teacher.schedule = "cosine_per_epoch"
  config.evaluate.headline = "best"


def resolve(
  config: Config, spec: Dataset, mesh: jax.sharding.Mesh, teacher: Any = None
) -> ml_collections.FrozenConfigDict:
  """A frozen copy of `config` with `reference` and `precision` carried out, after all of CHECKS.

  Args:
    spec: what is known about the data set.
    teacher: the teacher's module, if it is not the config's teacher.net.

  Raises:
    Refusal: names the key and how to mend it.
  """
  config = settled(config, "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16")
  for check in CHECKS:
    check(config, spec, mesh)
  teacher = teacher or nets.classifier(config.teacher.net, spec.num_classes)
  tasks.of(config).check_teacher(config, teacher, spec.image_shape)
  if config.generator.prior == "teacher" and not nets.has_statistics(teacher, spec.image_shape):
    raise Refusal(
      "config.generator.prior is 'teacher', which is estimated by batch norms, and the teacher has none; set it to"
      " 'given', with config.generator.prior_shares, or to another."
    )
  check_terms(config, spec, mesh, teacher)
  return ml_collections.FrozenConfigDict(config)


def settled(config: Config, precision: str) -> ml_collections.ConfigDict:
  """A copy with `reference` carried out, and `precision` in place of "auto"."""
  config = ml_collections.ConfigDict(config.to_dict())
  if config.reference and config.method == "cpsc":
    as_published(config)
  if config.precision == "auto":
    config.precision = precision
  return config


def check_values(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  schema.check(dict(flatten(config)))


def check_reference(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  if config.reference and config.method != "cpsc":
    raise Refusal(f"config.reference is CPSC-DFKD's; leave it False for method '{config.method}'.")


def check_schedule(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  if config.schedule.horizon and config.schedule.horizon < config.schedule.epochs:
    raise Refusal(
      f"config.schedule.horizon is {config.schedule.horizon}, shorter than the run's {config.schedule.epochs} epochs;"
      " make it longer, or 0 for learning rates that fall over the run."
    )


def check_warmup(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  """The generator's, which is to end; and that of a learning rate that follows a cosine, as others have none."""
  alone = config.generator.warmup_epochs
  if alone >= config.schedule.epochs:
    raise Refusal(
      f"config.generator.warmup_epochs is {alone}, and config.schedule.epochs is {config.schedule.epochs}: the student"
      " would never learn; make the warm-up shorter or the run longer."
    )
  epochs = {"student": (config.schedule.horizon or config.schedule.epochs) - tasks.waiting_epochs(config)}
  if not config.teacher.checkpoint:
    epochs["teacher"] = config.teacher.epochs
  for player, number in epochs.items():
    c = config[player]
    if c.schedule == "cosine" and c.warmup_epochs > number:
      raise Refusal(
        f"config.{player}.warmup_epochs is {c.warmup_epochs}, more than the {number} epochs over which its learning"
        " rate changes; make it shorter or the run longer."
      )


def check_task(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  task = tasks.of(config)
  if config.arm not in task.arms:
    raise Refusal(
      f"config.arm is '{config.arm}', which is none of task '{config.task}'; its arms are {', '.join(task.arms)}."
    )
  task.check(config, spec, mesh)


def check_nets(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  nets.classifier(config.teacher.net, spec.num_classes)
  nets.classifier(config.student.net, spec.num_classes)
  nets.generator(config.generator.net, spec.num_classes, spec.image_size, spec.channels, config.generator.width)


def check_batches(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  check_divisible(mesh, "config.schedule.batch_size", config.schedule.batch_size)
  for player, batch_size in (
    ("generator", config.schedule.batch_size),
    ("student", config.schedule.batch_size),
    ("teacher", config.teacher.batch_size),
  ):
    parts = config[player].micro_batches
    if batch_size % (parts * mesh.size) and parts > 1:
      raise Refusal(
        f"config.{player}.micro_batches is {parts}, which does not divide a batch of {batch_size} over {mesh.size}"
        " devices evenly; choose a divisor."
      )


def check_norm_parts(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  parts, made = config.student.norm_parts, config.pool.batch_size if inverts(config) else config.schedule.batch_size
  batches = [("schedule.batch_size", config.schedule.batch_size // config.student.micro_batches)]
  if config.generator.student_mode == "train":
    batches.append(("generator's batch", made // config.generator.micro_batches))
  for what, size in batches:
    if size % parts:
      raise Refusal(
        f"config.student.norm_parts is {parts}, which does not divide the {size} images that the student sees at a time"
        f" ({what}); choose a divisor."
      )


def check_method(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  methods.check(config, mesh)


def check_prior(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  """Refuses a prior of labels where these have no effect, or where a term asks for equal classes."""
  c, given = config.generator, f"config.generator.prior is '{config.generator.prior}'"
  if c.prior_shares and c.prior != "given":
    raise Refusal(f"config.generator.prior_shares is set, but {given}; set it to 'given', or prior_shares to nothing.")
  if c.prior == "uniform":
    return
  if not (c.conditional or inverts(config)):
    raise Refusal(
      f"{given}, but config.generator.conditional is False, so that labels have no effect on what method"
      f" '{config.method}' generates; set one of the two."
    )
  for term in ("balance", "even"):
    if config.loss.generator.get(term):
      raise Refusal(
        f"{given}, but the term config.loss.generator.{term} pulls towards equally many samples of all classes; set its"
        " weight to 0, or prior to 'uniform'."
      )
  if c.prior == "given":
    prior_shares(config, spec)


def prior_shares(config: Config, spec: Dataset) -> np.ndarray:
  """The given shares of the classes from which labels are drawn, (L,), sum 1.

  Raises:
    Refusal: no shares, or not one for each class.
  """
  shares = prior.read(config.generator.prior_shares)
  known = tasks.of(config).known(config, spec)
  in_a_phase = known < spec.num_classes  # of class-incremental learning, where shares are those of all classes to come
  if len(shares) < spec.num_classes or (len(shares) > spec.num_classes and not in_a_phase):
    raise Refusal(
      f"config.generator.prior_shares has {len(shares)} numbers, and '{config.dataset.name}' has {spec.num_classes}"
      " classes; give one number for each class."
    )
  number = min(config.generator.label_limit or known, known)
  if not shares[:number].max() > 0:
    raise Refusal(
      f"config.generator.prior_shares has nothing but 0 for the first {number} classes, from which labels are drawn;"
      " give one of them a share."
    )
  return prior.first(shares, number)


def check_embedding(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  kind = config.generator.embedding
  if kind and config.method != "nayer":
    raise Refusal(f"config.generator.embedding is '{kind}', which is method 'nayer' alone's; leave it empty.")
  if kind and kind not in EMBEDDINGS:
    if tasks.of(config).in_phases:
      raise Refusal(
        f"config.generator.embedding is '{kind}', a file with a row for each class, and each phase knows other classes;"
        f" choose one of {', '.join(EMBEDDINGS)}."
      )
    read_embedding(kind, spec.num_classes)


def read_embedding(path: str, num_classes: int) -> np.ndarray:
  """The user's embedding of classes from a .npy file: (num_classes, D) float32.

  Raises:
    Refusal: no such file, another shape, or numbers that are not finite.
  """
  needed = f"it must be one of {', '.join(EMBEDDINGS)}, or a .npy file with one row of numbers for each class"
  try:
    with files.opened(path, LARGEST_EMBEDDING) as file:
      rows = np.load(file, allow_pickle=False)
  except Exception as error:  # NumPy raises various types for damaged files
    raise Refusal(
      f"config.generator.embedding is '{path}', which cannot be read ({first_line(error)}); {needed}."
    ) from None
  if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[0] != num_classes or not rows.shape[1]:
    shape = getattr(rows, "shape", "no array")
    raise Refusal(f"config.generator.embedding is '{path}' of shape {shape}; {needed}, so ({num_classes}, width).")
  if not np.issubdtype(rows.dtype, np.floating) or not np.isfinite(rows).all():
    raise Refusal(f"config.generator.embedding is '{path}', whose numbers are not all finite; {needed}.")
  return rows.astype(np.float32)


def check_memory(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  """Refuses what cannot fit by the images alone, which is far less than a run needs; --dry-run measures that."""
  pixels, keeps = spec.image_size**2 * spec.channels, bool(config.pool.replay_share)
  inverting = inverts(config)
  needed = {
    "schedule.batch_size": 3 * 4 * config.schedule.batch_size * pixels,  # images, views and their gradient
    "pool.batch_size": 3 * 4 * config.pool.batch_size * pixels if inverting else 0,
    "pool.size": config.pool.size * pixels * (1 if config.pool.dtype == "uint8" else 4) if inverting or keeps else 0,
    "evaluate.samples_per_class": 4 * config.evaluate.samples_per_class * spec.num_classes * pixels * mesh.size,
    "evaluate.batch_size": 4 * config.evaluate.batch_size * pixels,
  }
  there = device_memory() * mesh.size
  for key, bytes_ in needed.items():
    section, _, name = key.partition(".")
    if bytes_ > there > 0:
      raise Refusal(
        f"config.{key} is {config[section][name]:,}, whose images of {spec.image_size} x {spec.image_size} x"
        f" {spec.channels} alone take {bytes_ / 2**30:,.0f} GiB, and there are {there / 2**30:,.0f} GiB on {mesh.size}"
        " device(s); make it smaller."
      )


def check_augmentation(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  players = ("student", "generator") if config.teacher.checkpoint else ("student", "generator", "teacher")
  for player in players:
    if config[player].flip and not spec.photographs:
      raise Refusal(
        f"config.{player}.flip must be False for '{config.dataset.name}': a flip changes the class of its images."
      )
    if config[player].crop_pad > spec.image_size:
      raise Refusal(
        f"config.{player}.crop_pad is {config[player].crop_pad}, but the images of '{config.dataset.name}' have"
        f" {spec.image_size} pixels; a crop may be padded by at most as many."
      )


def check_splits(config: Config, spec: Dataset, mesh: jax.sharding.Mesh) -> None:
  name = config.dataset.name
  if "train" not in spec.sizes:
    if not config.teacher.checkpoint:
      raise Refusal(
        f"data set '{name}' has no training split to train a teacher on; name a trained one in"
        " config.teacher.checkpoint (cpsc-jax convert makes it from PyTorch weights)."
      )
    if config.arm in REAL_ARMS:
      raise Refusal(f"data set '{name}' has no training split, which arm '{config.arm}' needs; choose another arm.")
    if config.evaluate.split == "validation":
      raise Refusal(
        f"data set '{name}' has no training split to hold a validation part out of; set config.evaluate.split to"
        " 'test'."
      )
    return
  train = spec.sizes["train"] - (spec.validation_size if config.evaluate.split == "validation" else 0)
  if not config.teacher.checkpoint:
    check_divisible(mesh, "config.teacher.batch_size", config.teacher.batch_size)
    if config.teacher.batch_size > train:
      raise Refusal(
        f"config.teacher.batch_size is {config.teacher.batch_size}, more than the {train} training images of '{name}'."
      )


def check_terms(config: Config, spec: Dataset, mesh: jax.sharding.Mesh, teacher: Any) -> None:
  """Every weight has its term, and the nets have what the terms compare.

  Stages must be as many for `channel` and of the same size for `attention`; `activation` needs unscaled features.
  """
  student, generator = config.loss.student, config.loss.generator
  nobody = Player(net=None, optimiser=None, steps=0)  # the terms do not depend on the generator
  head = config.student.micro_batches > 1 and has_trained_head(config, spec, teacher)
  more = tasks.of(config).terms(config, None, spec.image_shape, spec.num_classes)
  methods.method(methods.Parts(config, None, nobody, teacher, spec.image_shape, mesh, trained_head=head, more=more))
  same_width = student.features or config.student.classifier == "teacher"
  if same_width and len(feature_widths(config, spec, teacher)) == 2:
    key = "loss.student.features" if student.features else "student.classifier"
    raise Refusal(
      f"config.{key} is {student.features or 'teacher'}, which needs a student whose last features are as wide as the"
      f" teacher's; those of {config.student.net} are not. Leave it as it is by default or choose another"
      " config.student.net."
    )
  if not (student.channel or student.attention or student.triplet or generator.triplet or generator.activation):
    return  # tracing two nets takes seconds where they are deep
  ours = nets.output_shapes(nets.classifier(config.student.net, spec.num_classes), spec.image_shape)
  theirs, teacher_name = nets.output_shapes(teacher, spec.image_shape), getattr(teacher, "name", None) or "the teacher"
  teacher_name = config.teacher.net if teacher_name == "the teacher" and not config.teacher.checkpoint else teacher_name
  sizes = [[stage.shape[1:-1] for stage in output.stages] for output in (ours, theirs)]
  for term, fit in (("channel", len(sizes[0]) == len(sizes[1])), ("attention", sizes[0] == sizes[1])):
    if student[term] and not fit:
      raise Refusal(
        f"config.loss.student.{term} compares stages, and those of {config.student.net} {sizes[0]} do not match"
        f" those of {teacher_name} {sizes[1]}; set it to 0 or choose another config.student.net."
      )
  for player, output, net in (("student", ours, config.student.net), ("generator", theirs, teacher_name)):
    if config.loss[player].triplet and not output.stages:
      raise Refusal(f"config.loss.{player}.triplet needs the stages of {net}, which publishes none; set it to 0.")
  if generator.activation and theirs.pooled is None:
    raise Refusal(
      f"config.loss.generator.activation needs `Output.pooled`, which {teacher_name} does not publish; build its output"
      " by nets.outputs or set the weight to 0."
    )


def has_trained_head(config: Config, spec: Dataset, teacher: Any) -> bool:
  """Whether the student is given a feature head that learns, because its features are not as wide as the teacher's."""
  return config.student.head == "trained" and len(feature_widths(config, spec, teacher)) == 2


def feature_widths(config: Config, spec: Dataset, teacher: Any) -> set[int]:
  """How wide the last features of student and teacher are: one number if they agree."""
  student = nets.classifier(config.student.net, spec.num_classes)
  return {nets.feature_width(net, spec.image_shape) for net in (student, teacher)}


CHECKS = (
  check_values,
  check_reference,
  check_schedule,
  check_task,
  check_nets,
  check_batches,
  check_norm_parts,
  check_memory,
  check_method,
  check_warmup,
  check_prior,
  check_embedding,
  check_augmentation,
  check_splits,
)


def inverts(config: Config) -> bool:
  """Whether the config's method fits a new generator in every iteration."""
  return getattr(methods.METHODS[config.method], "INVERTS", False)


def dump(config: Config) -> str:
  """The config as indented JSON with sorted keys."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def changes(config: Config) -> dict[str, list]:
  """{dotted key: [default, value]} of what a config has other than the default, but for its name; None: no default."""
  ours, known = (
    dict(flatten(json.loads(dump(config)))),
    json.loads(json.dumps(dict(flatten(schema.defaults().to_dict())))),
  )
  return {
    key: [known.get(key), value]
    for key, value in sorted(ours.items())
    if key != "name" and (key not in known or value != known[key])
  }


def differences(config: Config, saved: dict) -> list[str]:
  """The dotted keys that differ between a config and a `dump` read back; those of FREE do not count.

  A key that the dump lacks, of a program that did not know it yet, counts as its default: what was done without it.
  """
  ours, theirs = dict(flatten(json.loads(dump(config)))), dict(flatten(saved))
  known = json.loads(
    json.dumps({name: key.default for name, key in schema.keys_of(config.method, config.task).items()})
  )
  return sorted(
    k for k in ours.keys() | theirs.keys() if k not in FREE and ours.get(k, ...) != theirs.get(k, known.get(k, ...))
  )
