"""The configs: complete, explained, locked, cifar100 as published, reference mode, and every refusal."""

import json
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY
from cpsc_jax.configs import (
  cifar10,
  cifar100,
  cmi_cifar10,
  dafl_cifar10,
  deepinversion_cifar10,
  default,
  dfad_cifar10,
  digits,
  fast_cifar10,
  nayer_cifar10,
  photos,
  rgal_cifar10,
  tiny_imagenet,
  zskt_cifar10,
)

from cpsc_jax import config as configs
from cpsc_jax import datasets, describe, optim, schema
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import make_mesh

MODULES = {"cifar10": cifar10, "cifar100": cifar100, "digits": digits, "tiny_imagenet": tiny_imagenet}
OTHER_METHODS = {
  "cmi": cmi_cifar10,
  "dafl": dafl_cifar10,
  "deepinversion": deepinversion_cifar10,
  "dfad": dfad_cifar10,
  "fast": fast_cifar10,
  "nayer": nayer_cifar10,
  "rgal": rgal_cifar10,
  "zskt": zskt_cifar10,
}
METHODS = {"cpsc": default, **OTHER_METHODS}
TEST_ONLY = datasets.Dataset(10, 8, 1, (0.3,), (0.4,), {"test": 454}, photographs=False)


def resolve(config, spec=None, devices=1):
  spec = spec or datasets.find(config.dataset.name, "").spec
  return configs.resolve(config, spec, make_mesh(jax.devices()[:devices]))


def changed(**values):
  """The digits config with some keys set, written as student__lr=0.1."""
  config = digits.get_config()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in values.items()})
  return config


def keys_of(config):
  return dict(schema.flatten(config)).keys()


def test_on_two_cores_every_student_learns_alike():
  """Same nets, batch, augmentation and optimiser; what differs is the method's, and the rate chosen for CPSC-DFKD."""
  every = [module.get_config("cpu") for module in (cifar10, *OTHER_METHODS.values())]
  resolve(every[0])
  for config in every[1:]:
    ours, theirs = (dict(schema.flatten(c.student)) | {"steps": 0, "lr": 0} for c in (every[0], config))
    assert ours == theirs and config.schedule.batch_size == every[0].schedule.batch_size
    assert config.teacher.net == "wrn_16_1" and config.evaluate.every == every[0].evaluate.every
  assert [c.student.lr for c in every] == [0.05] + [0.1] * len(OTHER_METHODS)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("variant", ["", "smoke"])
def test_the_settings_for_photographs_of_ones_own(variant, size):
  """They fit any number of classes and both sizes, and begin with a teacher that they train."""
  config = photos.get_config(variant)
  spec = datasets.Dataset(7, size, 3, (0.5,) * 3, (0.25,) * 3, {"train": 20_000, "test": 500})
  resolve(config, spec)
  assert config.student.inherit and not config.teacher.checkpoint
  assert variant or (config.teacher.net, config.student.net) == ("wrn_16_2", "wrn_16_1")


def test_cifar100_on_two_cores_is_cifar10_with_other_nets():
  ours, theirs = (dict(schema.flatten(module.get_config("cpu"))) for module in (cifar100, cifar10))
  differ = {key for key in ours if ours[key] != theirs[key]}
  assert differ == {"name", "dataset.name", "teacher.net", "student.net", "loss.ikd_form"}
  resolve(cifar100.get_config("cpu"))


@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("name", MODULES)
def test_config_is_complete_and_resolves(name, variant):
  config = MODULES[name].get_config(variant)
  assert keys_of(config) == keys_of(default.get_config())
  assert config.is_locked and config.student.is_locked
  assert config.name == name + ("_smoke" if variant else "")
  resolve(config)


@pytest.mark.parametrize("variant", ["", "smoke", "digits", "digits_smoke", "cpu"])
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_config_of_another_method_is_complete_and_resolves(method, variant):
  config = OTHER_METHODS[method].get_config(variant)
  assert keys_of(config) == schema.keys_of(method).keys()
  assert config.is_locked and config.student.is_locked and config.pool.is_locked
  assert config.method == method and config.dataset.name == ("digits" if "digits" in variant else "cifar10")
  resolve(config)


def test_every_key_is_explained_and_in_a_section():
  for method in METHODS:
    for name, key in schema.keys_of(method).items():
      assert len(key.meaning) > 3 and schema.kind_of(key), name
      assert schema.section_of(name) in schema.SECTIONS, name
    assert keys_of(METHODS[method].get_config()) == schema.keys_of(method).keys()


def test_the_page_of_keys_is_up_to_date():
  """python -m cpsc_jax.describe > docs/config.md"""
  page = (REPOSITORY / "docs" / "config.md").read_text()
  assert page == describe.page()
  assert all(f"| `{name}` |" in page for method in METHODS for name in schema.keys_of(method))


@pytest.mark.parametrize(("platform", "precision"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")])
def test_precision_is_that_of_the_devices_unless_it_is_given(platform, precision):
  config, spec = digits.get_config(), datasets.find("digits", "").spec
  mesh = types.SimpleNamespace(size=1, devices=np.array([types.SimpleNamespace(platform=platform)]))
  assert config.precision == "auto" and configs.resolve(config, spec, mesh).precision == precision
  config.precision = "float16"
  assert configs.resolve(config, spec, mesh).precision == "float16"


@pytest.mark.parametrize(
  ("key", "value", "images"),
  [
    ("schedule.batch_size", 2**20, 12),
    ("evaluate.batch_size", 2**20, 4),
    ("evaluate.samples_per_class", 2**20, 40),
    ("pool.size", 10**9, 1),
  ],
)
def test_what_no_memory_holds_is_refused_before_any_work(monkeypatch, key, value, images):
  """`images` bytes for each of the 64 pixels of a digit and each one of `value`."""
  config = digits.get_config()
  config.update_from_flattened_dict({key: value, "pool.dtype": "uint8"})
  config.pool.replay_share = 0.5 if key == "pool.size" else 0.0
  monkeypatch.setattr(configs, "device_memory", lambda: images * 64 * value)
  resolve(config)
  monkeypatch.setattr(configs, "device_memory", lambda: images * 64 * value - 1)
  with pytest.raises(Refusal, match=rf"config.{key} is {value:,}, whose images of 8 x 8 x 1 alone take"):
    resolve(config)
  monkeypatch.setattr(configs, "device_memory", lambda: 0)  # not known
  resolve(config)


def test_resolving_freezes_a_copy():
  config = digits.get_config()
  before = config.to_json()
  resolved = resolve(config)
  assert config.to_json() == before
  with pytest.raises(AttributeError):
    resolved.seed = 3
  config.precision = "float32"  # on a CPU
  assert configs.dump(resolved) == configs.dump(config)


def test_cifar100_is_the_published_schedule():
  c = cifar100.get_config()
  assert (c.teacher.net, c.student.net) == ("resnet34", "resnet18")
  assert (c.schedule.epochs, c.schedule.iterations, c.schedule.batch_size) == (600, 50, 512)
  assert (c.generator.steps, c.student.steps) == (6, 5)
  assert (c.generator.latent_dim, c.generator.lr, c.generator.b1, c.generator.b2) == (256, 1e-3, 0.5, 0.999)
  assert (c.student.lr, c.student.momentum, c.student.weight_decay, c.student.warmup_epochs) == (0.1, 0.9, 5e-4, 10)
  assert (c.teacher.epochs, c.teacher.batch_size, c.teacher.lr, c.teacher.crop_pad, c.teacher.flip) == (
    100,
    32,
    0.1,
    4,
    True,
  )
  g, s = c.loss.generator, c.loss.student
  assert (g.adversarial, g.ikd, g.bn, g.scl, g.ce) == (1.0, 5.0, 1.0, 0.7, 0.7)
  assert (s.kd, s.l2, s.ce) == (1.0, 5.0, 0.7)


PUBLISHED = {
  "precision": "float16",
  "loss_scaling": False,
  "loss.double_softmax": True,
  "loss.ikd_form": "mse",
  "loss.scl_temperature": 0.07,
  "loss.confidence": 1.0,
  "loss.kd_temperature": 1.0,
  "generator.optimiser": "restarted_adam",
  "generator.student_mode": "train",
  "generator.stats_in_student_steps": True,
  "generator.label_limit": 100,
  "generator.conditional": True,
  "generator.lr": 1e-3,
  "generator.b1": 0.5,
  "generator.b2": 0.999,
  "generator.crop_pad": 0,
  "generator.flip": False,
  "student.head": "frozen",
  "student.schedule": "published_steps",
  "student.optimiser": "sgd",
  "student.decay_norms": True,
  "student.lr": 0.1,
  "student.momentum": 0.9,
  "student.weight_decay": 5e-4,
  "student.crop_pad": 0,
  "student.flip": False,
  "teacher.schedule": "cosine_per_epoch",
  "evaluate.headline": "best",
  # options of other methods, all off
  "student.clip": 0.0,
  "student.inherit": False,
  "student.classifier": "own",
  "student.lr_end": 0.0,
  "generator.clip": 0.0,
  "generator.ema": 0.0,
  "generator.between_share": 0.0,
  "generator.epsilon": 0.0,
  "generator.output": "tanh",
  "generator.init": "torch",
  "generator.labels": "uniform",
  "generator.prior": "uniform",
  "generator.prior_shares": "",
  "pool.replay_share": 0.0,
  "loss.kd_standardise": False,
  "loss.kl_classes": "sum",
}
# The options under which the published code's behaviour is not that of the paper, and what they are otherwise.
OUR_DEFAULTS = {
  "precision": "auto",
  "loss_scaling": True,
  "loss.double_softmax": False,
  "loss.triplet.swapped": True,
  "generator.optimiser": "adam",
  "generator.student_mode": "eval",
  "generator.stats_in_student_steps": False,
  "generator.label_limit": 0,
  "student.head": "trained",
  "student.schedule": "cosine",
  "teacher.schedule": "cosine",
  "evaluate.headline": "last",
}


def other_than(value):
  """A value of the same kind as one in PUBLISHED, for keys that are not words."""
  return value + 1 if type(value) in (int, float) else not value


def test_reference_sets_every_published_option():
  """Whatever they were before; the config itself stays as it is."""
  config = digits.get_config()
  config.reference = True
  others = {key: other_than(value) for key, value in PUBLISHED.items() if not isinstance(value, str)}
  others["student.flip"] = others["generator.flip"] = True
  weights = {key: 0.25 for key in keys_of(config) if key.startswith(("loss.generator.", "loss.student."))}
  words = {"loss.ikd_form": "log", "student.optimiser": "adamw", "loss.kl_classes": "mean"}
  words |= {"generator.output": "sigmoid", "generator.init": "normal", "generator.labels": "balanced"}
  words |= {"generator.prior": "given", "generator.prior_shares": "1,2"}
  config.update_from_flattened_dict(others | weights | words)
  before = config.to_json()
  resolved = dict(schema.flatten(resolve(config)))
  assert {key: resolved[key] for key in PUBLISHED} == PUBLISHED
  weights = {key: weight for key, weight in resolved.items() if key in weights and weight}
  assert weights == {
    "loss.generator.adversarial": 1.0,
    "loss.generator.ikd": 5.0,
    "loss.generator.bn": 1.0,
    "loss.generator.scl": 0.7,
    "loss.generator.ce": 0.7,
    "loss.student.kd": 1.0,
    "loss.student.l2": 5.0,
    "loss.student.ce": 0.7,
  }
  touched = {key for key, value in schema.flatten(config) if resolved[key] != value}
  assert touched <= PUBLISHED.keys() | {k for k in resolved if k.startswith(("loss.generator.", "loss.student."))}
  assert config.to_json() == before, "resolving must not touch the config it was given"


def test_reference_keeps_a_precision_that_is_given():
  config = digits.get_config()
  config.reference, config.precision = True, "bfloat16"
  assert resolve(config).precision == "bfloat16"


def test_reference_has_the_logarithmic_form_on_cifar10():
  config = digits.get_config()
  config.reference, config.dataset.name = True, "cifar10"
  assert resolve(config).loss.ikd_form == "log"


def test_without_reference_nothing_published_is_on():
  config = dict(schema.flatten(default.get_config()))
  assert {key: config[key] for key in OUR_DEFAULTS} == OUR_DEFAULTS and not config["reference"]
  resolved = dict(schema.flatten(resolve(cifar100.get_config())))
  assert {key: resolved[key] for key in OUR_DEFAULTS} == OUR_DEFAULTS | {"precision": "float32"}


@pytest.mark.parametrize(
  ("key", "value", "word"),
  [
    ("arm", "kd", "untrained_generator"),
    ("method", "dafl2", "cpsc"),
    ("precision", "float8", "bfloat16"),
    ("dataset.name", "mnist", "cifar100"),
    ("teacher.net", "resnet9", "resnet18"),
    ("student.net", "wrn_16", "wrn_D_K"),
    ("generator.net", "biggan", "dcgan"),
    ("generator.net", "dcgan", "divisible by 16"),
    ("schedule.epochs", 0, "at least 1 and at most 1,000,000,000"),
    ("schedule.horizon", 19, "shorter than the run"),
    ("teacher.batch_size", 5000, "1343"),
    ("teacher.flip", True, "flip"),
    ("student.flip", True, "config.student.flip must be False for 'digits'"),
    ("generator.flip", True, "config.generator.flip must be False for 'digits'"),
    ("loss.ikd_form", "l1", "mse"),
    ("loss.scl_form", "blocks", "dense, blockwise"),
    ("generator.schedule", "linear", "steps, cosine"),
    ("generator.optimiser", "sgd", "adam, restarted_adam"),
    ("generator.student_mode", "test", "eval, train"),
    ("generator.label_limit", -1, "at least 0"),
    ("generator.micro_batches", 0, "at least 1"),
    ("student.optimiser", "rmsprop", "sgd, adam, adamw"),
    ("student.schedule", "cosine_per_epoch", "cosine, published_steps"),
    ("student.head", "none", "trained, frozen"),
    ("student.micro_batches", 3, "does not divide a batch of 64"),
    ("teacher.optimiser", "rmsprop", "sgd, adam, adamw"),
    ("teacher.schedule", "published_steps", "cosine, cosine_per_epoch"),
    ("teacher.micro_batches", 3, "does not divide a batch of 64"),
    ("evaluate.split", "train", "test, validation"),
    ("evaluate.headline", "first", "last, best"),
    ("loss.scl_temperature", 0.0, "greater than 0"),
    ("loss.scl_block", 0, "at least 1"),
    ("student.crop_pad", 9, "the images of 'digits' have 8 pixels"),
    ("teacher.crop_pad", 9, "the images of 'digits' have 8 pixels"),
    ("student.warmup_epochs", 61, "more than the 20 epochs over which its learning rate changes"),
    ("teacher.warmup_epochs", 61, "more than the 40 epochs over which its learning rate changes"),
    ("student.milestones", ("a",), "in increasing order"),
    ("generator.milestones", (20, 10), "in increasing order"),
    ("teacher.milestones", (0, 10), "whole numbers from 1 on"),
    ("loss.student.channel", 1.0, "no such term"),
    ("loss.generator.one_hot", 1.0, "no such term"),
  ],
)
def test_bad_values_are_refused(key, value, word):
  config = digits.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(Refusal, match=word):
    resolve(config)


class Thing:
  def __str__(self):
    return "a thing\nof two lines"


WRONG = {  # by type: values that no key of it may have
  bool: [0, 1, 2.0, math.nan, "yes", "", None, (), [True], {}],
  int: [True, 1.5, math.nan, math.inf, -math.inf, "1", "", None, (1,), {}, -1, 10**30],
  float: [True, math.nan, math.inf, -math.inf, -1.0, 1e31, "0.1", "", None, (0.1,), {}],
  str: [0, 1.5, math.nan, True, None, (), ["cpsc"], {}, "a\nb", "\x00", "\x1b[31m", Thing()],
  tuple: [5, 1.5, None, "5", True, {}, (0,), (-1,), (2.5,), ("a",), (True,), (10, 5), (5, 5), (math.nan,), (10**30,)],
}


def wrong(key):
  """Values that a key must not have: of other types, out of range, next to its ends, or no choice of it."""
  values = list(WRONG[type(key.default)])
  if isinstance(key.allowed, tuple):
    values += ["nonsense", "", key.default.upper(), f" {key.default}", f"{key.default},"]
  if isinstance(key.allowed, schema.Range):
    allowed, whole = key.allowed, isinstance(key.default, int)
    values += [allowed.low - 1, allowed.high + 1] if whole else []
    if not whole:
      values += [math.nextafter(allowed.low, -math.inf), math.nextafter(allowed.high, math.inf)]
    values += [end for end, is_open in ((allowed.low, allowed.low_open), (allowed.high, allowed.high_open)) if is_open]
  return values


def right(key):
  """The default, all choices, both ends of a range that belong to it, and what lies between."""
  if isinstance(key.allowed, tuple):
    return [key.default, *key.allowed]
  if isinstance(key.allowed, schema.Range):
    low, high = key.allowed.low, key.allowed.high
    ends = [end for end, is_open in ((low, key.allowed.low_open), (high, key.allowed.high_open)) if not is_open]
    return [key.default, *ends, (low + high) // 2 if isinstance(key.default, int) else (low + high) / 2]
  return [
    key.default,
    *{bool: [True, False], str: ["", "a folder/é"], tuple: [(), (1,), (1, 10**9), [3, 5]]}[type(key.default)],
  ]


EVERY_KEY = [("cpsc", name) for name in schema.KEYS]
EVERY_KEY += [(method, name) for method, own in schema.KEYS_OF.items() for name in own]


@pytest.mark.parametrize(("method", "name"), EVERY_KEY)
def test_what_a_key_must_not_be_is_refused_and_what_it_may_be_is_not(method, name):
  """In one sentence that names the key, whatever a user's own config file holds."""
  config = dict(schema.flatten(METHODS[method].get_config()))
  key = schema.keys_of(method)[name]
  assert len(wrong(key)) >= 8
  for value in wrong(key):
    with pytest.raises(Refusal, match=rf"^config\.{re.escape(name)} is .*; it must be .+\.$") as refused:
      schema.check(config | {name: value})
    assert str(refused.value).isprintable() and len(str(refused.value)) < 400
  for value in right(key):
    if name not in ("method", "task"):  # others have keys of their own
      schema.check(config | {name: value})
  with pytest.raises(Refusal, match=f"the config has no key '{re.escape(name)}'; start from "):
    schema.check({k: value for k, value in config.items() if k != name})


def test_the_refusals_are_many():
  assert sum(len(wrong(schema.keys_of(method)[name])) for method, name in EVERY_KEY) >= 700


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_of_other_keys_must_be_finite(value):
  config = dict(schema.flatten(digits.get_config()))
  schema.check(config | {"mine.factor": -3.0})
  with pytest.raises(Refusal, match="config.mine.factor is .*; it must be a finite number"):
    schema.check(config | {"mine.factor": value})


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("student.lr", -0.1),
    ("teacher.label_smoothing", 2.0),
    ("loss.confidence", math.nan),
    ("checkpoint.minutes", math.nan),
    ("student.crop_pad", -1),
    ("seed", 999999999999999999999),
    ("evaluate.samples_per_class", 1000000000),
    ("schedule.batch_size", 10000000000),
  ],
)
def test_resolving_looks_at_numbers(key, value):
  config = digits.get_config()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(Refusal, match=rf"config.{key} is {value}; it must be"):
    resolve(config)


@pytest.mark.parametrize(("player", "term"), [("student", "head"), ("generator", "bn"), ("generator", "scl")])
def test_micro_batches_are_refused_for_terms_that_couple_the_batch(player, term):
  """The student of another width has a feature head, whose term is a contrast."""
  config = changed(student__net="wrn_10_2") if term == "head" else changed()
  for name in config.loss[player]:
    config.loss[player][name] = 1.0 if name == term else 0.0
  config[player].micro_batches = 2
  with pytest.raises(Refusal, match=rf"config.{player}.micro_batches is 2, but the term config.loss.{player}.{term} "):
    resolve(config)
  config.loss[player][term] = 0.0
  resolve(config)


def test_micro_batches_and_devices():
  config = changed(student__micro_batches=4, loss__ikd_form="mse")
  assert resolve(config).student.micro_batches == 4
  with pytest.raises(Refusal, match="which does not divide a batch of 64 over 8 devices evenly"):
    configs.check_batches(changed(student__micro_batches=16), TEST_ONLY, EightDevices())


class EightDevices:
  """What the checks need of a mesh."""

  size = 8


def test_data_without_a_training_split_are_refused_what_needs_one():
  given = {"teacher__checkpoint": "somewhere"}
  assert resolve(changed(**given), TEST_ONLY).evaluate.split == "test"
  for values, word in (
    ({}, r"no training split to train a teacher on; .*config.teacher.checkpoint \(cpsc-jax convert"),
    ({**given, "arm": "real_kd"}, "no training split, which arm 'real_kd' needs"),
    ({**given, "arm": "real_labels"}, "no training split, which arm 'real_labels' needs"),
    ({**given, "evaluate__split": "validation"}, "no training split to hold a validation part out of"),
  ):
    with pytest.raises(Refusal, match=word):
      resolve(changed(**values), TEST_ONLY)


def test_a_validation_part_leaves_fewer_images_to_train_on():
  assert resolve(changed(teacher__batch_size=1343)).teacher.batch_size == 1343
  config = changed(teacher__batch_size=1076, evaluate__split="validation")
  with pytest.raises(Refusal, match="config.teacher.batch_size is 1076, more than the 1075 training images"):
    resolve(config)
  config.teacher.batch_size = 1075
  resolve(config)


def test_reference_is_refused_for_other_methods():
  config = dafl_cifar10.get_config("digits")
  config.reference = True
  with pytest.raises(Refusal, match="config.reference is CPSC-DFKD's; leave it False for method 'dafl'"):
    resolve(config)


def test_differences_name_the_keys():
  config = resolve(digits.get_config())
  saved = json.loads(configs.dump(config))
  assert configs.differences(config, saved) == []
  saved["student"]["lr"], saved["seed"], saved["dataset"]["data_dir"] = 0.3, 5, "/elsewhere"
  saved["evaluate"] |= {"diagnostics_every": 3, "gradients": True}  # nothing that a run finds depends on these
  assert configs.differences(config, saved) == ["seed", "student.lr"]


def test_changes_are_told_with_their_defaults():
  changes = configs.changes(resolve(nayer_cifar10.get_config("digits")))
  assert changes["generator.steps"] == [6, 10] and changes["dataset.name"] == ["cifar10", "digits"]
  assert changes["generator.milestones"] == [[50, 150], []], "as JSON has them"
  assert changes["episodes.life"] == [None, 20], "a key without a default"
  assert "name" not in changes and "student.momentum" not in changes


def test_parts_of_a_batch_must_divide_what_the_student_sees():
  assert resolve(changed(student__norm_parts=8)).student.norm_parts == 8
  with pytest.raises(Refusal, match="config.student.norm_parts is 3, which does not divide the 64 images"):
    resolve(changed(student__norm_parts=3))
  with pytest.raises(Refusal, match="norm_parts is 64, which does not divide the 32 images .*schedule.batch_size"):
    resolve(changed(student__norm_parts=64, student__micro_batches=2))


def test_a_key_that_a_saved_config_does_not_know_is_its_default():
  """Runs of a version before the key go on where nothing has changed."""
  config = changed(student__norm_parts=2)
  saved = json.loads(configs.dump(resolve(config)))
  del saved["student"]["norm_parts"], saved["generator"]["milestones"]  # a tuple, in JSON a list
  assert configs.differences(resolve(config), saved) == ["generator.milestones", "student.norm_parts"]
  config.student.norm_parts, config.generator.milestones = 1, default.get_config().generator.milestones
  assert configs.differences(resolve(config), saved) == []
  saved["unknown"] = 1
  assert configs.differences(resolve(config), saved) == ["unknown"]


@pytest.mark.parametrize("optimiser", [optim.student_optimiser, optim.generator_optimiser])
def test_a_run_with_a_horizon_is_the_start_of_a_longer_one(optimiser):
  config = digits.get_config()
  config.generator.schedule = "cosine"
  weights, sizes = jnp.ones(2), {}
  for epochs, horizon in ((4, 0), (4, 8), (8, 0)):
    config.schedule.epochs, config.schedule.horizon = epochs, horizon
    tx = optimiser(config, 3)
    state, sizes[epochs, horizon] = tx.init(weights), []
    for _ in range(12):
      step, state = tx.update(weights, state, weights)
      sizes[epochs, horizon].append(float(step[0]))
  assert sizes[4, 8] == sizes[8, 0] and abs(sizes[4, 8][-1]) > 2 * abs(sizes[4, 0][-1])
