"""python tests/loop_worker.py WORKDIR never|once: a training of six trivial epochs, run by tests/test_spmd.py.

With "once", process 1 kills itself while epoch 5 is under way, the first time that it gets there.
"""

import json
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp

from cpsc_jax import mesh
from cpsc_jax.loop import Plan, train
from cpsc_jax.state import Losses


def main(workdir, dies):
  mesh.start()
  workdir, devices = pathlib.Path(workdir), mesh.make_mesh()

  @jax.jit
  def program(state):
    noise = jax.random.normal(jax.random.fold_in(state["key"], state["count"]), (8, 2))
    noise = jax.lax.with_sharding_constraint(noise, mesh.batch_sharding(devices))
    loss = jnp.full(3, jnp.mean(noise))
    losses = Losses(total=loss[:, None], terms={"ce": loss[:, None]})
    return {**state, "count": state["count"] + 1, "x": state["x"] + loss}, {"net": losses}

  def epoch(state):
    mark = workdir / "died"
    if dies == "once" and jax.process_index() == 1 and int(state["count"]) == 4 and not mark.exists():
      while not (workdir / "checkpoints" / "4").exists():
        pass
      mark.touch()
      os.kill(os.getpid(), signal.SIGKILL)
    return program(state)

  start = mesh.replicate({"count": jnp.int32(0), "x": jnp.ones(3), "key": jax.random.key(0)}, devices)
  measure = jax.jit(lambda state: {"accuracy": jnp.mean(state["x"])})
  outcome = train(Plan("test", epoch, measure, lambda state: state["x"], 6, 1, 2, 60.0, workdir), start)
  if mesh.is_primary():
    found = {"history": outcome.history, "best": outcome.best_epoch, "x": jax.device_get(outcome.state["x"]).tolist()}
    (workdir / "outcome.json").write_text(json.dumps(found))


if __name__ == "__main__":
  main(*sys.argv[1:])
