"""Run configurations; importable as `cpsc_jax.configs`."""
