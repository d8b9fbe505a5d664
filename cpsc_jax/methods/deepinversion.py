"""DeepInversion, adaptive: Dreaming to Distill (Yin et al., CVPR 2020; arXiv 1912.08795). Its generator is `pixels`."""

import dataclasses

import jax
import jax.numpy as jnp

from cpsc_jax import losses
from cpsc_jax.errors import Refusal
from cpsc_jax.methods import inversion, terms
from cpsc_jax.methods.base import Parts
from cpsc_jax.setup import LATENTS, Method, Term
from cpsc_jax.state import State

INVERTS = True


def method(parts: Parts) -> Method:
  c = parts.config
  divergence = losses.mixture_divergence if c.loss.js_form == "clamped" else losses.jensen_shannon
  generator_terms = {
    "ce": terms.CE,
    "bn": terms.BN,
    "variation": Term(lambda v: losses.total_variation(v.images), couples_batch=True),
    "norm": Term(lambda v: losses.norm(v.images), couples_batch=True),
    "adversarial": terms.divergence(divergence),
  }
  base = inversion.inverting(parts, generator_terms, {"kd": terms.kd(c)})
  if not c.generator.clip_pixels:
    return base

  def observe(state: State, *seen) -> State:
    """As usual; then every pixel is brought back between black and white."""
    state = base.observe(state, *seen)
    pixels = state.trained[LATENTS]
    black, white = (
      jnp.asarray([(level - m) / s for m, s in zip(parts.mean, parts.std, strict=True)]) for level in (0.0, 1.0)
    )
    images = pixels.params.reshape(-1, *parts.image_shape)
    clipped = jnp.clip(images, black, white).reshape(pixels.params.shape)
    return state.replace(trained={**state.trained, LATENTS: pixels.replace(params=clipped)})

  return dataclasses.replace(base, observe=observe)


def check(config, mesh: jax.sharding.Mesh) -> None:
  inversion.check(config, mesh)
  if config.generator.clip_pixels and config.generator.net != "pixels":
    raise Refusal("config.generator.clip_pixels is for config.generator.net 'pixels'; set it to False.")
