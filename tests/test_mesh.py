"""Arrays on a mesh, of one process and of two; whole runs of several processes are tested in test_spmd."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from jax.sharding import PartitionSpec

from cpsc_jax import mesh
from cpsc_jax.errors import Refusal


def test_trees_are_placed_with_keys_and_none():
  whole = mesh.make_mesh()
  everywhere, split = mesh.replicated(whole), mesh.batch_sharding(whole)
  tree = {
    "key": jax.random.key(1),
    "none": None,
    "memory": {"bank": np.zeros((whole.size, 2)), "empty": ()},
    "scale": 2.0,
  }
  placed = mesh.place(tree, {"key": everywhere, "none": everywhere, "memory": split, "scale": everywhere})
  assert jax.tree.structure(placed) == jax.tree.structure(tree)
  assert jax.random.key_data(placed["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
  assert placed["memory"]["bank"].sharding.spec == PartitionSpec("data") and placed["scale"].sharding == everywhere
  replicated = mesh.replicate(tree, whole)
  assert jax.tree.structure(replicated) == jax.tree.structure(tree)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(replicated))
  assert mesh.axis_sharding(whole, 1).spec == PartitionSpec(None, "data")


def test_batches_must_divide_evenly():
  one = mesh.make_mesh(jax.devices()[:1])
  mesh.check_divisible(one, "config.batch_size", 7)
  with pytest.raises(Refusal, match="config.batch_size must be a positive multiple of 1, the number of devices, got 0"):
    mesh.check_divisible(one, "config.batch_size", 0)


def test_one_process_needs_no_other():
  assert mesh.single_process() and mesh.is_primary()
  assert mesh.any_process(True) is True and mesh.any_process(False) is False
  assert mesh.broadcast(5) == 5
  calls = []
  mesh.primary_first(lambda: calls.append(1))
  assert calls == [1]


TWO_PROCESSES = r"""
import sys
import jax, jax.numpy as jnp, numpy as np
from cpsc_jax import checkpoint, mesh
from cpsc_jax.errors import Refusal
mesh.start()
assert not mesh.single_process() and jax.process_count() == 2
assert mesh.broadcast(5 + jax.process_index()) == 5
assert mesh.any_process(jax.process_index() == 1) and not mesh.any_process(False)
devices = mesh.make_mesh()
tree = mesh.replicate({"key": jax.random.key(3), "none": None, "x": jnp.arange(4.0), "y": np.ones(2)}, devices)
checkpointer = checkpoint.Checkpointer(sys.argv[1])
checkpointer.save(1, tree, {"epoch": 1})
checkpointer.close()
checkpointer = checkpoint.Checkpointer(sys.argv[1])
back, record = checkpointer.restore(tree)
checkpointer.close()
assert record == {"epoch": 1} and checkpoint.digest(back) == checkpoint.digest(tree)
assert back["x"].sharding == tree["x"].sharding == mesh.replicated(devices)
def sign():
  with open(sys.argv[2], "a") as lines:
    lines.write(f"process {jax.process_index()}\n")
mesh.primary_first(sign)
for who in (0, 1):
  def refuse():
    if jax.process_index() == who:
      raise Refusal(f"process {who} does not see the folder")
  try:
    mesh.primary_first(refuse)
  except Refusal as refusal:
    assert str(refusal) == f"process {who} does not see the folder"
  else:
    raise AssertionError("only the other process was refused")
"""


def test_two_processes_save_what_was_just_placed(tmp_path):
  launcher = [sys.executable, REPOSITORY / "launch" / "local_processes.py", "--processes=2", "--restarts=0", "--"]
  order = tmp_path / "order"
  command = [*launcher, sys.executable, "-c", TWO_PROCESSES, tmp_path / "checkpoints", order]
  done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout[-3000:]
  assert order.read_text().splitlines() == ["process 0", "process 1"]


@pytest.mark.parametrize("nodes, devices", [(2, "all"), (1, "0")])
def test_a_task_that_has_its_node_alone_uses_all_its_gpus(nodes, devices):
  """Under Slurm, JAX gives each task the GPU of its index on the node, which is right for a task per GPU alone."""
  program = """
import jax
from cpsc_jax import mesh
mesh.start()
print(jax.process_count(), *(jax.config.values[f"jax_{kind}_visible_devices"] for kind in ("cuda", "rocm")))
"""
  common = {
    **{key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "CPSC_JAX_"))},
    "JAX_PLATFORMS": "cpu",
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": str(nodes),
  }
  started = [
    subprocess.Popen(
      [sys.executable, "-c", program],
      cwd=REPOSITORY,
      env={**common, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task if nodes == 1 else 0)},
      stdout=subprocess.PIPE,
      text=True,
    )
    for task in range(2)
  ]
  printed = [process.communicate()[0].splitlines()[-1] for process in started]
  assert printed[0] == f"2 {devices} {devices}"
  assert printed[1] == ("2 1 1" if nodes == 1 else printed[0])
