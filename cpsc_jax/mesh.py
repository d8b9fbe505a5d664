"""The device mesh: one axis, "data", over which batches are split; everything else is replicated."""

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cpsc_jax.errors import Refusal


def make_mesh(devices=None):
  """A mesh of all (or the given) devices along one axis named "data"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh):
  return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh):
  return NamedSharding(mesh, PartitionSpec("data"))


def check_divisible(mesh, what, batch_size):
  """Raises a Refusal unless `batch_size` splits evenly over the devices."""
  if batch_size < 1 or batch_size % mesh.size:
    raise Refusal(
      f"{what} is {batch_size}, which {mesh.size} devices cannot share evenly; set it to a multiple of {mesh.size}."
    )
