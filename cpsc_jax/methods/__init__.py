"""The methods by name. A method is its named, weighted terms; a new one is a file here and a row."""

import dataclasses

from cpsc_jax.errors import Refusal
from cpsc_jax.methods import cmi, cpsc, dafl, deepinversion, dfad, rgal, zskt

METHODS = {
  "cpsc": cpsc.method,
  "rgal": rgal.method,
  "dafl": dafl.method,
  "dfad": dfad.method,
  "zskt": zskt.method,
  "deepinversion": deepinversion.method,
  "cmi": cmi.method,
}


def method(config, train_head=False, split=None, whole=None):
  """The terms of `config.method`, and RGAL's two triplet terms, which any method may have.

  `train_head`: the student has a feature head that is to learn. `split` and `whole` are shardings, for terms that
  place large arrays: along the batch, and on every device.

  Raises:
    Refusal: the method is unknown, or a weight is not 0 whose term the method does not have.
  """
  if config.method not in METHODS:
    raise Refusal(f"no method '{config.method}'; choose one of {', '.join(METHODS)}.")
  found = METHODS[config.method](config, train_head, split, whole)
  generator, student = rgal.triplet_terms(config)
  found = dataclasses.replace(
    found, generator_terms={**found.generator_terms, **generator}, student_terms={**found.student_terms, **student}
  )
  for player, terms in (("generator", found.generator_terms), ("student", found.student_terms)):
    for name, weight in config.loss[player].items():
      if weight and name not in terms:
        raise Refusal(
          f"config.loss.{player}.{name} is {weight}, but method '{config.method}' has no such term: set it to 0. Its"
          f" terms are {', '.join(terms)}; the configs of the method have their weights."
        )
  return found
