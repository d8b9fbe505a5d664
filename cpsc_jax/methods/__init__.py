"""The methods by name. A method is its named, weighted terms; a new one is a file here and a row."""

from cpsc_jax.errors import Refusal
from cpsc_jax.methods import cpsc

METHODS = {"cpsc": cpsc.method}


def method(config, train_head=False, split=None, whole=None):
  """The terms of `config.method`; `train_head`: the student has a feature head that is to learn.

  `split` and `whole` are shardings, for terms that place large arrays: along the batch, and on every device.

  Raises:
    Refusal: the method is unknown.
  """
  if config.method not in METHODS:
    raise Refusal(f"no method '{config.method}'; choose one of {', '.join(METHODS)}.")
  return METHODS[config.method](config, train_head, split, whole)
