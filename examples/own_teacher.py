"""Distils a teacher of your own: python examples/own_teacher.py [CONFIG]

The teacher is a Flax module that returns plain logits. It is trained here on scikit-learn's digits, in place of a model
that you already have. CONFIG is "digits" unless you name another; "digits:smoke" takes seconds.
"""

import sys

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits

import cpsc_jax

MEAN, STD = 0.3, 0.4  # how this teacher's input is normalised


class Teacher(nn.Module):
  """Two convolutions and a linear layer: images (N, 8, 8, 1) -> logits (N, 10)."""

  @nn.compact
  def __call__(self, x, train: bool):
    for width in (32, 64):
      x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
    return nn.Dense(10)(x.mean(axis=(1, 2)))


def train_teacher(module, images, labels, steps=300, batch_size=64):
  """Trains the module on images (N, 8, 8, 1) uint8 with labels (N,) and returns its variables."""
  x, adam, order = (images / 255 - MEAN) / STD, optax.adam(3e-3), np.random.default_rng(0)
  variables = module.init(jax.random.key(0), x[:2], train=True)

  @jax.jit
  def step(variables, moments, x, y):
    def loss(variables):
      logits = module.apply(variables, x, train=True)
      return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    updates, moments = adam.update(jax.grad(loss)(variables), moments)
    return optax.apply_updates(variables, updates), moments

  moments = adam.init(variables)
  for _ in range(steps):
    rows = order.choice(len(x), batch_size)
    variables, moments = step(variables, moments, x[rows], labels[rows])
  return variables


def main(config="digits"):
  """Trains a teacher, distils it and returns the `cpsc_jax` run."""
  digits = load_digits()
  images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
  labels = digits.target.astype(np.int32)
  module = Teacher()
  variables = train_teacher(module, images[:1343], labels[:1343])

  run = cpsc_jax.distill(
    teacher=(module, variables),
    student="wrn_10_1",
    image_shape=(8, 8, 1),
    num_classes=10,
    mean=[MEAN],
    std=[STD],
    test=(images[1343:], labels[1343:]),  # to measure the student; it does not learn from these
    config=config,
  )
  print(f"teacher {run.results['teacher']['accuracy']:.4f}, student {run.accuracy:.4f}")
  return run


if __name__ == "__main__":
  main(*sys.argv[1:])
