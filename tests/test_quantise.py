"""Quantisation: the quantiser against NumPy, the phases of a run, its controls, its files, and what is refused."""

import json
import math
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY, command
from cpsc_jax.configs import default, quantise_cifar10, quantise_digits
from flax.traverse_util import flatten_dict
from spmd_worker import smoke_config as config_of
from test_algorithm import equal
from test_configs import right, wrong
from test_methods import on_host

from cpsc_jax import (
  algorithm,
  checkpoint,
  config,
  datasets,
  experiment,
  mesh,
  nets,
  optim,
  saved,
  schema,
  streams,
  tasks,
  teach,
)
from cpsc_jax.errors import Refusal
from cpsc_jax.interop import export
from cpsc_jax.main import main
from cpsc_jax.nets import quantised as quantiser
from cpsc_jax.streams import Stream

DIGITS = datasets.DATASETS["digits"]
SMOKE = f"--config={REPOSITORY / 'configs' / 'quantise_digits.py'}:smoke"
RNG = np.random.default_rng(0)


def by_numpy(x, low, high, bits):
  """The quantiser as published (GDFQ): scale, zero point and signed levels."""
  s = (2**bits - 1) / np.maximum(high - low, 1e-8)
  zero = np.round(s * low) + 2 ** (bits - 1)
  q = np.clip(np.round(s * x - zero), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
  return (q + zero) / s


def net_and_variables(name="cifar_resnet8", size=16, channels=3):
  net = nets.classifier(name, 10)
  x = jnp.asarray(RNG.normal(size=(8, size, size, channels)), jnp.float32)
  variables = nets.init(net, jax.random.key(0), x)
  noisy = jax.tree.map(lambda leaf: leaf + 0.1 * jnp.asarray(RNG.normal(size=leaf.shape), jnp.float32), variables)
  noisy["batch_stats"] = jax.tree.map(jnp.abs, noisy["batch_stats"])
  return net, noisy, x


def logits(net, variables, x):
  return np.asarray(jax.jit(lambda v, x: net.apply(v, x, train=False).logits)(variables, x))


def with_ranges(net, variables, image_shape):
  """The variables of a quantised net with the parameters and moments of a float one."""
  fresh = jax.eval_shape(lambda: nets.init(net, jax.random.key(0), jnp.zeros((2, *image_shape))))
  stats = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), fresh)
  both, _ = nets.inherited(stats, variables)
  return {**both, "batch_stats": nets.ranges_without_data(net, both, image_shape)}


# The quantiser.


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_weights_are_those_of_the_published_quantiser(bits):
  """Each output channel by its own minimum and maximum, which are kept."""
  kernel = RNG.normal(size=(3, 3, 5, 7)) + np.linspace(-1, 1, 7)
  low, high = kernel.min((0, 1, 2)), kernel.max((0, 1, 2))
  with jax.enable_x64(True):
    ours = np.asarray(quantiser.quantised_weights(jnp.asarray(kernel), bits))
  np.testing.assert_allclose(ours, by_numpy(kernel, low, high, bits), rtol=0, atol=1e-12)
  assert max(len(np.unique(ours[..., k])) for k in range(7)) <= 2**bits
  assert np.abs(ours - kernel).max() <= ((high - low) / (2**bits - 1)).max()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_weights_have_a_level_at_zero(bits):
  kernel = RNG.normal(size=(4, 6))
  with jax.enable_x64(True):
    ours = np.asarray(quantiser.quantised_weights(jnp.asarray(kernel), bits, symmetric=True))
  most = 2 ** (bits - 1) - 1
  scale = np.abs(kernel).max(0) / most
  np.testing.assert_allclose(ours, np.clip(np.round(kernel / scale), -most, most) * scale, rtol=0, atol=1e-12)


def test_activations_are_rounded_to_even_and_cut_off():
  """Halves go to the even level; what is larger than the range becomes its end."""
  scale, zero = quantiser.grid(jnp.float32(0), jnp.float32(15), 4)
  x = jnp.asarray([0.0, 0.5, 1.5, 2.5, 14.6, 15.4, 99.0, -1.0])
  ours = quantiser.fake_quantised(x, scale, zero, jnp.float32(15))
  assert ours.tolist() == [0, 0, 2, 2, 15, 15, 15, 0]
  assert np.array_equal(quantiser.fake_quantised(ours, scale, zero, jnp.float32(15)), ours)
  x = RNG.uniform(0, 3, size=1000)
  with jax.enable_x64(True):
    scale, zero = quantiser.grid(jnp.float64(0), jnp.float64(2.5), 5)
    ours = quantiser.fake_quantised(jnp.asarray(x), scale, zero, jnp.float64(31))
  np.testing.assert_allclose(ours, by_numpy(x, 0, 2.5, 5), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rounded", [quantiser.fake_quantised, quantiser.cut])
def test_the_gradient_passes_straight_through(rounded):
  """1 for what is quantised, also outside the range unless it is cut; none for the range."""
  x, weights = jnp.linspace(-2.0, 5.0, 12), jnp.arange(1.0, 13.0)

  def value(x, high):
    scale, zero = quantiser.grid(jnp.float32(0), high, 3)
    return jnp.sum(weights * rounded(x, scale, zero, jnp.float32(7)))

  of_x, of_range = jax.jit(jax.grad(value, (0, 1)))(x, jnp.float32(2))
  assert np.array_equal(of_x, weights * ((x <= 2) | (rounded is quantiser.fake_quantised))) and of_range == 0
  kernel = jnp.asarray(RNG.normal(size=(3, 4)))
  assert np.array_equal(jax.grad(lambda k: quantiser.quantised_weights(k, 2).sum())(kernel), np.ones((3, 4)))


def test_a_channel_of_equal_weights_is_finite():
  for symmetric in (False, True):
    assert np.isfinite(quantiser.quantised_weights(jnp.zeros((3, 2)), 4, symmetric)).all()


# The network.


def test_with_32_bits_it_is_the_teacher_bit_for_bit():
  net, variables, x = net_and_variables()
  whole = nets.quantise(net, (16, 16, 3), 32, 32)
  assert jax.tree.structure(nets.init(whole, jax.random.key(0), x)) == jax.tree.structure(variables)
  ours, theirs = logits(whole, variables, x), logits(net, variables, x)
  assert np.array_equal(ours, theirs)
  trained, stats = jax.jit(lambda v, x: nets.forward(whole, v, x, train=True))(variables, x)
  assert np.array_equal(trained.logits, theirs) and equal(stats, variables["batch_stats"]), "batch norms are frozen"


def test_first_and_last_layers_have_bits_of_their_own():
  net, variables, x = net_and_variables()
  some = nets.quantise(net, (16, 16, 3), 3, 32, first=8, last=6)
  bits = {"conv1": 8, "linear": 6}

  def by_hand(path, leaf):
    names = [part.key for part in path]
    quantised = quantiser.quantised_weights(leaf, bits.get(names[0], 3)) if names[-1] == "kernel" else leaf
    return quantised

  params = jax.tree_util.tree_map_with_path(by_hand, variables["params"])
  want = logits(net, {**variables, "params": params}, x)
  np.testing.assert_allclose(logits(some, variables, x), want, rtol=1e-5, atol=1e-5)
  assert some.card == {"weights": 3, "activations": 32, "first": 8, "last": 6, "symmetric": False, "layers": 8}


def test_ranges_follow_the_first_batches_and_stay():
  """The mean over batches is the bias-corrected one from the first batch on; evaluation moves nothing."""
  net, variables, x = net_and_variables()
  some = nets.quantise(net, (16, 16, 3), 32, 8, calibration=3, momentum=0.8)
  now, found, factors = with_ranges(some, variables, (16, 16, 3)), [], (1.0, 3.0, 0.5, 9.0)
  train = jax.jit(lambda v, x: nets.forward(some, v, x, train=True)[1])
  observed = jax.jit(lambda v, x: net.apply(v, x, train=False, capture_intermediates=True)[1])
  for factor in factors:
    first = np.asarray(observed(variables, factor * x)["intermediates"]["ReLU_0"]["__call__"][0])
    found.append(first.max())
    now = {**now, "batch_stats": train(now, factor * x)}
  shares = 0.2 * 0.8 ** np.arange(2, -1, -1)
  want = np.sum(shares * found[:3]) / (1 - 0.8**3)
  high, seen = (now["batch_stats"]["ReLU_0"][name] for name in ("high", "seen"))
  assert float(high) == pytest.approx(want, rel=1e-5) and int(seen) == 3
  assert equal(nets.forward(some, now, x, train=False)[1], now["batch_stats"])
  moments = {path: leaf for path, leaf in flatten_dict(now["batch_stats"]).items() if "ReLU" not in path[-2]}
  assert equal(moments, flatten_dict(variables["batch_stats"])), "batch norms are frozen"
  constant = nets.quantise(net, (16, 16, 3), 32, 8, calibration=9)
  stats = with_ranges(constant, variables, (16, 16, 3))
  moved = jax.jit(lambda v, x: nets.forward(constant, v, x, train=True)[1])
  for _ in range(5):
    stats = {**stats, "batch_stats": moved(stats, x)}
    assert float(stats["batch_stats"]["ReLU_0"]["high"]) == pytest.approx(found[0], rel=1e-5), "not inflated"


def test_ranges_of_least_error_are_those_of_a_search_by_hand():
  """Over the whole batch here, which is small; what is far from the others is cut off."""
  net, variables, x = net_and_variables()
  some = nets.quantise(net, (16, 16, 3), 32, 3, calibration=1, ranges="mse")
  begun = with_ranges(some, variables, (16, 16, 3))
  x = x.at[0, :4, :4].mul(20.0)
  stats = jax.jit(lambda v, x: nets.forward(some, v, x, train=True)[1])(begun, x)
  seen = net.apply(variables, x, train=False, capture_intermediates=True)[1]["intermediates"]["ReLU_0"]["__call__"][0]
  seen = np.asarray(seen, np.float64)
  highs = seen.max() * np.arange(1, 33) / 32
  steps = highs / 7
  errors = [np.mean((np.clip(np.round(seen / step), 0, 7) * step - seen) ** 2) for step in steps]
  high = float(stats["ReLU_0"]["high"])
  assert high == pytest.approx(highs[np.argmin(errors)], rel=1e-5) and high < 0.7 * seen.max()
  again = jax.jit(lambda v, x: nets.forward(some, v, x, train=True)[1])({**begun, "batch_stats": stats}, 3 * x)
  assert float(again["ReLU_0"]["high"]) == high, "calibrated"

  def gradient(net):
    calibrated = {**begun, "batch_stats": stats}
    return jax.jit(jax.grad(lambda x: net.apply(calibrated, x, train=False).logits.sum()))(x)

  assert not np.allclose(gradient(some), gradient(some.clone(ranges="max"))), "it stops where activations are cut off"


def test_ranges_without_data_are_what_batch_norms_promise():
  net, variables, x = net_and_variables()
  some = nets.quantise(net, (16, 16, 3), 8, 8)
  stats = with_ranges(some, variables, (16, 16, 3))["batch_stats"]
  norm = variables["params"]["bn1"]
  bound = np.maximum(np.asarray(norm["bias"] + 6 * np.abs(norm["scale"])), 0)
  assert float(stats["ReLU_0"]["high"]) == pytest.approx(bound.max(), rel=1e-6)
  inner = variables["params"]["layer1_0"]["bn2"]
  sums = bound + np.asarray(inner["bias"] + 6 * np.abs(inner["scale"]))
  assert float(stats["ReLU_1"]["high"]) == pytest.approx(sums.max(), rel=1e-6), "sums reach the sums of the bounds"


class Attends(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nets.ReLU()(nn.Conv(4, (3, 3), name="stem")(x))
    tokens = nn.Embed(3, 4, name="kinds")(jnp.zeros(x.shape[:1], int)) + x.mean((1, 2))
    return nets.outputs(nn.Einsum((4, 4), "nd,de->ne", name="mixer")(tokens)[:, None], [x], 10, "last")


class Smooth(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    return nets.outputs(nn.gelu(nn.Conv(4, (3, 3))(x)), [x], 10, "last")


def test_what_cannot_be_quantised_is_named():
  with pytest.raises(Refusal, match="Attends has layers that cannot be quantised: kinds, mixer; only flax.linen.Conv"):
    nets.quantise(Attends(), (8, 8, 1), 8, 8)
  with pytest.raises(Refusal, match="Smooth has no ReLU whose outputs could be quantised"):
    nets.quantise(Smooth(), (8, 8, 1), 8, 8)
  assert nets.quantise(Smooth(), (8, 8, 1), 8, 32).layers == 2


@pytest.mark.parametrize("name", ["wrn_10_1", "cifar_resnet8", "vgg11", "resnet18", "mobilenet_v2"])
def test_every_convolution_and_relu_is_found(name):
  """As many layers as kernels, and a range for every ReLU."""
  net = nets.classifier(name, 10)
  some = nets.quantise(net, (32, 32, 3), 4, 4)
  shapes = jax.eval_shape(lambda: nets.init(some, jax.random.key(0), jnp.zeros((2, 32, 32, 3))))
  kernels = [path for path, leaf in flatten_dict(shapes["params"]).items() if leaf.ndim > 1]
  ranges = [path for path in flatten_dict(shapes["batch_stats"]) if path[-1] == "high"]
  relus = {"wrn_10_1": 7, "cifar_resnet8": 7, "vgg11": 8, "resnet18": 17, "mobilenet_v2": 35}
  assert some.layers == len(kernels) and len(ranges) == relus[name]


# The task.


def resolved(**changes):
  c = quantise_digits.get_config("smoke")
  c.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  c = tasks.of(c).of_teacher(c, {"net": c.teacher.net})
  return config.resolve(c, DIGITS, mesh.make_mesh())


def start(c):
  """(setup, teacher variables, state) that a run of this config begins with."""
  devices, net = mesh.make_mesh(), nets.classifier(c.teacher.net, 10)
  setup = experiment.build(c, DIGITS, net, {"mean": DIGITS.mean, "std": DIGITS.std}, devices)
  teacher = mesh.replicate(nets.init(net, jax.random.key(5), jnp.zeros((2, 8, 8, 1))), devices)
  key = streams.key(streams.root(0), Stream.DISTILLATION)
  return setup, teacher, experiment.initial_state(c, setup, key, DIGITS.image_shape, teacher)


@pytest.mark.slow
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_phases_and_exact_resume(micro_batches, tmp_path):
  """The generator alone, then ranges alone, then all but ranges; one program; the teacher stays as it is."""
  each = {"schedule__epochs": 4, "student__micro_batches": micro_batches}
  c = resolved(generator__warmup_epochs=1, quantise__calibration=1, **each)
  setup, teacher, state = start(c)
  kept, begun = jax.device_get((teacher, state))
  assert equal(begun.student.params, kept["params"]), "the student starts as its teacher"
  epoch, after, found = algorithm.compile_epoch(setup, c.schedule.iterations), [], []
  checkpointer = checkpoint.Checkpointer(tmp_path)
  for number in range(3):
    if number == 2:
      checkpointer.save(2, {"state": state}, {})
      checkpointer.close()
    state, losses = epoch(state, teacher)
    after.append(on_host(state))
    found.append(jax.device_get(losses))
  assert equal(after[0].student, begun.student) and not equal(after[0].generator.params, begun.generator.params)
  assert not found[0]["student"].total.any() and found[1]["student"].total.all()
  assert equal(after[1].student.params, begun.student.params) and not equal(
    after[1].student.batch_stats, begun.student.batch_stats
  )
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), after[1].student.params, after[2].student.params)
  assert all(jax.tree.leaves(moved))
  assert equal(after[1].student.opt_state["later"], begun.student.opt_state["later"]), "no momentum from calibrating"
  ranges = {path: leaf for path, leaf in flatten_dict(after[2].student.batch_stats).items() if path[-1] != "seen"}
  before = flatten_dict(after[1].student.batch_stats)
  assert all(np.array_equal(leaf, before[path]) for path, leaf in ranges.items()), "ranges and batch norms stay"
  seen = {int(leaf) for path, leaf in before.items() if path[-1] == "seen"}
  assert seen == {c.schedule.iterations * c.student.steps * micro_batches}, "every batch of the epoch counts"
  _, _, like = start(c)
  restored = checkpoint.Checkpointer(tmp_path).restore({"state": like})[0]["state"]
  again, _ = epoch(restored, teacher)
  assert equal(on_host(again), after[2]) and epoch._cache_size() == 1 and equal(teacher, kept)


@pytest.mark.parametrize("method", ["cmi", "fast", "nayer", "rgal"])
def test_any_method_can_quantise(method):
  """Its keys and the task's in one config; what is put around the student is put around the quantised one."""
  c = config_of(method)
  schema.add_keys_of_task(c, "quantise")
  c.generator.warmup_epochs, c.schedule.epochs, c.student.warmup_epochs = 1, 6, 0
  c = config.resolve(tasks.of(c).of_teacher(c, {"net": c.teacher.net}), DIGITS, mesh.make_mesh())
  assert dict(schema.flatten(c)).keys() == schema.keys_of(method, "quantise").keys()
  net = nets.classifier(c.teacher.net, 10)
  setup = experiment.build(c, DIGITS, net, {"mean": DIGITS.mean, "std": DIGITS.std}, mesh.make_mesh())
  inner, _ = nets.deployed(setup.student.net, {})
  assert isinstance(inner, nets.Quantised) and setup.method.waits is not None
  if method == "rgal":
    assert isinstance(setup.student.net, nets.StageProjections)
    teacher = nets.init(net, jax.random.key(5), jnp.zeros((2, 8, 8, 1)))
    state = experiment.initial_state(c, setup, jax.random.key(0), DIGITS.image_shape, teacher)
    assert float(state.student.batch_stats["net"]["ReLU_0"]["high"]) == pytest.approx(6.0), "scale 1 and shift 0"
    assert equal(state.student.params["net"], teacher["params"])


def test_the_optimiser_rests_at_first():
  """Nothing moves, its own state included; then it is Nesterov's as PyTorch has it."""
  tx = optim.after(2, optim.sgd(0.1, 0.9, 0.0, nesterov=True))
  state, sizes = tx.init(jnp.ones(())), []
  for _ in range(4):
    step, state = tx.update(jnp.float32(1.0), state, jnp.ones(()))
    sizes.append(float(step))
  assert sizes == [0.0, 0.0, pytest.approx(-0.19), pytest.approx(-0.271)]


def test_noise_is_labelled_by_the_teacher():
  c = resolved(arm="gaussian_noise", loss__student__kd=0.0, loss__student__ce=1.0)
  setup, teacher, state = start(c)
  assert setup.generator is None and state.generator is None and not setup.method.generator_terms
  _, batch = setup.method.source(state, jax.random.key(3), None)
  x = np.asarray(batch.images)
  assert x.shape == (32, 8, 8, 1) and abs(x.mean()) < 0.1 and abs(x.std() - 1) < 0.1

  @jax.jit
  def both(state, teacher, batch):
    aux = algorithm.student_update(setup, teacher, state, batch, jax.random.key(0))[1]
    return aux.losses.total, aux.outputs["student"].logits, algorithm.teach_with(setup, teacher)(batch.images).logits

  total, s, t = both(state, teacher, batch)
  log_p = np.asarray(jax.nn.log_softmax(s))
  assert float(total) == pytest.approx(-log_p[np.arange(32), np.asarray(t).argmax(1)].mean(), rel=1e-4)


# Configs.


@pytest.mark.parametrize("variant", ["", "smoke"])
@pytest.mark.parametrize("module", [quantise_cifar10, quantise_digits])
def test_configs_are_complete_and_resolve(module, variant):
  c = module.get_config(variant)
  assert dict(schema.flatten(c)).keys() == schema.keys_of("cpsc", "quantise").keys()
  assert c.is_locked and c.quantise.is_locked and c.task == "quantise"
  spec = datasets.find(c.dataset.name, "").spec
  c = config.resolve(tasks.of(c).of_teacher(c, {"net": "wrn_16_1"}), spec, mesh.make_mesh())
  assert c.student.net == "wrn_16_1" and c.student.inherit


@pytest.mark.parametrize("name", schema.KEYS_OF_TASK["quantise"])
def test_what_a_key_must_not_be_is_refused(name):
  flat, key = dict(schema.flatten(quantise_digits.get_config())), schema.keys_of("cpsc", "quantise")[name]
  for value in wrong(key):
    with pytest.raises(Refusal, match=rf"^config\.{name} is .*; it must be .+\.$"):
      schema.check(flat | {name: value})
  for value in right(key):
    schema.check(flat | {name: value})
  with pytest.raises(Refusal, match=f"the config has no key '{name}'; start from configs/quantise_cifar10.py"):
    schema.check({key: value for key, value in flat.items() if key != name})


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    ({"quantise__weights": 9}, r"config.quantise.weights is 9; it must be from 2 to 8 bits, 32 for float\."),
    ({"quantise__activations": 1}, "config.quantise.activations is 1; it must be at least 2"),
    ({"quantise__first": 1}, "config.quantise.first is 1; it must be from 2 to 8 bits, 32 for float, or 0 for as many"),
    ({"quantise__last": 40}, "config.quantise.last is 40; it must be at least 0 and at most 32"),
    ({"quantise__calibration": 3}, "are 3 epochs together, more than config.schedule.epochs, 2"),
    ({"schedule__epochs": 9, "evaluate__every": 2}, "make that a multiple of config.evaluate.every, 2"),
    ({"reference": True}, "leave it False for task 'quantise'"),
    ({"student__norm_parts": 2}, "norm_parts is 2, but batch norms of a quantised network are fixed; set it to 1"),
    ({"generator__student_mode": "train"}, "student_mode is 'train', with which the generator's steps would move"),
    ({"task": "prune"}, "config.task is 'prune'; it must be one of distil, quantise, incremental"),
  ],
)
def test_bad_settings_are_refused_before_any_work(changes, word):
  with pytest.raises(Refusal, match=word):
    resolved(**changes)


def test_a_network_that_cannot_be_quantised_is_refused_before_any_work(monkeypatch):
  monkeypatch.setitem(nets.NETS, "attends", lambda num_classes, dtype=None: Attends())
  with pytest.raises(Refusal, match="Attends has layers that cannot be quantised: kinds, mixer"):
    resolved(teacher__net="attends")


def test_distillation_has_no_keys_of_it():
  c = default.get_config()
  assert c.task == "distil" and "quantise" not in c and tasks.of(c).of_teacher(c, {"net": "x"}) is c


# A run and its files.


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits_dir, finished):
  """The folder of a finished W8A8 run of seconds."""
  workdir = tmp_path_factory.mktemp("quantised") / "w"
  flags = [f"--config.teacher.checkpoint={finished / 'teacher'}", "--config.quantise.weights=8"]
  flags += ["--config.quantise.activations=8", "--config.schedule.epochs=1", "--config.schedule.iterations=1"]
  assert main(command(workdir, digits_dir, *flags, config=SMOKE)) == 0
  return workdir


def logits_of(path, digits_dir):
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[test]'")
  session = onnxruntime.InferenceSession(str(path))
  facts = session.get_modelmeta().custom_metadata_map
  test = datasets.find("digits", digits_dir).load_evaluation("test")
  mean, std = (np.asarray(json.loads(facts[key]), np.float32) for key in ("mean", "std"))
  images = ((np.asarray(test.images) / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
  return session.run(["logits"], {"images": images})[0], np.asarray(test.labels)


@pytest.mark.slow
def test_a_run_reports_all_stages(run, capsys):
  results = json.loads((run / "results.json").read_text())
  said = results["quantised"]
  assert said.keys() == {"weights", "activations", "first", "last", "symmetric", "layers", "without_data", "calibrated"}
  assert (said["weights"], said["activations"], said["symmetric"], said["layers"]) == (8, 8, True, 10)
  for stage in ("without_data", "calibrated"):
    assert abs(said[stage] - results["teacher"]["accuracy"]) < 0.03
  assert results["student"]["last"]["agreement"] > 0.97 and results["student"]["net"] == "wrn_10_1"
  assert results["student"]["last"]["accuracy"] == said["calibrated"], "one epoch, which calibrates"
  assert main(["main", SMOKE, f"--workdir={run}"]) != 0
  from cpsc_jax import report

  report.print_table(results)
  shown = capsys.readouterr().out
  assert "W8A8, without data" in shown and "W8A8, calibrated" in shown and f"{said['calibrated']:.4f}" in shown


@pytest.mark.slow
def test_the_onnx_file_has_8_bit_integers_and_the_accuracy_of_the_run(run, digits_dir, tmp_path, capsys):
  onnx = pytest.importorskip("onnx", reason="needs onnx: pip install -e '.[test]'")
  path, results = tmp_path / "q.onnx", json.loads((run / "results.json").read_text())
  export.export(run, None, "onnx", path)
  assert "W8A8, as 8-bit integers; " in capsys.readouterr().out
  logits, labels = logits_of(path, digits_dir)
  assert np.mean(logits.argmax(1) == labels) == pytest.approx(results["student"]["last"]["accuracy"], abs=1 / 454)
  model = onnx.load(path)
  types = {i.name: i.data_type for i in model.graph.initializer}
  weights = [name for name in types if name.endswith(".int8")]
  assert len(weights) == 10 and all(types[name] == onnx.TensorProto.INT8 for name in weights)
  assert sum(node.op_type == "QuantizeLinear" for node in model.graph.node) == 7
  export.export(run / "student", None, "onnx", tmp_path / "again.onnx")
  float_net = saved.load(saved.find(run, "teacher"))
  export.write_onnx(tmp_path / "float.onnx", float_net)
  assert path.stat().st_size < (tmp_path / "float.onnx").stat().st_size / 2.5


@pytest.mark.slow
def test_it_runs_as_stablehlo(run, tmp_path):
  assert export.export(run, None, "stablehlo", tmp_path / "q.stablehlo") < export.QUANTISED_TOLERANCE


def test_a_saved_net_is_quantised_again_and_no_teacher(tmp_path):
  net, variables, x = net_and_variables("cifar_resnet8", 8, 1)
  some = nets.quantise(net, (8, 8, 1), 4, 4, first=8)
  variables = with_ranges(some, variables, (8, 8, 1))
  card = {"net": "cifar_resnet8", "num_classes": 10, "image_size": 8, "channels": 1, "mean": [0.5], "std": [0.25]}
  checkpoint.save_net(tmp_path / "net", variables, card | {"quantised": some.card})
  again = saved.load(tmp_path / "net")
  assert again.net == nets.quantise(net, (8, 8, 1), 4, 4, first=8) and equal(again.variables, variables)
  c = quantise_digits.get_config("smoke")
  c.teacher.checkpoint = str(tmp_path / "net")
  with pytest.raises(Refusal, match="is quantised, which a teacher is not; name the float network"):
    teach.describe_teacher(c, datasets.find("digits", ""))
  checkpoint.save_net(tmp_path / "other", variables, card | {"quantised": {**some.card, "bits": 4}})
  with pytest.raises(Refusal, match="the card says of the quantised net what is not known here .*; save it again"):
    saved.load(tmp_path / "other")


@pytest.mark.parametrize(
  ("name", "bits"),
  [
    ("cifar_resnet8", {"weights": 4, "activations": 4, "first": 8}),
    ("wrn_10_1", {"weights": 8, "activations": 8, "symmetric": True}),
    ("vgg11", {"weights": 3, "activations": 5, "last": 32}),
    pytest.param("mobilenet_v2", {"weights": 5, "activations": 6}, marks=pytest.mark.slow),
    ("resnet18", {"weights": 2, "activations": 32}),
  ],
)
def test_pytorch_has_the_levels_and_their_scales(name, bits, tmp_path):
  torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[test]'")
  net, variables, x = net_and_variables(name, 32, 3)
  some = nets.quantise(net, (32, 32, 3), **bits)
  now = with_ranges(some, variables, (32, 32, 3))
  card = {"net": name, "num_classes": 10, "image_size": 32, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
  given = saved.SavedNet(some, now, card | {"digest": checkpoint.digest(now), "quantised": some.card})
  assert export.export_net(given, "torch", tmp_path / "q.pth") < export.QUANTISED_TOLERANCE
  state = torch.load(tmp_path / "q.pth", weights_only=True)
  scaled = [key.removesuffix("_scale") for key in state if key.endswith("weight_scale")]
  assert len(scaled) == some.layers - (bits.get("last") == 32)
  first = next(key for key in state if key in scaled)
  for key in scaled:
    zero = state[f"{key}_zero_point"]
    shape = (-1, *[1] * (state[key].ndim - 1))
    levels = state[key].double() / state[f"{key}_scale"].double().reshape(shape) + zero.reshape(shape)
    highest = 2 ** (bits.get("first", bits["weights"]) if key == first else bits["weights"]) - 1
    assert (
      levels - levels.round()
    ).abs().max() < 1e-3 * highest and -1e-3 < levels.min() <= levels.max() < highest + 0.1
  assert ("activations.scale" in state) == (bits["activations"] < 32)
  export.export_net(given, "safetensors", tmp_path / "q.safetensors")
  from safetensors.torch import load_file

  back = load_file(tmp_path / "q.safetensors")
  assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def test_a_file_may_differ_by_what_round_off_does_to_the_net(monkeypatch, tmp_path):
  """A level that a rounding error moves is no fault of the file; more than that is."""
  net, variables, _ = net_and_variables("cifar_resnet8", 8, 1)
  some = nets.quantise(net, (8, 8, 1), 8, 8)
  now = with_ranges(some, variables, (8, 8, 1))
  card = {"net": "cifar_resnet8", "num_classes": 10, "image_size": 8, "channels": 1, "mean": [0.5], "std": [0.25]}
  given = saved.SavedNet(some, now, card | {"digest": "", "quantised": some.card})
  assert export.own_difference(given) < 0.05
  monkeypatch.setattr(export, "ROUND_OFF", 0.01)
  assert 0.001 < export.own_difference(given) < 0.5, "it moves what is rounded"
  form = export.FORMATS["safetensors"]
  differs = form._replace(write=lambda *args: form.write(*args) + 0.1)
  monkeypatch.setitem(export.FORMATS, "safetensors", differs)
  monkeypatch.setattr(export, "own_difference", lambda _: 0.06)
  assert export.export_net(given, "safetensors", tmp_path / "a") == 0.1
  monkeypatch.setattr(export, "own_difference", lambda _: 0.04)
  with pytest.raises(Refusal, match="differs from the net by 1.0e-01 of its largest output, more than 8e-02"):
    export.export_net(given, "safetensors", tmp_path / "b")
  assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(("weights", "activations", "symmetric"), [(8, 8, True), (4, 4, False)])
def test_onnx_of_few_bits_and_folded_norms(weights, activations, symmetric, tmp_path):
  """onnxruntime runs convolutions on integers where it can; the values are the net's, whatever the norms' signs."""
  onnx = pytest.importorskip("onnx", reason="needs onnx: pip install -e '.[test]'")
  onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[test]'")
  net, variables, x = net_and_variables()
  some = nets.quantise(net, (16, 16, 3), weights, activations, symmetric=symmetric, calibration=1)
  now = with_ranges(some, variables, (16, 16, 3))
  now = {**now, "batch_stats": nets.forward(some, now, x, train=True)[1]}
  now["params"]["bn1"]["scale"] = now["params"]["bn1"]["scale"].at[::2].multiply(-1)
  now["params"]["layer2_0"]["conv1"]["kernel"] = now["params"]["layer2_0"]["conv1"]["kernel"].at[..., 3].set(0)
  card = {"net": "cifar_resnet8", "num_classes": 10, "image_size": 16, "channels": 3, "mean": [0.5] * 3}
  card |= {"std": [0.25] * 3, "digest": "", "quantised": some.card}
  path = tmp_path / "net.onnx"
  assert export.write_onnx(path, saved.SavedNet(some, now, card)) < export.QUANTISED_TOLERANCE
  options = onnxruntime.SessionOptions()
  options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 3
  onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
  runs = [node.op_type for node in onnx.load(tmp_path / "run.onnx").graph.node]
  assert runs.count("QLinearConv") == (3 if weights == 8 else 0)
  assert weights < 8 or "Mul" not in runs, "norms are folded"
  ours = logits(some, now, x)
  theirs = onnxruntime.InferenceSession(str(path)).run(["logits"], {"images": np.asarray(x).transpose(0, 3, 1, 2)})[0]
  assert np.abs(ours - theirs).max() < 0.05 * np.abs(ours).max() and not math.isnan(theirs.sum())


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["distill", "gaussian_noise", "untrained_generator", "real_kd", "real_labels"])
def test_8_bits_lose_nothing_whatever_calibrates(arm, digits_dir, tmp_path, common):
  """A teacher of ten epochs, and a run of every arm, which has the same phases."""
  workdir, teacher = tmp_path / "w", common / "quantise_teacher"
  flags = ["--config.quantise.weights=8", "--config.quantise.activations=8", f"--config.arm={arm}"]
  flags += ["--config.teacher.epochs=10", "--config.schedule.epochs=3", "--config.generator.warmup_epochs=1"]
  flags += ["--config.evaluate.every=1", "--config.student.lr=1e-4"]
  flags += [f"--config.teacher.checkpoint={teacher}"] if teacher.exists() else []
  full = f"--config={REPOSITORY / 'configs' / 'quantise_digits.py'}"
  assert main(command(workdir, digits_dir, *flags, config=full)) == 0
  if not teacher.exists():
    shutil.copytree(workdir / "teacher", teacher)
  results = json.loads((workdir / "results.json").read_text())
  float_accuracy = results["teacher"]["accuracy"]
  assert float_accuracy > 0.9
  calibrated, last = results["quantised"]["calibrated"], results["student"]["last"]["accuracy"]
  assert min(calibrated, results["quantised"]["without_data"], last) >= float_accuracy - 1.5 / 454
  history = json.loads((workdir / "history.json").read_text())["student"]
  assert history[0]["accuracy"] == results["quantised"]["without_data"], "the student waits in every arm"
