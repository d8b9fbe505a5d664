"""From the config as given to the config that runs: the reference switch, and what can be refused at once."""

import json

import ml_collections

from cpsc_jax import datasets, methods, nets
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import check_divisible

REAL_ARMS = ("real_kd", "real_labels")
ARMS = ("distill", "untrained_generator", *REAL_ARMS)
PRECISIONS = ("float32", "bfloat16", "float16")
CHOICES = {
  "arm": ARMS,
  "precision": PRECISIONS,
  "loss.ikd_form": ("mse", "log"),
  "loss.contrast": ("dense", "blockwise"),
  "generator.schedule": ("steps", "cosine"),
  "method": tuple(methods.METHODS),
}
POSITIVE = (
  "teacher.epochs",
  "teacher.batch_size",
  "student.steps",
  "generator.steps",
  "generator.latent_dim",
  "generator.width",
  "schedule.epochs",
  "schedule.iterations",
  "schedule.batch_size",
  "evaluate.every",
  "evaluate.batch_size",
  "evaluate.samples_per_class",
  "checkpoint.every",
  "checkpoint.minutes",
  "loss.temperature",
  "loss.contrast_block",
  "loss.kd_temperature",
  "loss.views.temperature",
  "loss.views.negatives",
  "loss.views.width",
  "pool.size",
  "pool.batch_size",
  "pool.bank",
)


def as_published(config):
  """Turns on every quirk, and the weights and learning rates of the published code, in place."""
  for quirk in config.quirks:
    config.quirks[quirk] = True
  generator = {"adversarial": 1.0, "ikd": 5.0, "bn": 1.0, "scl": 0.7, "ce": 0.7}
  student = {"kd": 1.0, "l2": 5.0, "ce": 0.7}
  for section, weights in ((config.loss.generator, generator), (config.loss.student, student)):
    section.update({**dict.fromkeys(section, 0.0), **weights})
  config.loss.temperature, config.loss.confidence, config.loss.kd_temperature = 0.07, 1.0, 1.0
  config.loss.ikd_form = "log" if config.dataset.name == "cifar10" else "mse"
  config.generator.update({"lr": 1e-3, "b1": 0.5, "b2": 0.999, "conditional": True, "crop_pad": 0, "flip": False})
  config.student.update({"crop_pad": 0, "flip": False, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})


def resolve(config, mesh):
  """A frozen copy of `config` with `reference` and `half_precision` carried out, checked as far as possible offline.

  Raises:
    Refusal: names the key and the mend.
  """
  config = ml_collections.ConfigDict(config.to_dict())
  if config.reference and config.method != "cpsc":
    raise Refusal(f"config.reference is CPSC-DFKD's; leave it False for method '{config.method}'.")
  if config.reference:
    as_published(config)
  if config.quirks.half_precision:
    config.precision = "float16"
  flat = dict(_flatten(config))
  for key, allowed in CHOICES.items():
    if flat[key] not in allowed:
      raise Refusal(f"config.{key} is '{flat[key]}'; it must be one of {', '.join(allowed)}.")
  for key in POSITIVE:
    if flat[key] <= 0:
      raise Refusal(f"config.{key} is {flat[key]}; it must be greater than 0.")
  if config.schedule.horizon and config.schedule.horizon < config.schedule.epochs:
    raise Refusal(
      f"config.schedule.horizon is {config.schedule.horizon}, shorter than the run's {config.schedule.epochs} epochs;"
      " make it longer, or 0 for learning rates that fall over the run."
    )
  spec = datasets.describe(config.dataset.name, config.dataset.data_dir)
  nets.classifier(config.teacher.net, spec.num_classes)
  nets.classifier(config.student.net, spec.num_classes)
  nets.generator(config.generator.net, spec.num_classes, spec.image_size, spec.channels, config.generator.width)
  check_divisible(mesh, "config.schedule.batch_size", config.schedule.batch_size)
  method = methods.method(config)
  if method.inverts:
    check_pool(config, method, mesh)
  elif config.generator.net == "pixels":
    raise Refusal(f"config.generator.net 'pixels' has nothing to train; method '{config.method}' needs a generator.")
  for player in ("student", "generator"):
    if config[player].flip and not spec.photographs:
      raise Refusal(
        f"config.{player}.flip must be False for '{config.dataset.name}': its classes do not survive a flip."
      )
  if "train" not in spec.sizes and not config.teacher.checkpoint:
    raise Refusal(
      f"data set '{config.dataset.name}' has no training split to train a teacher on; name a trained one in"
      " config.teacher.checkpoint (python -m cpsc_jax.convert makes it from PyTorch weights)."
    )
  if "train" not in spec.sizes and config.arm in REAL_ARMS:
    raise Refusal(
      f"config.arm '{config.arm}' trains on real images, but data set '{config.dataset.name}' has no training split."
    )
  if not config.teacher.checkpoint:
    check_divisible(mesh, "config.teacher.batch_size", config.teacher.batch_size)
    if config.teacher.batch_size > spec.sizes["train"]:
      raise Refusal(
        f"config.teacher.batch_size exceeds the {spec.sizes['train']} training images of '{config.dataset.name}'."
      )
    if config.teacher.flip and not spec.photographs:
      raise Refusal(
        f"config.teacher.flip must be False for '{config.dataset.name}': its classes do not survive a flip."
      )
  return ml_collections.FrozenConfigDict(config)


def check_pool(config, method, mesh):
  """Raises a Refusal unless the section `pool` makes sense for a method that inverts."""
  batch = config.pool.batch_size
  check_divisible(mesh, "config.pool.batch_size", batch)
  for key in ("size", "bank") if method.critic else ("size",):
    if config.pool[key] % batch:
      raise Refusal(
        f"config.pool.{key} is {config.pool[key]}; set it to a multiple of config.pool.batch_size, {batch}."
      )
  if method.critic and config.loss.views.negatives > config.pool.bank:
    raise Refusal(
      f"config.loss.views.negatives is {config.loss.views.negatives}; the bank holds {config.pool.bank}: draw no more,"
      " or enlarge config.pool.bank."
    )


def check_stages(config, teacher):
  """Raises a Refusal unless the terms that compare stages can compare those of a teacher net, by name, and the student.

  Stages must be as many for `channel` and of the same size for `attention`; `activation` needs unscaled features.
  """
  student, generator = config.loss.student, config.loss.generator
  if not (student.channel or student.attention or generator.activation):
    return  # tracing two nets takes seconds where they are deep
  spec = datasets.describe(config.dataset.name, config.dataset.data_dir)
  shapes = lambda name: nets.output_shapes(nets.classifier(name, spec.num_classes), spec.image_shape)
  ours, theirs = shapes(config.student.net), shapes(teacher)
  sides = lambda output: [stage.shape[1:3] for stage in output.stages]
  for term, fit in (
    ("channel", len(ours.stages) == len(theirs.stages)),
    ("attention", sides(ours) == sides(theirs)),
  ):
    if student[term] and not fit:
      raise Refusal(
        f"config.loss.student.{term} compares stages, and those of {config.student.net} {sides(ours)} do not match"
        f" those of {teacher} {sides(theirs)}; set it to 0 or choose another config.student.net."
      )
  if generator.activation and theirs.pooled is None:
    raise Refusal(
      f"config.loss.generator.activation needs `Output.pooled`, which {teacher} does not give; build its output by"
      " nets.outputs or set the weight to 0."
    )


def override(config, key, value):
  """A frozen copy of `config` with one dotted key changed."""
  copy = ml_collections.ConfigDict(config.to_dict())
  copy.update_from_flattened_dict({key: value})
  return ml_collections.FrozenConfigDict(copy)


def dump(config):
  """The config as indented JSON with sorted keys."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def differences(config, saved):
  """The dotted keys that differ between a config and a `dump` read back; the place of the data does not count."""
  ours, theirs = dict(_flatten(json.loads(dump(config)))), dict(_flatten(saved))
  return sorted(
    k for k in ours.keys() | theirs.keys() if k != "dataset.data_dir" and ours.get(k, ...) != theirs.get(k, ...)
  )


def _flatten(tree, prefix=""):
  for key, value in tree.items():
    if isinstance(value, dict | ml_collections.ConfigDict):
      yield from _flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value
