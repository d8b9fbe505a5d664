"""The one way to take gradients: for the generator, the student and the teacher, under one policy."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from flax.training.dynamic_scale import DynamicScale

from cpsc_jax.nets.convolution import SAVED
from cpsc_jax.state import Losses, Tree


@dataclasses.dataclass(frozen=True)
class Policy:
  """How gradients are taken.

  Attributes:
    rematerialise: keep the outputs of convolutions only and compute everything else again in the backward pass.
    micro_batches: the batch is worked through in so many equal parts and their gradients averaged. A net's batch norm
      then normalises every part by itself, so that results equal those of the whole batch for nets without it.
  """

  rematerialise: bool = False
  micro_batches: int = 1


@struct.dataclass
class Aux:
  """What a loss returns beside its value.

  Attributes:
    losses: what is reported.
    stats: batch statistics after the forward pass.
    outputs: whatever else, each array with the batch as its first axis.
  """

  losses: Losses
  stats: Tree
  outputs: Tree


class Gradients(NamedTuple):
  """Gradients, what the loss returned beside them, the next loss scale, and whether all gradients are finite.

  Without a loss scale nothing is checked here and `finite` is None.
  """

  grads: Tree
  aux: Aux
  loss_scale: DynamicScale | None
  finite: jax.Array | None


def take(
  loss: Callable[[Tree, Tree, Tree, Tree, jax.Array], tuple[jax.Array, Aux]],
  params: Tree,
  stats: Tree,
  batch: Tree,
  key: jax.Array,
  policy: Policy,
  loss_scale: DynamicScale | None = None,
  constants: Callable[[Tree], Tree] = lambda batch: None,
) -> Gradients:
  """The gradients of loss(params, stats, batch, constants(batch), key) with respect to params.

  Args:
    loss: returns (scalar, Aux).
    stats: batch statistics; micro-batches hand them on from one to the next.
    batch: arrays whose first axis is the batch; `micro_batches` divides it.
    loss_scale: multiplies the loss, so that float16 gradients do not vanish, and is taken out of the gradients again.
    constants: what the loss needs of a batch and is not differentiated by `params`, such as the teacher's outputs; it
      is never rematerialised.
  """
  if policy.rematerialise:
    loss = rematerialised(loss)

  def on_part(stats: Tree, part: Tree, key: jax.Array) -> Gradients:
    given = constants(part)

    def of_params(params: Tree) -> tuple[jax.Array, Aux]:
      return loss(params, stats, part, given, key)

    if loss_scale is None:
      grads, aux = jax.grad(of_params, has_aux=True)(params)
      # Without it, Adam's two uses of a bfloat16 gradient each get an all-reduce of their own (XLA's for TPUs).
      return Gradients(jax.lax.optimization_barrier(grads), aux, None, None)
    scale, finite, (_, aux), grads = loss_scale.value_and_grad(of_params, has_aux=True)(params)
    return Gradients(grads, aux, scale, finite)

  if policy.micro_batches == 1:
    return on_part(stats, batch, key)
  return _accumulated(on_part, params, stats, batch, key, policy.micro_batches)


def rematerialised(loss: Callable) -> Callable:
  """`loss`, which keeps the outputs of convolutions for its backward pass and computes everything else again."""
  return jax.checkpoint(loss, policy=jax.checkpoint_policies.save_only_these_names(SAVED))


def initial_loss_scale() -> DynamicScale:
  return DynamicScale(fin_steps=jnp.zeros((), jnp.int32), scale=jnp.asarray(2.0**16, jnp.float32))


def keep_finite(finite: jax.Array | None, new: Any, old: Any) -> Any:
  """`new`, or `old` where the gradients behind `new` were not finite."""
  if finite is None:
    return new
  return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)


def _accumulated(
  on_part: Callable[..., Gradients], params: Tree, stats: Tree, batch: Tree, key: jax.Array, parts: int
) -> Gradients:
  """The mean over micro-batches; row i of the batch goes to part i % parts, so that devices share every part."""

  def split(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)

  def joined(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  def add(carry: tuple, inputs: tuple) -> tuple:
    stats, total = carry
    got = on_part(stats, *inputs)
    total = jax.tree.map(lambda a, b: a + b / parts, total, got.grads)
    return (got.aux.stats, total), (got.aux.losses, got.aux.outputs, got.loss_scale, got.finite)

  zeros = jax.tree.map(jnp.zeros_like, params)
  inputs = jax.tree.map(split, batch), jax.random.split(key, parts)
  (stats, grads), (losses, outputs, scales, finite) = jax.lax.scan(add, (stats, zeros), inputs)
  aux = Aux(jax.tree.map(lambda x: jnp.mean(x, axis=0), losses), stats, jax.tree.map(joined, outputs))
  # A part that overflows lowers its scale and restarts its count, so the smallest of all is what should come next.
  scale = jax.tree.map(lambda x: jnp.min(x, axis=0), scales)
  return Gradients(grads, aux, scale, None if finite is None else jnp.all(finite))
