"""The policy of gradients: precision, loss scale, rematerialisation, micro-batches; and whole epochs under vmap."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from parity import assert_trees_close
from test_algorithm import KEY, SHAPE, equal, make_setup

from cpsc_jax import algorithm, gradients, initial, nets
from cpsc_jax.gradients import Policy
from cpsc_jax.state import Batch, Output

PLAYERS = ("generator", "student")


def double(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


class Plain(nn.Module):
  """A net without batch norm."""

  @nn.compact
  def __call__(self, x, train: bool):
    for width in (8, 16):
      x = nn.relu(nn.Conv(width, (3, 3), param_dtype=x.dtype)(x))
    return nets.outputs(x, [x], 10, "fc")


# Members of a sweep.


@pytest.mark.slow
def test_epochs_of_three_members_under_vmap_equal_three_runs():
  """Members differ in seed, in weights and in learning-rate factor."""
  with jax.enable_x64(True):
    setup, teacher, _ = make_setup()
    teacher, run = double(teacher), algorithm.epoch(setup, 2)

    def member(seed, ce, kd, lr):
      state = double(initial.state(setup, jax.random.key(seed), SHAPE))
      generator = state.hyper.generator.replace(terms={**state.hyper.generator.terms, "ce": ce})
      student = state.hyper.student.replace(terms={**state.hyper.student.terms, "kd": kd}, lr=lr)
      return state.replace(hyper=state.hyper.replace(generator=generator, student=student))

    members = [
      member(seed, *map(jnp.float64, numbers)) for seed, *numbers in ((0, 0.7, 1, 1), (1, 4, 1, 0.5), (2, 0, 2, 2))
    ]
    together, losses = jax.jit(jax.vmap(run, in_axes=(0, None)))(
      jax.tree.map(lambda *x: jnp.stack(x), *members), teacher
    )
    alone = jax.jit(run)
    students = []
    for index, state in enumerate(members):
      state, own = alone(state, teacher)
      mine = jax.tree.map(lambda x, i=index: x[i], (together.student.variables, losses))
      assert_trees_close(mine[0], state.student.variables, 1e-9)
      assert_trees_close(mine[1], own, 1e-9)
      students.append(state.student.params)
    assert not equal(students[0], students[1])


# Rematerialisation.


def updates(setup, teacher, state):
  """{player: (its update as a program of the state)}."""
  z, y = setup.method.noise.draw(jax.random.key(2), 12)
  x = jax.random.normal(jax.random.key(3), (12, *SHAPE), state.student.params["fc"]["kernel"].dtype)
  return {
    "generator": jax.jit(lambda s: algorithm.generator_update(setup, teacher, s, z.astype(x.dtype), y, KEY)[0]),
    "student": jax.jit(lambda s: algorithm.student_update(setup, teacher, s, Batch(x, y), KEY)[0]),
  }


def plainly_descending(setup):
  """The setup with gradient descent for both players: Adam would blow up the rounding of gradients that are zero."""
  players = {name: dataclasses.replace(getattr(setup, name), optimiser=optax.sgd(0.1)) for name in PLAYERS}
  return dataclasses.replace(setup, **players)


@pytest.mark.slow
def test_rematerialisation_changes_nothing_but_memory():
  with jax.enable_x64(True):
    (setup, teacher, _), (remat, *_) = make_setup(), make_setup(rematerialise=True)
    setup, remat = plainly_descending(setup), plainly_descending(remat)
    teacher, state = double(teacher), double(initial.state(setup, jax.random.key(0), SHAPE))
    for player, update in updates(setup, teacher, state).items():
      want, got = update(state), updates(remat, teacher, state)[player](state)
      assert_trees_close(getattr(got, player).params, getattr(want, player).params, 1e-9)


def student_loss_of(net):
  def loss(params, stats, batch, _, key):
    out, stats = nets.forward(net, {"params": params, "batch_stats": stats}, batch[0], train=True)
    value = jnp.mean(out.logits[jnp.arange(batch[1].size), batch[1]])
    return value, gradients.Aux(algorithm.Losses(value, {}), stats, {})

  return loss


def size(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def test_memory_that_rematerialisation_and_micro_batches_save():
  """Of a student update on 128 CIFAR images: what is kept for the backward pass, and what a program takes.

  The former is what accelerators save; the compiler of the CPU undoes rematerialisation, so there it is no use.
  """
  net = nets.classifier("wrn_16_1", 10)
  loss = student_loss_of(net)
  batch = jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
  variables = jax.eval_shape(lambda: nets.init(net, KEY, jnp.zeros((2, 32, 32, 3))))
  arguments = variables["params"], variables["batch_stats"], batch

  def kept(rematerialise):
    f = gradients.rematerialised(loss) if rematerialise else loss
    return size(jax.eval_shape(lambda p, s, b: jax.vjp(lambda p: f(p, s, b, None, KEY)[0], p)[1], *arguments))

  def taken(policy):
    take = jax.jit(lambda p, s, b: gradients.take(loss, p, s, b, KEY, policy).grads)
    return take.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

  whole, remat, program, divided = kept(False), kept(True), taken(Policy()), taken(Policy(micro_batches=4))
  print(f"kept MiB: {whole / 2**20:.0f}, rematerialised {remat / 2**20:.0f}")
  print(f"program MiB: {program / 2**20:.0f}, in 4 micro-batches {divided / 2**20:.0f}")
  assert remat < 0.5 * whole and divided < 0.5 * program


# Micro-batches.


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_equal_the_whole_batch_without_batch_norm(parts):
  with jax.enable_x64(True):
    setup, teacher, _ = make_setup()
    teacher = double(teacher)
    whole = dataclasses.replace(setup, student=dataclasses.replace(setup.student, net=Plain()))
    policy = Policy(micro_batches=parts)
    divided = dataclasses.replace(whole, student=dataclasses.replace(whole.student, policy=policy))
    state = double(initial.state(whole, jax.random.key(0), SHAPE))
    want, got = (updates(s, teacher, state)["student"](state) for s in (whole, divided))
    assert_trees_close(got.student.params, want.student.params, 1e-12)


def test_micro_batches_report_the_mean_and_every_row_counts_once():
  def loss(params, stats, batch, given, key):
    value = jnp.mean(params * batch + given)
    return value, gradients.Aux(algorithm.Losses(value, {"x": value}), stats + 1, {"rows": batch})

  batch = jnp.arange(8.0)
  got = gradients.take(loss, jnp.float32(3), 0, batch, KEY, Policy(micro_batches=4), constants=jnp.sum)
  assert float(got.grads) == pytest.approx(3.5) and int(got.aux.stats) == 4
  assert float(got.aux.losses.total) == pytest.approx(3 * 3.5 + batch.sum() / 4)
  np.testing.assert_array_equal(got.aux.outputs["rows"], batch)


# Precision.


@pytest.mark.parametrize("precision", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_keeps_parameters_statistics_and_losses_in_float32(precision):
  setup, teacher, state = make_setup(precision=precision)
  assert (state.student.loss_scale is None) == (precision == "bfloat16")
  after, losses = jax.jit(algorithm.epoch(setup, 1))(state, teacher)
  for part in (after.generator.variables, after.student.variables, losses):
    assert all(leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(part))
  x = jnp.ones((2, *SHAPE))
  net, variables = nets.deployed(setup.student.net, after.student.variables)
  text = str(jax.make_jaxpr(lambda x: net.apply(variables, x, train=False))(x))
  dtype = {"bfloat16": "bf16", "float16": "f16"}[precision]
  assert not re.search(rf"\b{dtype}\[", text), "what is reported, saved and exported computes in float32"
  inside = str(jax.make_jaxpr(lambda x: setup.student.net.apply(after.student.variables, x, train=False))(x))
  assert re.search(rf"\b{dtype}\[", inside)


@pytest.mark.slow
def test_a_loss_scale_that_overflows_skips_the_update_and_halves():
  setup, teacher, state = make_setup(precision="float16")
  calm = jax.jit(algorithm.student_step(setup, teacher))(state, KEY)[0]
  assert not equal(calm.student.params, state.student.params)
  assert float(calm.student.loss_scale.scale) == float(state.student.loss_scale.scale)
  huge = state.student.loss_scale.replace(scale=jnp.float32(2.0**60))
  state = state.replace(student=state.student.replace(loss_scale=huge))
  after = jax.jit(algorithm.student_step(setup, teacher))(state, KEY)[0]
  assert equal(after.student.params, state.student.params) and equal(after.student.opt_state, state.student.opt_state)
  assert float(after.student.loss_scale.scale) == 2.0**59


def test_a_loss_scale_is_taken_out_of_the_gradients_again():
  def loss(params, stats, batch, given, key):
    value = jnp.sum(params * batch)
    return value, gradients.Aux(algorithm.Losses(value, {}), stats, {})

  scale = gradients.initial_loss_scale()
  for parts in (1, 2):
    got = gradients.take(loss, jnp.float32(2), (), jnp.ones(4), KEY, Policy(micro_batches=parts), scale)
    assert float(got.grads) * parts == pytest.approx(4.0) and bool(got.finite)
    assert got.loss_scale.scale.dtype == jnp.float32 and got.loss_scale.fin_steps.dtype == jnp.int32


# Nets that need more than images.


class Dropped(nn.Module):
  """A net whose logits depend on dropout in training."""

  @nn.compact
  def __call__(self, x, train: bool):
    x = nn.Dropout(0.5, deterministic=not train)(nn.Conv(4, (3, 3))(x))
    return nets.outputs(x, [x], 10, "fc")


def test_dropout_of_the_student_follows_the_key():
  setup, teacher, _ = make_setup()
  setup = dataclasses.replace(setup, student=dataclasses.replace(setup.student, net=Dropped()))
  state = initial.state(setup, jax.random.key(0), SHAPE)
  assert isinstance(Dropped().apply(state.student.variables, jnp.ones((2, *SHAPE)), train=False), Output)
  x, y = jnp.ones((12, *SHAPE)), jnp.arange(12) % 10
  update = jax.jit(lambda key: algorithm.student_update(setup, teacher, state, Batch(x, y), key)[0].student.params)
  one, again, other = update(jax.random.key(1)), update(jax.random.key(1)), update(jax.random.key(2))
  assert equal(one, again) and not equal(one, other)
