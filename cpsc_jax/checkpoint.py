"""Saving, verifying and restoring, through Orbax.

`Keeper` holds the resumable checkpoints of one training; `save_net` / `load_net` a finished network with what one has
to know to use it. Every array tree is saved with a digest of its own, because damaged bytes can restore silently.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from cpsc_jax.errors import Refusal, first_line

CARD = "net.json"
CARD_KEYS = ("net", "num_classes", "image_size", "channels", "mean", "std")


def digest(tree):
  """sha256 over the paths, types, shapes and bytes of all leaves, hex; typed PRNG keys count by their data."""
  total = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      leaf = jax.random.key_data(leaf)
    array = np.ascontiguousarray(np.asarray(leaf))
    total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    total.update(array.tobytes())
  return total.hexdigest()


class Keeper:
  """The last two checkpoints of a training, each a pytree and a JSON record, under `directory`."""

  def __init__(self, directory):
    quieten()
    self._manager = ocp.CheckpointManager(
      os.path.abspath(directory),
      options=ocp.CheckpointManagerOptions(max_to_keep=2, create=True, cleanup_tmp_directories=True),
    )

  def save(self, step, tree, record):
    """Starts writing step `step`; returns once the arrays are copied, the files follow in the background."""
    record = {**record, "digest": digest(tree)}
    self._manager.save(
      step, args=ocp.args.Composite(tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
    )

  def restore(self, like):
    """The newest intact (tree, record), or None; `like` gives structure, types and shardings.

    A checkpoint that cannot be read or whose digest differs is named in the log, deleted, and the one before it is
    used.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        found = self._manager.restore(
          step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        )
        if digest(found.tree) == found.record["digest"]:
          return found.tree, found.record
        reason = "its digest differs"
      except Exception as error:  # Orbax raises assorted types for damaged files
        reason = first_line(error)
      logging.getLogger("cpsc_jax").warning(
        "checkpoint %s of %s is damaged (%s)", step, self._manager.directory, reason
      )
      self._manager.delete(step)
    return None

  def wait(self):
    """Blocks until everything started is on disk."""
    self._manager.wait_until_finished()

  def close(self):
    self.wait()
    self._manager.close()


def save_net(directory, variables, card):
  """Writes variables (an Orbax checkpoint) and `card` (what the net is) to `directory`, whole or not at all.

  Variables without batch norm need no "batch_stats". The card names the net as in nets.NETS, the shape of its problem
  and how its input is normalised (CARD_KEYS); whatever else it says is kept.

  Raises:
    Refusal: the card lacks a key.
  """
  missing = [key for key in CARD_KEYS if key not in card]
  if missing:
    raise Refusal(f"the card of the net for {directory} lacks {', '.join(missing)}.")
  variables = {"batch_stats": {}, **variables}
  directory = pathlib.Path(directory).absolute()
  scratch = directory.with_name(directory.name + ".partial")
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir(parents=True)
  try:
    with ocp.StandardCheckpointer() as writer:
      writer.save(scratch / "variables", variables)
      writer.wait_until_finished()
    card = {**card, "digest": digest(variables)}
    (scratch / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
    shutil.rmtree(directory, ignore_errors=True)
    scratch.rename(directory)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
  return card


def read_card(directory):
  """The card of a saved net: net, num_classes, image_size, channels, mean, std, digest.

  Raises:
    Refusal: nothing saved there.
  """
  path = pathlib.Path(directory) / CARD
  try:
    return json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise Refusal(
      f"no saved net in {directory} ({path.name}: {getattr(error, 'strerror', None) or error}); name a folder that"
      " 'python -m cpsc_jax.main' wrote, such as WORKDIR/teacher."
    ) from error


def load_net(directory, like):
  """(variables, card) of a saved net; `like` is a tree of the net's own variables.

  Raises:
    Refusal: nothing there, other shapes than the net has, or bytes that do not match the digest.
  """
  quieten()
  directory = pathlib.Path(directory).absolute()
  card = read_card(directory)
  try:
    with ocp.StandardCheckpointer() as reader:
      variables = reader.restore(directory / "variables", jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
  except Exception as error:  # Orbax raises assorted types for damaged files
    raise Refusal(
      f"the net saved in {directory} cannot be read ({first_line(error)}); restore or make it again."
    ) from error
  if digest(variables) != card["digest"]:
    raise Refusal(
      f"the net saved in {directory} is damaged: its bytes do not match its digest; restore or make it again."
    )
  return variables, card


def quieten():
  logging.getLogger("absl").setLevel(logging.ERROR)
