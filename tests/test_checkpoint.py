"""Checkpoints: whatever a state may hold comes back as it was, and what does not fit is refused."""

import gc
import json
import logging
import math
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale

from cpsc_jax import checkpoint, checksums, mesh, state
from cpsc_jax.errors import Refusal

TX = optax.adam(0.1)


def train_state(loss_scale=None, batch_stats=None):
  params = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3), "half": jnp.ones(2, jnp.bfloat16)}}
  return state.TrainState(params, batch_stats or {}, TX.init(params), loss_scale)


def example(generator=None, loss_scale=None, memory=None):
  """A `State` with everything that a state may hold: None, empty containers, keys, dataclasses, several types."""
  weights = state.Weights({"ce": jnp.float32(0.5)}, jnp.float32(1.0))
  return state.State(
    step=jnp.int32(7),
    key=jax.random.key(3),
    generator=generator,
    student=train_state(loss_scale, {"norm": {"mean": jnp.ones(3)}}),
    trained={},
    memory=memory,
    hyper=state.Hyper(generator=state.Weights({}, jnp.float32(1.0)), student=weights),
  )


STATES = {
  "training on real data": example(),
  "distillation": example(train_state(), memory=()),
  "float16": example(
    train_state(DynamicScale()), DynamicScale(growth_interval=5), {"images": jnp.zeros((2, 4), jnp.uint8)}
  ),
  "keys in memory": example(memory={"order": jax.random.split(jax.random.key(1), 3), "none": None}),
}


def saved(folder, tree, steps=(1,)):
  checkpointer = checkpoint.Checkpointer(folder)
  for step in steps:
    checkpointer.save(step, tree, {"history": [step]})
  checkpointer.close()


def restored(folder, like):
  checkpointer = checkpoint.Checkpointer(folder)
  try:
    return checkpointer.restore(like)
  finally:
    checkpointer.close()


def data(leaf):
  if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    leaf = jax.random.key_data(leaf)
  return np.asarray(leaf)


def as_shapes(tree):
  """The tree with shapes, types and shardings in place of its arrays."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.mark.parametrize("like", [lambda tree: tree, as_shapes], ids=["arrays", "shapes"])
@pytest.mark.parametrize("name", STATES)
def test_a_state_comes_back_as_it_was(name, like, tmp_path):
  tree = {"state": STATES[name], "best": {"params": {}, "accuracy": jnp.float32(0.25)}}
  tree = mesh.replicate(tree, mesh.make_mesh())
  saved(tmp_path, tree)
  back, record = restored(tmp_path, like(tree))
  assert record == {"history": [1]}
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  for (path, have), want in zip(jax.tree_util.tree_leaves_with_path(back), jax.tree.leaves(tree), strict=True):
    assert (have.dtype, have.shape, have.sharding) == (want.dtype, want.shape, want.sharding), path
    np.testing.assert_array_equal(data(have), data(want), err_msg=str(path))
  assert checkpoint.digest(back) == checkpoint.digest(tree)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons its other reads
def test_what_another_version_wrote_is_refused_and_kept(tmp_path):
  student = train_state()
  before = {"step": jnp.int32(7), "key": jax.random.key(0), "student": student, "critic": None, "memory": ()}
  saved(tmp_path, {"state": before})
  wider = student.replace(params={"dense": {**student.params["dense"], "kernel": jnp.zeros((2, 4))}})
  for like in (example(), {**before, "student": wider}):
    with pytest.raises(Refusal, match=f"{tmp_path}/1 is intact but cannot be restored .*another version"):
      restored(tmp_path, {"state": like})
    gc.collect()
  back, _ = restored(tmp_path, {"state": before})
  assert int(back["state"]["step"]) == 7


def test_a_damaged_checkpoint_is_deleted_and_the_one_before_is_used(tmp_path, caplog):
  assert restored(tmp_path, {"x": jnp.zeros(3)}) is None
  saved(tmp_path, {"x": jnp.arange(3.0)}, steps=(1, 2, 3))
  assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"], "the last two are kept"
  file = max((tmp_path / "3" / "tree").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1] + b"!")
  with caplog.at_level(logging.WARNING):
    _, record = restored(tmp_path, {"x": jnp.zeros(3)})
  assert record == {"history": [2]} and not (tmp_path / "3").exists()
  assert f"{tmp_path}/3 is damaged and was deleted" in caplog.text


def test_checksums_are_those_of_sha256sum(tmp_path):
  saved(tmp_path, {"x": jnp.arange(3.0)})
  folder = tmp_path / "1"

  def verify():
    return checksums.verify(folder, checkpoint.written_files(folder))

  assert verify() is None
  tool = ["sha256sum", "--check", "--strict", checksums.NAME]
  assert subprocess.run(tool, cwd=folder, capture_output=True, check=False).returncode == 0
  (folder / "more").write_text("")
  assert verify() == "not as in files.sha256: more" and checksums.verify(folder) is None
  checksums.write(folder, checkpoint.written_files(folder))
  assert verify() is None
  (folder / "more").unlink()
  assert verify() == checksums.verify(folder) == "not as in files.sha256: more"
  (folder / checksums.NAME).unlink()
  assert "No such file" in verify()


CARD = {"net": "wrn_10_1", "num_classes": 3, "image_size": 8, "channels": 1, "mean": [0.5], "std": [0.5]}


NOT_A_CARD = {  # by key: what none may say
  "num_classes": [0, -1, 2.5, "10", None, True, 2**30],
  "image_size": [0, -8, 8.0, "8", None, 10**9],
  "channels": [0, -1, 2, "1", None, 1.0],
  "mean": [[], [0.1, 0.2], ["a"], [None], [math.nan], [math.inf], 0.5, None, [True]],
  "std": [[], [0.0], [-0.1], [math.nan], ["a"], [0.1, 0.2], None],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NOT_A_CARD.items() for value in values])
def test_what_a_card_cannot_say(tmp_path, key, value):
  """Neither when it is saved, nor when it is read, whoever sealed it."""
  wrong = {**CARD, key: value}
  with pytest.raises(Refusal, match=rf"the card of .* says {key if key != 'channels' or value != 2 else 'mean'} "):
    checkpoint.save_net(tmp_path / "net", {"params": {}}, wrong)
  (tmp_path / checkpoint.CARD).write_text(json.dumps(checkpoint.sealed({**wrong, "digest": "0"})))
  with pytest.raises(Refusal, match=r"net\.json says "):
    checkpoint.read_card(tmp_path)


def test_a_card_that_was_changed_is_refused(tmp_path):
  """Every entry of it, one that is taken out or put in, and other bytes that still are JSON."""
  checkpoint.save_net(
    tmp_path / "net", {"params": {"kernel": jnp.arange(6.0)}}, {**CARD, "class_names": ["a", "b", "c"]}
  )
  path = tmp_path / "net" / checkpoint.CARD
  card = checkpoint.read_card(tmp_path / "net")
  others = [{**card, key: [0.25] if isinstance(value, list) else 7} for key, value in card.items()]
  others += [{k: v for k, v in card.items() if k != key} for key in card] + [
    {**card, "more": 1},
    {},
    [],
    None,
    3,
    "card",
  ]
  for other in others:
    path.write_text(json.dumps(other))
    with pytest.raises(Refusal, match=r"net\.json was changed since it was written"):
      checkpoint.read_card(tmp_path / "net")
  path.write_text(json.dumps(card))
  assert checkpoint.read_card(tmp_path / "net") == card


def test_a_net_is_saved_with_its_card_and_read_back(tmp_path):
  variables = {"params": {"kernel": jnp.arange(6.0)}}
  card = checkpoint.save_net(tmp_path / "net", variables, {**CARD, "note": "kept"})
  said = {**CARD, "note": "kept", "digest": card["digest"]}
  assert checkpoint.read_card(tmp_path / "net") == card == checkpoint.sealed(said)
  back, _ = checkpoint.load_net(tmp_path / "net", {**variables, "batch_stats": {}})
  np.testing.assert_array_equal(back["params"]["kernel"], np.arange(6.0))
  with pytest.raises(Refusal, match="cannot be read"):
    checkpoint.load_net(tmp_path / "net", {"params": {"other": jnp.zeros(6)}, "batch_stats": {}})
  (tmp_path / "net" / checkpoint.CARD).write_text(json.dumps(checkpoint.sealed({**card, "digest": "0"})))
  with pytest.raises(Refusal, match="its bytes do not match its digest"):
    checkpoint.load_net(tmp_path / "net", {**variables, "batch_stats": {}})
  with pytest.raises(Refusal, match="other lacks mean, std"):
    checkpoint.save_net(tmp_path / "other", variables, {k: v for k, v in CARD.items() if k not in ("mean", "std")})
  assert [path.name for path in tmp_path.iterdir()] == ["net"], "nothing incomplete is left"
  with pytest.raises(Refusal, match="no saved net in .*No such file"):
    checkpoint.read_card(tmp_path / "other")


def test_the_files_of_a_net_are_checked_before_its_arrays_are_read(tmp_path, monkeypatch):
  variables = {"params": {"kernel": jnp.arange(6.0)}, "batch_stats": {}}
  folder = tmp_path / "net"
  checkpoint.save_net(folder, variables, CARD)
  wider = {"params": {"kernel": jnp.zeros(7)}, "batch_stats": {}}
  with pytest.raises(Refusal, match=r"\['kernel'\] has shape \(6,\) in pieces of \(6,\), not \(7,\)"):
    checkpoint.load_net(folder, wider)
  sums = folder / "variables" / checksums.NAME
  kept = sums.read_text()
  sums.unlink()
  checkpoint.load_net(folder, variables)  # as one of an older version
  sums.write_text(kept)
  monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "restore", lambda *_: pytest.fail("it was read"))
  large = folder / "variables" / "manifest.ocdbt"
  whole = large.read_bytes()
  large.write_bytes(whole[:-1] + b"?")
  with pytest.raises(Refusal, match=f"cannot be read .*not as in files.sha256: .*{large.name}"):
    checkpoint.load_net(folder, variables)
  large.write_bytes(whole)
  os.truncate(large, 10**12)
  with pytest.raises(Refusal, match=r"its files have 1,000,000,\d+,\d+ bytes, and its net 24"):
    checkpoint.load_net(folder, variables)
  large.unlink()
  os.mkfifo(large)
  with pytest.raises(Refusal, match=f"{large.name} is no file"):
    checkpoint.load_net(folder, variables)
