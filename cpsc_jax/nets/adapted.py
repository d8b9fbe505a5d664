"""Users' Flax modules that return plain logits, as nets that return an `Output`."""

import inspect
from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from cpsc_jax.errors import Refusal
from cpsc_jax.nets.layers import unit
from cpsc_jax.state import Output, at_least_float32

# What a module calls the argument that says whether it is trained, and the opposite.
TRAINS = ("train", "training", "is_training", "is_train", "train_mode")
EVALUATES = ("deterministic", "eval", "evaluate", "eval_mode", "inference", "is_eval", "test", "use_running_average")


class Adapted(nn.Module):
  """A module that returns logits (N, C) as one that returns an `Output`; its variables are the module's own.

  The features are the input of the last flax.linen.Dense that it calls. It has no stages.

  Attributes:
    flags: the arguments of the module that say whether it is trained; True for those that say the opposite.
  """

  wrapped_module: nn.Module  # this name is taken: no layer of the module may have it
  flags: tuple[tuple[str, bool], ...] = (("train", False),)

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
      logits = self.wrapped_module(x, **{name: train != opposite for name, opposite in self.flags})
    if isinstance(logits, Output):
      return logits
    if not isinstance(logits, jax.Array) or logits.ndim != 2:
      returned = f"an array of shape {logits.shape}" if isinstance(logits, jax.Array) else type(logits).__name__
      part = "[0]" if isinstance(logits, tuple | list) else "['logits']" if isinstance(logits, Mapping) else ".logits"
      lines = _subclass(self.wrapped_module, self.flags, f"return CALL{part}")
      raise Refusal(
        f"{_name(self.wrapped_module)} returned {returned}; expected logits of shape (N, classes) or an Output. A"
        f" subclass adapts it, with the same variables: {lines}"
      )
    if not called or called[-1][1].shape != logits.shape or called[-1][0].ndim != 2:
      lines = _subclass(
        self.wrapped_module, self.flags, "logits = CALL; return cpsc_jax.Output(logits, features=logits)"
      )
      raise Refusal(
        f"the features of {_name(self.wrapped_module)} cannot be found: it must end in a flax.linen.Dense on features"
        " (N, D), or return a cpsc_jax.Output. A subclass adapts it, with the same variables and, where it has them,"
        f" better features than its logits: {lines}"
      )
    features, _ = called[-1]
    wide = at_least_float32(features)
    logits = at_least_float32(logits)
    return Output(logits, unit(features), (), pooled=wide)


def adapt(module: nn.Module, image_shape: tuple[int, ...]) -> nn.Module:
  """A module that returns an `Output` for images (H, W, K) when called as (x, train): `module` itself or `Adapted`.

  The argument that says whether it is trained may have another of the customary names, TRAINS and EVALUATES, or be
  missing. Nothing is computed.

  Raises:
    Refusal: not a Flax module called with images and, if at all, such an argument, or one whose features cannot be
      found.
  """
  if not isinstance(module, nn.Module):
    raise Refusal(f"expected a flax.linen.Module, got {_name(module)}; PyTorch files go through 'cpsc-jax convert'.")
  flags = _flags(module)

  def returns(net, **arguments):
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    return jax.eval_shape(lambda x: net.init_with_output(rngs, x, **arguments)[0], jnp.zeros((2, *image_shape)))

  if flags == (("train", False),) and isinstance(returns(module, train=False), Output):
    return module
  adapted = Adapted(module, flags)
  returns(adapted, train=False)
  return adapted


def takes_flag(module: nn.Module) -> bool:
  """Whether a module as `adapt` returned it is told when it is trained."""
  return not isinstance(module, Adapted) or bool(module.flags)


def _flags(module):
  """The arguments of a module that say whether it is trained, each with whether it says the opposite."""
  parameters = list(inspect.signature(module.__call__).parameters.values())[1:]
  names = {p.name for p in parameters}
  if "train" in names or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
    flags = [("train", False)]
  else:
    flags = [(name, name in EVALUATES) for name in (*TRAINS, *EVALUATES) if name in names]
  told, plain = {name for name, _ in flags}, (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  more = [p.name for p in parameters if p.kind in plain and p.default is p.empty and p.name not in told]
  if more:
    raise Refusal(
      f"{_name(module)} must also be given {', '.join(more)}, but is called with images and whether it is trained. A"
      f" subclass adapts it, with the same variables: {_subclass(module, flags, 'return CALL', more)}"
    )
  return tuple(flags)


def _subclass(module, flags, body, more=()):
  """Three lines that adapt a module whose __call__ is not as expected."""
  name = _name(module)
  arguments = [*(f"{flag}={'not ' * opposite}train" for flag, opposite in flags), *(f"{each}=..." for each in more)]
  call = f"super().__call__({', '.join(['x', *arguments])})"
  return f"\nclass My{name}({name}):\n  def __call__(self, x, train):\n    {body.replace('CALL', call)}"


def _name(module):
  return type(module).__name__
