"""Devices and processes: one mesh with one axis, "data", over which batches are split; all else is replicated.

Every array of a run is global: it belongs to all devices of all processes, and a program computes the same on any
number of them. Only process 0 writes files and prints.
"""

import functools
import glob
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cpsc_jax import files
from cpsc_jax.errors import Refusal

Tree = Any

VARIABLES = ("CPSC_JAX_COORDINATOR", "CPSC_JAX_PROCESSES", "CPSC_JAX_PROCESS")  # HOST:PORT, number, index from 0
MEMBERS = "members"  # the axis of a mesh over which members of a sweep are split
MOST_SAID = 1000  # bytes of a refusal that other processes repeat
HEARTBEAT_SECONDS = 20  # after so long without a sign of life from one process, JAX ends them all


def start() -> None:
  """Connects to the other processes of this run, if there are any; must be called before any use of a device.

  The environment variables VARIABLES name them; without these, TPU pods and Slurm are recognised, and everything else
  is a run of one process.

  Raises:
    Refusal: some of the variables are missing or wrong, or the other processes cannot be reached.
  """
  given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
  if not (given or in_slurm() or on_tpu()):
    return
  where = {}
  if given:
    where = dict(zip(("coordinator_address", "num_processes", "process_id"), _checked(given), strict=True))
  jax.config.update("jax_enable_preemption_service", False)  # SIGTERM is handled by cpsc_jax.stop
  try:
    jax.distributed.initialize(
      **where, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS
    )
  except (RuntimeError, ValueError) as error:
    raise Refusal(f"cannot connect to the other processes of this run: {str(error).splitlines()[0]}") from error
  if _alone_on_its_node() and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
    # JAX has taken the task's index on its node for that of the one GPU that it may use.
    for flag in ("jax_cuda_visible_devices", "jax_rocm_visible_devices"):
      jax.config.update(flag, "all")


def _alone_on_its_node() -> bool:
  """Whether Slurm has started one task on each node."""
  tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS"))
  return tasks is not None and tasks == os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES"))


def in_slurm() -> bool:
  """Whether this is one of several tasks started by srun."""
  return "SLURM_STEP_NODELIST" in os.environ and int(os.environ["SLURM_NTASKS"]) > 1


def on_tpu() -> bool:
  """Whether this machine has TPU chips and their library."""
  return bool(importlib.util.find_spec("libtpu") and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def _checked(given: Mapping[str, str]) -> tuple[str, int, int]:
  """(HOST:PORT, number of processes, index of this one)."""
  missing = [name for name in VARIABLES if name not in given]
  if missing:
    raise Refusal(f"{', '.join(given)} set without {', '.join(missing)}; set all three or none.")
  address, *numbers = given.values()
  if not all(number.isdecimal() for number in numbers) or not int(numbers[1]) < int(numbers[0]) or ":" not in address:
    raise Refusal(
      f"{VARIABLES[0]} must be HOST:PORT, {VARIABLES[1]} a number of processes, and {VARIABLES[2]} the index of this"
      f" process, from 0 to that number less one; got {', '.join(given.values())}."
    )
  return address, int(numbers[0]), int(numbers[1])


def single_process() -> bool:
  """Whether this process is the only one of the run."""
  return jax.process_count() == 1


def lost_process(error: Exception) -> str:
  """The message to the user when a collective failed in a run of several processes."""
  return (
    f"process {jax.process_index()} lost contact with another process ({str(error).splitlines()[0][:200]}); JAX prints"
    f" which one within {HEARTBEAT_SECONDS} s; run the same command on all processes again to resume from the last"
    " checkpoint."
  )


def is_primary() -> bool:
  """Whether this is process 0, the one that writes files and prints."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until all processes have called it; `name` must be the same on all and appears in error messages."""
  multihost_utils.sync_global_devices(name)


def device_memory() -> int:
  """Bytes of memory of the first device; of a CPU those of the machine; 0 where it is not known."""
  device = jax.devices()[0]
  if device.platform == "cpu":
    return files.memory()
  return (device.memory_stats() or {}).get("bytes_limit", 0)


def primary_first(work: Callable[[], object]) -> None:
  """Calls `work` on process 0 and then on all others, which find the files that process 0 made.

  Raises:
    Refusal: `work` has raised one, on all processes, so that all end alike and each tells the reason.
  """
  for turn in (True, False):
    refusal = None
    if is_primary() == turn:
      try:
        work()
      except Refusal as error:
        refusal = error
    reasons = _of_all(str(refusal or ""))
    if refusal:
      raise refusal
    if any(reasons):
      raise Refusal(next(filter(None, reasons)))


def _of_all(text: str) -> list[str]:
  """The first MOST_SAID bytes of a text of each process, on all of them."""
  if single_process():
    return [text]
  encoded = np.frombuffer(text.encode()[:MOST_SAID], np.uint8)
  rows = multihost_utils.process_allgather(np.pad(encoded, (0, MOST_SAID - len(encoded))))
  return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def broadcast(value: int) -> int:
  """The value of process 0, on all processes."""
  return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def any_process(flag: bool) -> jax.Array | bool:
  """Whether the flag is set on any process. The result is computed asynchronously: read it later."""
  if single_process():
    return flag
  mesh = make_mesh()
  flags = jax.make_array_from_process_local_data(batch_sharding(mesh), np.full(jax.local_device_count(), flag))
  return _any(replicated(mesh))(flags)


@functools.cache
def _any(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
  return jax.jit(jnp.any, out_shardings=sharding)


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of the given devices, by default all, along one axis named "data"."""
  devices = jax.devices() if devices is None else devices
  return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def members_mesh() -> Mesh:
  """All devices along the axis MEMBERS; the axis "data" has size 1, so that each device has whole batches."""
  devices = jax.devices()
  return jax.make_mesh((len(devices), 1), (MEMBERS, "data"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def by_member(mesh: Mesh) -> NamedSharding:
  """The sharding of a `members_mesh` that splits arrays along their first axis."""
  return NamedSharding(mesh, PartitionSpec(MEMBERS))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding that puts whole arrays on every device."""
  return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Tree, mesh: Mesh) -> Tree:
  """The same tree with its arrays, equal on all processes, on every device of the mesh."""
  return place(tree, replicated(mesh))


def place(tree: Tree, shardings: Tree) -> Tree:
  """The same tree with its arrays, equal on all processes, placed by a sharding or by a prefix tree of shardings."""

  def put(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(put(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    if isinstance(x, jax.Array) and x.is_fully_addressable and not single_process():
      x = np.asarray(x)  # of an array on this process's devices, JAX 0.10 makes one whose shards cannot be saved
    return jax.device_put(x, sharding)

  return jax.tree.map(lambda sharding, part: jax.tree.map(lambda x: put(x, sharding), part), shardings, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The sharding that splits arrays over the devices along their first axis."""
  return axis_sharding(mesh, 0)


def axis_sharding(mesh: Mesh, axis: int) -> NamedSharding:
  """The sharding that splits arrays over the devices along one axis."""
  return NamedSharding(mesh, PartitionSpec(*[None] * axis, "data"))


def check_divisible(mesh: Mesh, what: str, batch_size: int) -> None:
  """Raises a Refusal, which calls the number `what`, unless `batch_size` splits evenly over the devices."""
  if batch_size < 1 or batch_size % mesh.size:
    raise Refusal(f"{what} must be a positive multiple of {mesh.size}, the number of devices, got {batch_size}.")
