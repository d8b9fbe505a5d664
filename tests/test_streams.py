"""Random streams: no two uses of a step share a key, in any method."""

import collections
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from spmd_worker import smoke_config

from cpsc_jax import algorithm, datasets, experiment, initial, mesh, nets, streams, teach
from cpsc_jax.config import resolve
from cpsc_jax.methods import METHODS
from cpsc_jax.setup import Player, Setup
from cpsc_jax.streams import Stream

CONSUMERS = ("normal", "uniform", "randint", "bernoulli", "permutation", "split", "fold_in", "bits")


def test_children_of_one_key_differ_whether_named_or_numbered():
  parent = streams.root(0)
  named = jnp.stack([jax.random.key_data(streams.key(parent, stream)) for stream in Stream])
  numbered = jax.random.key_data(jax.random.split(parent, 20_000))
  rows = np.concatenate([named, numbered, jax.random.key_data(parent)[None]])
  assert len(np.unique(rows, axis=0)) == len(rows)


def test_numbered_streams_follow_their_name():
  parent = streams.root(3)
  keys = streams.keys(parent, Stream.STUDENT_STEPS, 4)
  assert jnp.array_equal(
    jax.random.key_data(keys[2]), jax.random.key_data(streams.nth(parent, Stream.STUDENT_STEPS, 2))
  )
  assert not jnp.array_equal(jax.random.key_data(keys[2]), jax.random.key_data(streams.nth(parent, Stream.BEGIN, 2)))


def uses_of_keys(program, *arguments):
  """Every use of a key while `program` is traced: a list of (the key, what it was used for)."""
  uses = []

  def watched(name, function):
    def call(key, *args, **kwargs):
      use = name
      if name == "fold_in":
        use = (name, "a counter" if isinstance(args[0], jax.core.Tracer) else int(args[0]))
      if sys._getframe(1).f_globals["__name__"].startswith("cpsc_jax"):  # Flax looks after its own keys
        uses.append((key, use))
      return function(key, *args, **kwargs)

    return call

  with pytest.MonkeyPatch.context() as patch:
    for name in CONSUMERS:
      patch.setattr(jax.random, name, watched(name, getattr(jax.random, name)))
    jax.eval_shape(program, *arguments)
  return uses


def assert_no_key_serves_twice(uses, repeated=()):
  """`repeated`: streams whose draw is meant to be computed in two places, with the same outcome."""
  repeats = {("fold_in", streams.TAGS[stream]) for stream in repeated}
  by_key = collections.defaultdict(list)
  for key, use in uses:
    by_key[id(key)].append(use)
  for served in by_key.values():
    served = [use for use in served if use not in repeats] + sorted(repeats & set(served))
    assert len(set(served)) == len(served), f"one key is used twice for {served}"
    if any(not isinstance(use, tuple) for use in served):
      assert len(served) == 1, f"one key is drawn from and has other uses: {served}"
  assert by_key


def setup_of(method, **changes):
  config = smoke_config(method)
  config.update_from_flattened_dict(changes)
  devices, spec = mesh.make_mesh(), datasets.DATASETS["digits"]
  config = resolve(config, spec, devices)
  net = nets.classifier("wrn_10_1", 10)
  return experiment.build(config, spec, net, {"mean": [0.3], "std": [0.4]}, devices), net, spec


@pytest.mark.parametrize("method", METHODS)
def test_no_key_of_an_iteration_serves_twice(method):
  """Triplets of both players, crops of both, and a mixed source where there is a pool, so that every stream occurs."""
  changes = {"loss.generator.triplet": 0.1, "loss.student.triplet": 0.1, "generator.crop_pad": 1, "student.crop_pad": 1}
  if hasattr(METHODS[method], "INVERTS"):
    changes["pool.fresh_share"] = 0.5
  setup, net, spec = setup_of(method, **changes)
  image = jnp.zeros((2, *spec.image_shape))
  teacher = jax.eval_shape(lambda: nets.init(net, jax.random.key(0), image))

  def program(key, teacher):
    return algorithm.epoch(setup, 1)(initial.state(setup, key, spec.image_shape), teacher)

  uses = uses_of_keys(program, streams.root(0), teacher)
  # CMI's bank remembers the very views that its loss compared.
  assert_no_key_serves_twice(uses, repeated=[Stream.LOCAL_VIEWS] if method == "cmi" else [])


def test_no_key_of_training_on_real_data_serves_twice():
  setup, net, spec = setup_of("cpsc")
  split = datasets.Split(jnp.zeros((64, *spec.image_shape), jnp.uint8), jnp.zeros(64, jnp.int32))
  player = dataclasses.replace(setup.student, net=net, steps=3)
  method = teach.on_real_data({}, 16, player, split, {"mean": [0.3], "std": [0.4]}, setup.mesh)
  method = dataclasses.replace(method, student_terms=setup.method.student_terms)
  real = Setup(player, method, setup.mesh, {"student": setup.weights["student"]}, teacher=net)
  teacher = jax.eval_shape(lambda: nets.init(net, jax.random.key(0), jnp.zeros((2, *spec.image_shape))))
  assert isinstance(player, Player) and player.augment

  def program(key, teacher, split):
    return algorithm.epoch(real, 1)(initial.state(real, key, spec.image_shape), teacher, split)

  assert_no_key_serves_twice(uses_of_keys(program, streams.root(0), teacher, split))
