"""python tests/spmd_worker.py OUT.npz CONTRAST METHOD: twenty iterations in float64 on whatever devices there are.

Writes every logged term, (iterations, steps), and the student's parameters; run by tests/test_spmd.py.
"""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from cpsc_jax.configs import digits

from cpsc_jax import algorithm, datasets, distill, mesh, nets, settings

ITERATIONS = 20


def smoke_config(method):
  """The config of a method's run of seconds on the digits."""
  if method == "cpsc":
    return digits.get_config("smoke")
  return importlib.import_module(f"cpsc_jax.configs.{method}_cifar10").get_config("digits_smoke")


def main(out, contrast, method):
  mesh.start()
  jax.config.update("jax_enable_x64", True)
  devices = mesh.make_mesh()
  config = smoke_config(method)
  config.loss.contrast, config.loss.contrast_block = contrast, 24
  config = settings.resolve(config, devices)
  shape = datasets.describe("digits", "").image_shape
  teacher_net = nets.classifier("wrn_10_1", 10)
  game = distill.build_game(config, devices, teacher_net, {"net": "wrn_10_1", "num_classes": 10, "mean": 0, "std": 1})
  teacher = nets.init(teacher_net, jax.random.key(5), jnp.zeros((2, *shape)))
  double = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, tree)
  state = mesh.place(double(algorithm.initial_state(game, 0, shape)), algorithm.shardings(game))
  epoch = algorithm.compile_epoch(game, ITERATIONS)
  state, terms = epoch(state, mesh.replicate(double(teacher), devices))
  if game.method.inverts and devices.size > 1:
    assert not state.memory["pool"]["images"].sharding.is_fully_replicated
  terms, params = jax.device_get((terms, state.student.params))
  if mesh.is_primary():
    flat = lambda tree: {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    np.savez(out, devices=jax.device_count(), **flat({"terms": terms, "student": params}))


if __name__ == "__main__":
  main(*sys.argv[1:])
