"""Users' Flax modules that return plain logits, as nets that return an `Output`."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp

from cpsc_jax.errors import Refusal
from cpsc_jax.nets.layers import unit
from cpsc_jax.state import Output, at_least_float32

MEND = "make it end in a flax.linen.Dense on features (N, D), or return a cpsc_jax.Output"


class Adapted(nn.Module):
  """A module that returns logits (N, C) as one that returns an `Output`; its variables are the module's own.

  The features are the input of the last flax.linen.Dense that it calls. It has no stages.
  """

  wrapped_module: nn.Module  # this name is taken: no layer of the module may have it

  def setup(self):
    nn.share_scope(self, self.wrapped_module)

  def __call__(self, x: jax.Array, train: bool) -> Output:
    called = []

    def watch(next_call, args, kwargs, context):
      result = next_call(*args, **kwargs)
      if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
        called.append((args[0], result))
      return result

    with nn.intercept_methods(watch):
      logits = self.wrapped_module(x, train=train)
    if not isinstance(logits, jax.Array) or logits.ndim != 2:
      returned = f"an array of shape {logits.shape}" if isinstance(logits, jax.Array) else type(logits).__name__
      raise Refusal(
        f"{_name(self.wrapped_module)} returned {returned}; expected logits of shape (N, classes) or an Output."
      )
    if not called or called[-1][1].shape != logits.shape or called[-1][0].ndim != 2:
      raise Refusal(f"the features of {_name(self.wrapped_module)} cannot be found: {MEND}.")
    features, _ = called[-1]
    wide = at_least_float32(features)
    logits = at_least_float32(logits)
    return Output(logits, unit(features), (), pooled=wide)


def adapt(module: nn.Module, image_shape: tuple[int, ...]) -> nn.Module:
  """A module that returns an `Output` for images (H, W, K): `module` itself if it does, else `Adapted(module)`.

  Nothing is computed.

  Raises:
    Refusal: not a Flax module called as (x, train=...), or one whose features cannot be found.
  """
  if not isinstance(module, nn.Module):
    raise Refusal(f"expected a flax.linen.Module, got {_name(module)}; PyTorch files go through 'cpsc-jax convert'.")
  parameters = inspect.signature(module.__call__).parameters.values()
  if not any(p.name == "train" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
    raise Refusal(
      f"{_name(module)} takes no argument 'train': define __call__(self, x, train), where train says whether dropout"
      " acts and batch norm uses the batch's own statistics."
    )

  def returns(net):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.eval_shape(lambda x: net.init_with_output(rngs, x, train=False)[0], jnp.zeros((2, *image_shape)))

  if isinstance(returns(module), Output):
    return module
  adapted = Adapted(module)
  returns(adapted)
  return adapted


def _name(module):
  return type(module).__name__
