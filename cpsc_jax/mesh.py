"""Devices and processes: one mesh with one axis, "data", over which batches are split; all else is replicated.

Every array of a run is global: it belongs to all devices of all processes, and a program means the same on any number
of them. Process 0 alone writes and speaks.
"""

import functools
import glob
import importlib.util
import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from cpsc_jax.errors import Refusal

VARIABLES = ("CPSC_JAX_COORDINATOR", "CPSC_JAX_PROCESSES", "CPSC_JAX_PROCESS")  # HOST:PORT, how many, which
HEARTBEAT_SECONDS = 20  # a process that is silent for so long is dead, and the job with it


def start():
  """Joins the other processes of this run, if there are any; must come before any use of a device.

  The three variables of VARIABLES say where the others are; without them TPU pods and Slurm are recognised, and
  everything else is a run of one process.

  Raises:
    Refusal: some of the variables are missing or make no sense, or the others cannot be reached.
  """
  given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
  if not (given or in_slurm() or on_tpu()):
    return
  where = {}
  if given:
    where = dict(zip(("coordinator_address", "num_processes", "process_id"), _checked(given), strict=True))
  jax.config.update("jax_enable_preemption_service", False)  # cpsc_jax.stop heeds SIGTERM
  try:
    jax.distributed.initialize(
      **where, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    raise Refusal(f"the processes of this run cannot be joined: {str(error).splitlines()[0]}") from error


def in_slurm():
  """Whether this is one of several tasks that srun has started."""
  return "SLURM_STEP_NODELIST" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1


def on_tpu():
  """Whether this machine has TPU chips and the library that drives them."""
  return bool(importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def _checked(given):
  missing = [name for name in VARIABLES if name not in given]
  if missing:
    raise Refusal(f"{', '.join(given)} set without {', '.join(missing)}; set all three or none.")
  address, *numbers = given.values()
  if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]) or ":" not in address:
    raise Refusal(f"{given} does not name a process: HOST:PORT, how many there are, and which of 0.. this is.")
  return address, *map(int, numbers)


def single_process():
  return jax.process_count() == 1


def lost_process(error):
  """What to tell the user when a collective fails in a run of several processes."""
  return (
    f"process {jax.process_index()} lost the others ({str(error).splitlines()[0][:200]}); JAX names the dead task here"
    f" within {HEARTBEAT_SECONDS} s; the same command on all processes resumes from the last checkpoint."
  )


def is_primary():
  """Whether this process is the one that writes and speaks."""
  return jax.process_index() == 0


def barrier(place):
  """Waits until all processes are here; `place` names the spot in messages."""
  multihost_utils.sync_global_devices(place)


def primary_first(work):
  """Process 0 does the work, then all others do: what is made once is then found."""
  if is_primary():
    work()
  barrier("process 0 is ready")
  if not is_primary():
    work()


def broadcast(value):
  """Process 0's value, an integer, on all processes."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(wish):
  """Whether any process wishes so: a scalar that is computed while the host goes on, to be read later."""
  if single_process():
    return wish
  mesh = make_mesh()
  wishes = jax.make_array_from_process_local_data(batch_sharding(mesh), np.full(jax.local_device_count(), wish))
  return _any(replicated(mesh))(wishes)


@functools.cache
def _any(sharding):
  return jax.jit(lambda wishes: wishes.any(), out_shardings=sharding)


def make_mesh(devices=None):
  """A mesh of all (or the given) devices along one axis named "data"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh):
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree, mesh):
  """Puts a tree of arrays, the same on all processes, on every device of the mesh."""
  return place(tree, replicated(mesh))


def place(tree, shardings):
  """Puts a tree of arrays, the same on all processes, where a sharding or a tree of them (or of prefixes) says."""

  def put(x, sharding):
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    return jax.device_put(x, sharding)

  return jax.tree.map(lambda sharding, part: jax.tree.map(lambda x: put(x, sharding), part), shardings, tree)


def batch_sharding(mesh):
  return axis_sharding(mesh, 0)


def axis_sharding(mesh, axis):
  """The sharding that splits arrays over the devices along one axis."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def check_divisible(mesh, what, batch_size):
  """Raises a Refusal unless `batch_size` splits evenly over the devices."""
  if batch_size < 1 or batch_size % mesh.size:
    raise Refusal(
      f"{what} is {batch_size}, which {mesh.size} devices cannot share evenly; set it to a multiple of {mesh.size}."
    )
