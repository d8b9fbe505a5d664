"""python tests/diagnosis_worker.py OUT.npz DATA: one state diagnosed on one device and on all; run by test_diagnostics.

Writes every array, under its name behind the number of devices.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from spmd_worker import smoke_config
from test_diagnostics import Tiny

from cpsc_jax import datasets, experiment, mesh, nets, streams
from cpsc_jax.config import resolve
from cpsc_jax.measures import Measures
from cpsc_jax.teach import Teacher


def diagnose(devices, data):
  """{name: array} of a state before the first iteration."""
  spec, config = data.spec, smoke_config("cpsc")
  nets.NETS["tiny"] = lambda num_classes, dtype=None: nets.adapt(Tiny(), spec.image_shape)
  config.student.net = config.teacher.net = "tiny"
  config.evaluate.gradients = True
  config = resolve(config, spec, devices)
  net = nets.classifier("tiny", spec.num_classes)
  card = {"net": "tiny", "num_classes": 10, "mean": [0.3], "std": [0.4]}
  setup = experiment.build(config, spec, net, card, devices)
  variables = mesh.replicate(nets.init(net, jax.random.key(5), jnp.zeros((2, *spec.image_shape))), devices)
  state = experiment.initial_state(config, setup, streams.root(0), spec.image_shape, None)
  test = data.load_evaluation("test").put(mesh.replicated(devices))
  return jax.device_get(Measures(config, setup, Teacher(net, variables, card), test).diagnose(state, 1))


def main(out, data_dir):
  data, found = datasets.find("digits", data_dir), {}
  for number in (1, jax.device_count()):
    for name, value in diagnose(mesh.make_mesh(jax.devices()[:number]), data).items():
      for key, array in value.items() if isinstance(value, dict) else (("", value),):
        found[f"{number} {name}{key}"] = array
  np.savez(out, **found)


if __name__ == "__main__":
  main(*sys.argv[1:])
