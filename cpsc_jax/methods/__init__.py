"""The methods by name. A method is its named terms and what it keeps; a new one is a file here, a row, and a config."""

import dataclasses
from types import ModuleType

import jax

from cpsc_jax.errors import Refusal
from cpsc_jax.methods import base, cmi, cpsc, dafl, deepinversion, dfad, fast, inversion, nayer, rgal, terms, zskt
from cpsc_jax.methods.base import Parts
from cpsc_jax.setup import Method, Term
from cpsc_jax.state import State

# name -> a module with method(parts) -> Method and, where the method has settings of its own, check(config, mesh)
METHODS: dict[str, ModuleType] = {
  "cpsc": cpsc,
  "rgal": rgal,
  "dafl": dafl,
  "dfad": dfad,
  "zskt": zskt,
  "deepinversion": deepinversion,
  "cmi": cmi,
  "fast": fast,
  "nayer": nayer,
}


def method(parts: Parts) -> Method:
  """The method of a config, with the terms that any method may have, and its active terms alone.

  Those are RGAL's two triplet terms and the student's `features`.

  Raises:
    Refusal: a weight is not 0 whose term the method does not have.
  """
  config = parts.config
  found = METHODS[config.method].method(parts)
  generator, student = rgal.triplet_terms(config)
  generator |= parts.more.get("generator", {})
  student |= {"features": terms.FEATURES, **parts.more.get("student", {})}
  return dataclasses.replace(
    found,
    generator_terms=active(config, "generator", {**found.generator_terms, **generator}),
    student_terms=active(config, "student", {**found.student_terms, **student}),
  )


def active(config, player: str, terms: dict[str, Term]) -> dict[str, Term]:
  """The terms whose weight in config.loss.PLAYER is not 0.

  Raises:
    Refusal: a weight without a term; or gradients of a term that couples the batch are to be accumulated.
  """
  weights, parts = config.loss[player], config[player].micro_batches
  for name, weight in weights.items():
    if weight and name not in terms and name != "head":
      raise Refusal(
        f"config.loss.{player}.{name} is {weight}, but method '{config.method}' has no such term; set it to 0. Its"
        f" terms are {', '.join(terms)}, and the configs of the method have their weights."
      )
    if weight and parts > 1 and name in terms and terms[name].couples_batch:
      raise Refusal(
        f"config.{player}.micro_batches is {parts}, but the term config.loss.{player}.{name} compares samples across"
        " the whole batch; set micro_batches to 1 or the weight to 0."
      )
  return {name: term for name, term in terms.items() if weights[name]}


def waiting_epochs(config) -> int:
  """Epochs at the start in which the student is not trained: the generator's warm-up, or FastDFKD's and NAYER's."""
  of_method = config.episodes.warmup // config.schedule.iterations if "episodes" in config else 0
  return max(config.generator.warmup_epochs, of_method)


def with_warmup(config, found: Method, iterations: int) -> Method:
  """The method with a student that waits during the warm-up, in epochs of `iterations`; without a generator as long."""
  number = iterations * (config.generator.warmup_epochs if found.waits else waiting_epochs(config))

  def waits(state: State) -> jax.Array:
    alone = state.step < number
    return alone | found.waits(state) if found.waits else alone

  return dataclasses.replace(found, waits=waits) if number else found


def check(config, mesh: jax.sharding.Mesh) -> None:
  """Refuses settings that the config's method cannot work with."""
  module = METHODS[config.method]
  if hasattr(module, "check"):
    module.check(config, mesh)
    return
  base.check(config, mesh)
  if config.generator.net == "pixels":
    raise Refusal(
      f"config.generator.net 'pixels' has no parameters to train, and method '{config.method}' trains its generator;"
      " choose another generator."
    )


__all__ = ["METHODS", "Parts", "check", "inversion", "method", "waiting_epochs", "with_warmup"]
