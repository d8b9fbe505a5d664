"""The methods by name. A method is its named, weighted terms; a new one is a file here and a row."""

from cpsc_jax.errors import Refusal
from cpsc_jax.methods import cpsc

METHODS = {"cpsc": cpsc.method}


def method(config, train_head=False):
  """The terms of `config.method`; `train_head`: the student has a feature head that is to learn.

  Raises:
    Refusal: the method is unknown.
  """
  if config.method not in METHODS:
    raise Refusal(f"no method '{config.method}'; choose one of {', '.join(METHODS)}.")
  return METHODS[config.method](config, train_head)
