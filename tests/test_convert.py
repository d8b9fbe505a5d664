"""The PyTorch converter: names and layouts there and back, files of every format, hostile ones included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import shapes

from cpsc_jax import convert, nets


def random_variables(net, *inputs):
  """Variables of a net with no two equal numbers in a leaf."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.standard_normal(s.shape, np.float32), shapes(net, *inputs))


@pytest.mark.parametrize("name", ["wrn_16_1", "resnet18", "resnet50", "vgg11"])
def test_classifier_round_trip(name):
  net, x = nets.classifier(name, 7), jnp.zeros((2, 32, 32, 3))
  variables = random_variables(net, x)
  state = convert.to_torch(name, variables)
  back = convert.classifier_from_torch(state, shapes(net, x))
  jax.tree.map(np.testing.assert_array_equal, back, variables)
  assert all(state[key].dtype == np.int64 for key in state if key.endswith("num_batches_tracked"))


@pytest.mark.parametrize(("name", "size"), [("cifar", 32), ("dcgan", 64)])
def test_generator_round_trip(name, size):
  net, inputs = nets.generator(name, 5, size, 3, 4), (jnp.zeros((2, 12)), jnp.zeros((2,), jnp.int32))
  variables = random_variables(net, *inputs)
  back = convert.generator_from_torch(convert.to_torch(name, variables), shapes(net, *inputs))
  jax.tree.map(np.testing.assert_array_equal, back, variables)
