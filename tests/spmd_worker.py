"""python tests/spmd_worker.py OUT.npz SCL_FORM METHOD N: N iterations in float64 on whatever devices there are.

Writes every logged term, (iterations, steps), and the student's parameters; run by tests/test_spmd.py.
"""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from cpsc_jax.configs import digits, incremental_digits

from cpsc_jax import algorithm, config, datasets, experiment, initial, mesh, nets, streams, tasks


def smoke_config(method):
  """The config of a method's run of seconds on the digits."""
  if method == "cpsc":
    return digits.get_config("smoke")
  if method == "need":
    c = digits.get_config("smoke")
    c.generator.update({"prior": "need", "labels": "balanced"})
    return c
  if method == "incremental":
    return a_phase()
  return importlib.import_module(f"cpsc_jax.configs.{method}_cifar10").get_config("digits_smoke")


def a_phase():
  """A phase of class-incremental learning with all of its terms, six classes after four."""
  c = incremental_digits.get_config("smoke")
  c.incremental.update({"known": 4, "phases": 5, "batch_size": 16, "balance": "rdfcil", "refine": 1})
  every = ("local", "balanced", "classifier", "lwf", "old_logits", "old_features", "relation", "refine")
  c.loss.student.update(dict.fromkeys(every, 0.5))
  c.loss.generator.update(dict.fromkeys(("confident", "even", "moments", "smooth"), 0.5))
  c.student.net, c.student.inherit, c.student.steps = "wrn_10_1", True, 1
  return c


def double(tree):
  return jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)


def flat(tree):
  return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def main(out, scl_form, method, iterations):
  mesh.start()
  jax.config.update("jax_enable_x64", True)
  devices, spec = mesh.make_mesh(), datasets.DATASETS["digits"]
  c = smoke_config(method)
  c.loss.scl_form, c.loss.scl_block = scl_form, 24
  c = config.resolve(c, spec, devices)
  net, data = nets.classifier("wrn_10_1", tasks.of(c).known(c, spec)), ()
  setup = experiment.build(c, spec, net, {"mean": [0.0], "std": [1.0]}, devices)
  teacher = nets.init(net, jax.random.key(5), jnp.zeros((2, *spec.image_shape)))
  key = streams.key(streams.root(0), streams.Stream.DISTILLATION)
  if method == "incremental":
    images, labels = np.arange(50 * 64) % 251, 4 + np.arange(50) % 6
    split = datasets.Split(images.reshape(50, *spec.image_shape).astype(np.uint8), labels.astype(np.int32))
    setup = tasks.of(c).with_real(c, setup, 50, {"mean": [0.0], "std": [1.0]})
    data = ({"new": mesh.replicate(split, devices), "kept": None},)
    state = experiment.initial_state(c, setup, key, spec.image_shape, teacher)
    state = initial.placed(setup, double(jax.device_get(state)))
  else:
    state = initial.placed(setup, double(initial.state(setup, key, spec.image_shape)))
  epoch = algorithm.compile_epoch(setup, int(iterations), real_data=bool(data))
  state, losses = epoch(state, mesh.replicate(double(teacher), devices), *data)
  pool = setup.method.pool(state)
  if pool is not None and devices.size > 1:
    assert not pool.arrays["images"].sharding.is_fully_replicated
  losses, params, prior = jax.device_get((losses, state.student.params, state.prior))
  if mesh.is_primary():
    np.savez(out, devices=jax.device_count(), **flat({"terms": losses, "student": params, "prior": prior}))


if __name__ == "__main__":
  main(*sys.argv[1:])
