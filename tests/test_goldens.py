"""Numerical parity with the published reference implementation, array by array, in float64 and float32.

Limits: float64 1e-6 (the stored arrays are partly rounded to float32), losses 1e-10; float32 3e-6 forward, 2e-2 for
gradients through deep ReLU nets, in which a few units flip with rounding.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from parity import assert_close, assert_trees_close, cast, jitted_forward, nhwc, section, shapes, with_weights

from cpsc_jax import algorithm, datasets, experiment, initial, losses, nets, optim, sources
from cpsc_jax.config import resolve
from cpsc_jax.interop import convert
from cpsc_jax.mesh import make_mesh
from cpsc_jax.nets.layers import CategoricalBatchNorm, FeatureHead
from cpsc_jax.setup import LATENTS
from cpsc_jax.state import Hyper, State


def stored(arrays, key, dtype):
  """The reference's float64 result of `key` where it is kept and wanted, else its float32 one."""
  return arrays.get(f"{key}_f64", arrays[key]) if dtype == np.float64 else arrays[key]


@pytest.mark.parametrize("case", ["c0", "c1_eps0.8", "c2_1x1"])
def test_categorical_batch_norm(golden, dtype, case):
  arrays = golden("cbn")
  arrays = section(arrays, f"{case}/") or pytest.fail(f"no case {case}")
  exact = dtype == np.float64
  start = section(arrays, "sd0/")

  def table(name):
    return start[f"{name}.weight"]

  variables = cast(
    {
      "params": {"scale": table("weights"), "bias": table("biases")},
      "batch_stats": {"mean": start["running_mean"], "var": start["running_var"]},
    },
    dtype,
  )
  layer = CategoricalBatchNorm(num_classes=table("weights").shape[0], epsilon=float(arrays["eps"].item()))
  for call in ("train1", "train2"):
    now = section(arrays, f"{call}/")
    x, r, labels = jnp.asarray(nhwc(now["x"]), dtype), jnp.asarray(nhwc(now["r"]), dtype), jnp.asarray(now["labels"])

    def value(params, x, stats=variables["batch_stats"], labels=labels, r=r):
      y, moved = nets.forward(layer, {"params": params, "batch_stats": stats}, x, labels, train=True)
      return jnp.sum(y * r), (y, moved)

    grads, (y, stats) = jax.grad(value, argnums=(0, 1), has_aux=True)(variables["params"], x)
    limit = 1e-6 if exact else 3e-6

    def kept(key, now=now):
      return nhwc(stored(now, key, dtype)) if np.ndim(now[key]) == 4 else stored(now, key, dtype)

    assert_close(y, kept("y"), limit, "y")
    # With one value per channel and class the exact gradient nearly cancels; float32 keeps fewer digits of it.
    loose = 1e-6 if exact else 1e-4
    assert_close(grads[1], kept("dx"), loose, "dx")
    assert_close(grads[0]["scale"], kept("dweights"), loose, "dweights")
    assert_close(grads[0]["bias"], kept("dbiases"), loose, "dbiases")
    assert_close(stats["mean"], kept("running_mean_after"), limit, "running mean")
    assert_close(stats["var"], kept("running_var_after"), limit, "running var")
    variables["batch_stats"] = stats
  now = section(arrays, "eval/")
  y, _ = nets.forward(layer, variables, jnp.asarray(nhwc(now["x"]), dtype), jnp.asarray(now["labels"]), train=False)
  assert_close(y, nhwc(stored(now, "y", dtype)), 1e-6 if exact else 3e-6, "eval y")


@pytest.mark.parametrize(("file", "name"), [("generator_d", "cifar"), ("generator_c", "dcgan")])
def test_generators(golden, dtype, file, name):
  arrays = golden(file)

  def number(key):
    return int(arrays[f"cfg/{key}"].item())

  net = nets.generator(name, number("num_classes"), number("img_size"), number("nc"), number("ngf"))
  z, labels = jnp.asarray(arrays["z"].reshape(-1, number("nz")), dtype), jnp.asarray(arrays["labels"])
  variables = cast(convert.generator_from_torch(section(arrays, "sd/"), shapes(net, z, labels)), dtype)
  limit = 1e-6 if dtype == np.float64 else 3e-6
  images, _ = jitted_forward(net, train=False)(variables, z, labels)
  assert_close(images, nhwc(stored(arrays, "eval/images", dtype)), limit, "eval")
  images, stats = jitted_forward(net, train=True)(variables, z, labels)
  assert_close(images, nhwc(stored(arrays, "train/images", dtype)), limit, "train")
  after = {**section(arrays, "sd/"), **section(arrays, "train/after/")}
  theirs = convert.generator_from_torch(after, shapes(net, z, labels))["batch_stats"]
  assert_trees_close(stats, theirs, 3e-6)


CLASSIFIERS = [
  ("wrn_16_1", "wrn_16_1", 10, ""),
  ("wrn_16_2", "wrn_16_2", 100, ""),
  ("wrn_16_2", "wrn_16_2", 100, "px64/"),
  ("wrn_40_1", "wrn_40_1", 10, ""),
  ("resnet18", "resnet18", 10, ""),
  ("resnet18", "resnet18", 10, "px64/"),
  ("vgg11_bn", "vgg11", 100, ""),
  ("vgg11_bn", "vgg11", 100, "px64/"),
  ("wrn_adapter", "wrn_16_1", 10, ""),
]


@pytest.mark.parametrize(("file", "name", "classes", "prefix"), CLASSIFIERS)
def test_classifiers(golden, dtype, file, name, classes, prefix):
  arrays = golden(file)
  net = nets.classifier(name, classes)
  if file == "wrn_adapter":
    net = FeatureHead(net, 128, normalise=False)
  x = jnp.asarray(nhwc(arrays[f"{prefix}x"]), dtype)
  like = shapes(net, x)
  variables = cast(convert.classifier_from_torch(section(arrays, "sd/"), like), dtype)
  limit = 1e-6 if dtype == np.float64 else 3e-6
  for mode in ("eval", "train"):
    out, stats = jitted_forward(net, train=mode == "train")(variables, x)
    assert_close(out.logits, stored(arrays, f"{prefix}{mode}/logits", dtype), limit, f"{mode} logits")
    assert_close(out.features, stored(arrays, f"{prefix}{mode}/features", dtype), limit, f"{mode} features")
  after = section(arrays, f"{prefix}train/after/")
  assert after
  theirs = convert.classifier_from_torch({**section(arrays, "sd/"), **after}, like)["batch_stats"]
  assert_trees_close(stats, theirs, 3e-6)


@pytest.mark.parametrize(
  ("file", "classes"), [("wrn_16_1", 10), ("wrn_16_2", 100), pytest.param("wrn_40_1", 10, marks=pytest.mark.slow)]
)
def test_batch_norm_statistics(golden, dtype, file, classes):
  arrays = golden(file)
  net = nets.classifier(file, classes)
  x = jnp.asarray(nhwc(arrays["x"]), dtype)
  teacher = cast(convert.classifier_from_torch(section(arrays, "sd/"), shapes(net, x)), dtype)

  @jax.jit
  def loss(x):
    statistics = nets.forward_observed(net, teacher, x).statistics
    each = [losses.bn_statistics(statistics.replace(seen={layer: seen})) for layer, seen in statistics.seen.items()]
    return losses.bn_statistics(statistics), each

  (total, per_layer), dx = jax.value_and_grad(loss, has_aux=True)(x)
  theirs = section(arrays, "bnloss/")
  limit = 1e-6 if dtype == np.float64 else 3e-6
  assert_close(total, np.reshape(stored(theirs, "total", dtype), ()), limit, "total")
  assert_close(np.sort(per_layer), np.sort(stored(theirs, "per_layer", dtype)), limit, "per layer")
  assert_close(dx, nhwc(stored(theirs, "dx", dtype)), 1e-6 if dtype == np.float64 else 2e-2, "dx")


SUPCON = ["main", "temp0.5", "nolabels", "one_class", "all_distinct", "unnormalised", "overflow"]


@pytest.mark.parametrize("case", SUPCON)
def test_supervised_contrast(golden, dtype, case):
  case_arrays = section(golden("losses"), f"supcon/{case}/")
  labels = jnp.asarray(case_arrays["labels"]) if "labels" in case_arrays else None
  temperature = float(case_arrays["temperature"].item())

  def function(f):
    return losses.supervised_contrast(f, labels, temperature)

  value, grad = jax.value_and_grad(function)(jnp.asarray(case_arrays["features"], dtype))
  if case == "overflow":  # the reference's float32 is nan here; ours is held against its float64
    limit, key = (1e-10 if dtype == np.float64 else 1e-5), "_f64"
  else:
    limit, key = (1e-10, "_f64") if dtype == np.float64 else (1e-5, "")
  assert_close(value, case_arrays[f"value{key}"].reshape(()), limit, "value")
  assert_close(grad, case_arrays[f"grad0{key}"], max(limit, 1e-7), "gradient")


LOSSES = {
  "kd": (losses.kl, ("t_logit", "s_logit")),
  "kd_neg": (lambda t, s: -losses.kl(t, s), ("t_logit", "s_logit")),
  "ikd_cifar10_G": (lambda t, s: losses.ikd(t, s, "log"), ("t_logit", "s_logit")),
  "ikd_cifar10_S": (lambda t, s: losses.l2(t, s, "log"), ("t_logit", "s_logit")),
  "ikd_mse_G": (losses.ikd, ("t_logit", "s_logit")),
  "ikd_mse_S": (losses.l2, ("t_logit", "s_logit")),
}


@pytest.mark.parametrize("case", LOSSES)
def test_logit_losses(golden, dtype, case):
  arrays = section(golden("losses"), f"{case}/")
  function, order = LOSSES[case]
  inputs = [jnp.asarray(arrays[key], dtype) for key in order]
  value, grads = jax.value_and_grad(lambda t, s: jnp.mean(function(t, s)), argnums=(0, 1))(*inputs)
  limit = 1e-10 if dtype == np.float64 else 1e-5
  assert_close(value, stored(arrays, "value", dtype).reshape(()), limit, "value")
  # The reference differentiates by (student, teacher).
  for grad, key in zip(grads, ("grad1", "grad0"), strict=True):
    theirs = stored(arrays, key, dtype)
    if np.any(theirs):
      assert_close(grad, theirs, max(limit, 1e-7), key)
    else:
      assert not np.any(grad), f"{key} is detached in the reference"


@pytest.mark.parametrize("double", [True, False])
def test_cross_entropy(golden, dtype, double):
  arrays = section(golden("losses"), "ce_double_softmax/" if double else "ce_plain/")

  def function(logits):
    return jnp.mean(losses.cross_entropy(logits, jnp.asarray(arrays["labels"]), double))

  value, grad = jax.value_and_grad(function)(jnp.asarray(arrays["logit"], dtype))
  limit = 1e-10 if dtype == np.float64 else 1e-5
  assert_close(value, stored(arrays, "value", dtype).reshape(()), limit, "value")
  assert_close(grad, stored(arrays, "grad0", dtype), max(limit, 1e-7), "gradient")


@pytest.mark.parametrize("epochs", [30, 100, 600])
def test_learning_rates(golden, epochs):
  arrays = golden("lr")
  student, teacher = optim.published_student_lr(0.1, epochs), optim.cosine_per_epoch(0.1, epochs)
  np.testing.assert_allclose(student, arrays[f"student_lr/epochs{epochs}"], rtol=1e-12, atol=1e-15)
  np.testing.assert_allclose(teacher, arrays[f"teacher_lr/epochs{epochs}"], rtol=1e-12, atol=1e-15)
  outer = optim.milestones(1e-3, epochs, (50, 150), 0.1)
  theirs = arrays[f"outer_generator_optimizer_lr/epochs{epochs}"]
  assert theirs.shape == outer.shape
  np.testing.assert_allclose(outer, theirs, rtol=1e-12)
  schedule = optim.per_epoch(student, 7)
  for epoch in (0, epochs // 2, epochs - 1):
    for step in (0, 6):
      assert float(schedule(jnp.int32(epoch * 7 + step))) == pytest.approx(student[epoch], rel=1e-6)


# A full iteration: two generator steps G0, G1, then two student steps S0, S1, with all published options but half
# precision.

KEY = jax.random.key(0)  # nothing is drawn at random


def generator_update(setup, teacher, state, z, y):
  return algorithm.generator_update(setup, teacher, state, z, y, KEY)


def latent_gradient(setup, weights, teacher, state, z, y):
  """d L_G / dz, the terms weighted by `weights`."""
  state = with_weights(state, weights)
  loss = algorithm.generator_loss(setup, teacher, state)
  stats = {"generator": state.generator.batch_stats, "student": state.student.batch_stats}

  def of_latents(z):
    return loss({"generator": state.generator.params, LATENTS: z}, stats, (z, y), None, KEY)[0]

  return jax.grad(of_latents)(z)


def student_update(setup, teacher, state, z, y):
  given = types.SimpleNamespace(draw=lambda key, number: (z, y))
  state, batch = sources.fresh(setup.generator.net, given, len(y), move_statistics=True)(state, KEY, None)
  return algorithm.student_update(setup, teacher, state, batch, KEY)


PROGRAMS = (generator_update, latent_gradient, student_update)

# A categorical batch norm follows these biases: their gradient is zero, and rounding decides what sign-like Adam
# makes of it.
NO_GRADIENT = ("['conv1']['bias']", "['conv2']['bias']")


def recording(tx):
  """`tx`, with the last gradients in its state: a step's own program hands them out, and none is compiled for them."""
  keep = optax.GradientTransformation(lambda params: params, lambda grads, state, params=None: (grads, grads))
  return optax.chain(keep, tx)


@pytest.fixture
def replay(request, golden, dtype):
  """The setup of the stored iteration, its initial state, and what the reference made of it."""
  from cpsc_jax.configs import default

  init_name, result_name = request.param
  init, result = golden(init_name), golden(result_name)

  def number(key):
    return init[f"cfg/{key}"].item()

  config = default.get_config()
  config.reference = True
  config.student.net = "wrn_16_1"
  config.generator.latent_dim, config.generator.width = int(number("nz")), int(number("ngf"))
  config.schedule.batch_size = int(number("batch"))
  mesh, spec = make_mesh(), datasets.DATASETS["cifar10"]
  config = ml_collections.ConfigDict(resolve(config, spec, mesh).to_dict())
  config.precision = "float32"
  config.loss.ikd_form = "log" if result_name == "iter_cifar10" else "mse"
  config.student.schedule, config.student.warmup_epochs, config.schedule.epochs = "cosine", 0, 10**6  # lr stays 0.1
  teacher_name = "wrn_16_2" if "adapter" in init_name else "wrn_40_1"
  classes = int(number("num_classes"))
  spec = dataclasses.replace(spec, num_classes=classes)
  setup = experiment.build(config, spec, nets.classifier(teacher_name, classes), {}, mesh)
  players = {name: getattr(setup, name) for name in ("generator", "student")}
  recorded = {
    name: dataclasses.replace(player, optimiser=recording(player.optimiser)) for name, player in players.items()
  }
  setup = dataclasses.replace(setup, **recorded)
  image, latent_dim = jnp.zeros((2, 32, 32, 3)), config.generator.latent_dim
  latent = jnp.zeros((2, latent_dim)), jnp.zeros((2,), jnp.int32)
  like = types.SimpleNamespace(
    teacher=shapes(setup.teacher, image),
    student=shapes(setup.student.net, image),
    generator=shapes(setup.generator.net, *latent),
  )
  teacher = cast(convert.classifier_from_torch(section(init, "teacher/"), like.teacher), dtype)
  student = cast(convert.classifier_from_torch(section(init, "student/"), like.student), dtype)
  generator = cast(convert.generator_from_torch(section(init, "gen/"), like.generator), dtype)
  weights = {player: initial.weights(terms) for player, terms in setup.weights.items()}
  state = State(
    step=jnp.int32(0),
    key=KEY,
    generator=initial.train_state(generator, setup.generator.optimiser),
    student=initial.train_state(student, setup.student.optimiser),
    trained={},
    memory={},
    hyper=Hyper(**weights),
  )
  results = (
    section(result, "f64/") if dtype == np.float64 else {k: v for k, v in result.items() if not k.startswith("f64/")}
  )

  def drawn(step):
    return jnp.asarray(init[f"{step}/z"].reshape(-1, latent_dim), dtype), jnp.asarray(init[f"{step}/labels"])

  # In float64 XLA's own convolutions are most of the work, which is too much for code that is not optimised.
  options = {"xla_backend_optimization_level": 3} if dtype == np.float64 else None
  programs = {s.__name__: jax.jit(functools.partial(s, setup), compiler_options=options) for s in PROGRAMS}
  return types.SimpleNamespace(
    setup=setup,
    teacher=teacher,
    weights=setup.weights["generator"],
    state=state,
    init=init,
    result=results,
    drawn=drawn,
    programs=types.SimpleNamespace(**programs),
    like=like,
    exact=dtype == np.float64,
    dtype=dtype,
  )


NAMES = {
  "adversarial": "kd",
  "kd": "kd",
  "ikd": "ikd",
  "l2": "ikd",
  "bn": "bn",
  "scl": "scl",
  "ce": "ce",
  "total": "total",
}


def compare_terms(r, step, losses):
  terms = {**losses.terms, "total": losses.total}
  for name, value in terms.items():
    assert_close(value, r.result[f"{step}/loss/{NAMES[name]}"].reshape(()), 1e-9 if r.exact else 1e-5, f"{step} {name}")
  assert {NAMES[n] for n in terms} == {k.split("/")[-1] for k in r.result if k.startswith(f"{step}/loss/")}


def generator_tree(r, prefix, buffers=None):
  """A reference parameter dict of the generator as our tree; running statistics from `buffers` or the initial state."""
  filled = {**section(r.init, "gen/"), **(buffers or {}), **section(r.result, prefix)}
  return convert.generator_from_torch(filled, r.like.generator)


def student_tree(r, prefix):
  return convert.classifier_from_torch({**section(r.init, "student/"), **section(r.result, prefix)}, r.like.student)


def compare_generator_step(r, step, state):
  z, y = r.drawn(step)
  limit, deep = (1e-6, 1e-6) if r.exact else (1e-5, 2e-2)
  after, aux = r.programs.generator_update(r.teacher, state, z, y)

  def gradient(weights):
    return r.programs.latent_gradient(weights, r.teacher, state, z, y)

  compare_terms(r, step, aux.losses)
  teacher, student = aux.outputs["teacher"], aux.outputs["student"]
  for key, ours in (("t_logit", teacher.logits), ("s_logit", student.logits)):
    assert_close(ours, r.result[f"{step}/{key}"], limit, f"{step} {key}")
  assert_close(student.features, r.result[f"{step}/s_fea"], limit, "student features")
  assert_close(teacher.features, r.result[f"{step}/t_fea"], limit, "teacher features")
  if step == "G0":
    if not r.exact:  # kept in float32 only
      assert_close(aux.outputs["images"], nhwc(r.result["G0/fake"]), limit, "image")
    for name in r.weights:
      dz = gradient({other: float(other == name) for other in r.weights})
      assert_close(dz, r.result[f"G0/dz_term/{NAMES[name]}"].reshape(z.shape), deep, f"dz of {name}")
  dz = gradient(r.weights)
  assert_close(dz, r.result[f"{step}/dz"].reshape(z.shape), deep, f"{step} dz")
  skip = () if r.exact else NO_GRADIENT
  grads, _ = after.generator.opt_state
  assert_trees_close(grads, generator_tree(r, f"{step}/dgen/")["params"], deep, NO_GRADIENT)
  assert_trees_close(
    after.generator.params, generator_tree(r, f"{step}/gen_after/")["params"], 1e-6 if r.exact else 2e-2, skip
  )
  if f"{step}/z_after" in r.result:
    # The published code moves its latents once more by such an Adam, and then draws new ones.
    tx = r.setup.generator.optimiser
    latent = z + tx.update(dz, tx.init(z))[0]
    assert_close(latent, r.result[f"{step}/z_after"].reshape(z.shape), 1e-6 if r.exact else 1e-3, "latent after")
  return after


def compare_student_step(r, step, state):
  z, y = r.drawn(step)
  limit, deep = (1e-6, 1e-6) if r.exact else (1e-5, 2e-2)
  after, aux = r.programs.student_update(r.teacher, state, z, y)
  grads = dict(after.student.opt_state[0])
  compare_terms(r, step, aux.losses)
  assert_close(aux.outputs["student"].logits, r.result[f"{step}/s_logit"], limit, f"{step} s_logit")
  if f"{step}/dstudent/conv1.weight" not in r.result and f"{step}/dstudent/model.conv1.weight" not in r.result:
    assert step == "S1" and not r.exact  # the second student gradient is kept in float64 only
    return after
  theirs = student_tree(r, f"{step}/dstudent/")["params"]
  untouched = [str(n) for n in np.atleast_1d(r.result.get(f"{step}/dstudent_none", []))]
  if any("head" in name for name in untouched):
    ours_head, theirs = {k: grads.pop(k) for k in ("head_0", "head_2")}, {"net": theirs["net"]}
    assert not any(np.any(g) for g in jax.tree.leaves(ours_head))
  assert_trees_close(grads, theirs, deep)
  return after


@pytest.mark.parametrize(
  ("replay", "dtype"),
  [
    pytest.param(("iter_init", "iter_cifar10"), "float64", marks=pytest.mark.slow),
    pytest.param(("iter_init", "iter_cifar10"), "float32", marks=pytest.mark.slow),
    pytest.param(("iter_init", "iter_cifar100"), "float64", marks=pytest.mark.slow),
    pytest.param(("iter_init", "iter_cifar100"), "float32", marks=pytest.mark.slow),
    pytest.param(("iter_adapter_init", "iter_adapter_cifar100"), "float64", marks=pytest.mark.slow),
    pytest.param(("iter_adapter_init", "iter_adapter_cifar100"), "float32", marks=pytest.mark.slow),
  ],
  ids=lambda p: p if isinstance(p, str) else p[1],
  indirect=True,
)
def test_iteration(replay):
  """Chained in float64; in float32 each step starts from the stored state, since sign-like Adam amplifies rounding."""
  r, state = replay, replay.state
  state = compare_generator_step(r, "G0", state)
  buffers = section(r.result, "G0/student_buffers_after/")
  if buffers:
    theirs = convert.classifier_from_torch({**section(r.init, "student/"), **buffers}, r.like.student)["batch_stats"]
    assert_trees_close(state.student.batch_stats, theirs, 1e-6 if r.exact else 1e-5)

  def stored_generator(key):
    return state.generator.replace(params=cast(generator_tree(r, key)["params"], r.dtype))

  if not r.exact:
    state = state.replace(generator=stored_generator("G0/gen_after/"))
  state = compare_generator_step(r, "G1", state)
  if not r.exact:
    state = state.replace(generator=stored_generator("G1/gen_after/"))
  state = compare_student_step(r, "S0", state)
  if not r.exact:
    params = cast(student_tree(r, "S0/student_after/")["params"], r.dtype)
    assert_trees_close(state.student.params, params, 2e-2)
    grads = cast(student_tree(r, "S0/dstudent/")["params"], r.dtype)
    if "head_0" in grads:
      grads = {**grads, **{k: jax.tree.map(jnp.zeros_like, grads[k]) for k in ("head_0", "head_2")}}
    start = replay.state.student
    tx = r.setup.student.optimiser
    _, opt_state = tx.update(grads, tx.init(start.params), start.params)
    state = state.replace(student=state.student.replace(params=params, opt_state=opt_state))
  state = compare_student_step(r, "S1", state)
  final_student = convert.classifier_from_torch(section(r.result, "final/student/"), r.like.student)
  final_generator = convert.generator_from_torch(section(r.result, "final/gen/"), r.like.generator)
  limit = 1e-6 if r.exact else 2e-2
  assert_trees_close(state.student.variables, final_student, limit)
  assert_trees_close(state.generator.params, final_generator["params"], limit, () if r.exact else NO_GRADIENT)
  if r.exact:
    assert_trees_close(state.generator.batch_stats, final_generator["batch_stats"], limit)
