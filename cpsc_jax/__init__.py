"""Data-free knowledge distillation in JAX: a smaller classifier from a trained one, without its data."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from cpsc_jax.api import Run, distill
  from cpsc_jax.state import Output

__all__ = ["Output", "Run", "distill"]


def __getattr__(name: str) -> Any:
  """Imports what is asked for only then, so that commands which need none of it start quickly."""
  if name in ("distill", "Run"):
    from cpsc_jax import api

    return getattr(api, name)
  if name == "Output":
    from cpsc_jax.state import Output

    return Output
  raise AttributeError(f"module 'cpsc_jax' has no attribute '{name}'")
