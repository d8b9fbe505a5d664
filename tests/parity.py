"""Helpers of the tests: reading reference arrays, the two measures of closeness, and a source's batch."""

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import nets


def nhwc(x):
  return np.moveaxis(x, 1, -1)


def section(arrays, prefix):
  """{rest of the key: array} of all keys that start with `prefix`."""
  return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def shapes(net, *inputs):
  """The shapes of a net's variables, as `convert` wants them."""
  tree = jax.eval_shape(lambda key: net.init(key, *inputs, train=True), jax.random.key(0))
  return {"params": tree["params"], "batch_stats": tree.get("batch_stats", {})}


def cast(tree, dtype):
  return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), tree)


def relative(ours, theirs):
  """Relative L2 distance."""
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
  return np.linalg.norm(ours - theirs) / max(np.linalg.norm(theirs), 1e-30)


def assert_close(ours, theirs, limit, what=""):
  distance = relative(ours, theirs)
  assert distance <= limit, f"{what}: relative L2 distance {distance:.3g} exceeds {limit:.3g}"


def assert_trees_close(ours, theirs, limit, skip=()):
  """Compares two trees of variables leaf by leaf; leaves whose path contains a word of `skip` are left out."""
  ours, theirs = (dict(jax.tree_util.tree_leaves_with_path(t)) for t in (ours, theirs))
  assert ours.keys() == theirs.keys()
  for path, leaf in ours.items():
    name = jax.tree_util.keystr(path)
    if not any(word in name for word in skip):
      assert_close(leaf, theirs[path], limit, name)


def with_weights(state, weights):
  """The state with other weights {name: number} of the generator's terms, perhaps arguments of a program.

  So one program serves each term alone and all together.
  """
  generator = state.hyper.generator.replace(terms={**state.hyper.generator.terms, **weights})
  return state.replace(hyper=state.hyper.replace(generator=generator))


def jitted_forward(net, train):
  return jax.jit(lambda variables, *inputs: nets.forward(net, variables, *inputs, train=train))


def drawn_by(source, state, key, data=None):
  """(state, images, labels) of a source's batch."""
  state, batch = jax.jit(source)(state, key, data)
  return state, batch.images, batch.labels
