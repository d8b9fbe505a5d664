"""Saving, verifying and restoring, through Orbax.

`Checkpointer` holds the resumable checkpoints of one training; `save_net` / `load_net` a finished network with what one has
to know to use it. Both carry digests of their own, because Orbax restores damaged bytes silently.
"""

import contextlib
import hashlib
import json
import logging
import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp

from cpsc_jax.errors import Refusal, first_line
from cpsc_jax.mesh import barrier, broadcast, is_primary

CARD = "net.json"
CARD_KEYS = ("net", "num_classes", "image_size", "channels", "mean", "std")
SEAL = "files.sha256"
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a folder that is not whole yet
UNSEALED = (SEAL, "_CHECKPOINT_METADATA", "commit_success.txt")  # the last two are Orbax's, written after the seal


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


class Checkpointer:
  """The last two checkpoints of a training, each a pytree and a JSON record, under `directory`.

  All processes call every method; process 0 seals, verifies and decides.
  """

  def __init__(self, directory):
    """Raises a Refusal where nothing can be written."""
    silence_absl()
    self._directory = pathlib.Path(directory).absolute()
    options = ocp.CheckpointManagerOptions(
      max_to_keep=2,
      create=True,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
    )
    with self._writing():
      self._manager = ocp.CheckpointManager(self._directory, options=options)

  def save(self, step, tree, record):
    """Starts writing step `step`; returns once the arrays are copied, the files follow in the background.

    Raises:
      Refusal: this or the write before it failed, such as on a full disk; what was there stays.
    """
    with self._writing():
      self._manager.wait_until_finished()
      self._unsealed = self._directory / f"{step}{TEMPORARY}"
      self._manager.save(
        step, args=ocp.args.Composite(tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
      )

  def restore(self, like):
    """The newest intact (tree, record), or None; `like` gives structure, types and shardings.

    A checkpoint whose files are not those of its seal is named in the log, deleted, and the one before it is used.

    Raises:
      Refusal: an intact checkpoint that does not fit `like`.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for step in sorted(self._manager.all_steps(), reverse=True):
      folder = self._directory / str(step)
      damage = broken(folder) if is_primary() else None
      if broadcast(bool(damage)):
        if is_primary():
          logging.getLogger("cpsc_jax").warning("checkpoint %s is damaged and deleted: %s", folder, damage)
        self._manager.delete(step)
        continue
      try:
        found = self._manager.restore(
          step, args=ocp.args.Composite(tree=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore())
        )
      except jax.errors.JaxRuntimeError:
        raise
      except Exception as error:  # Orbax raises assorted types
        raise Refusal(
          f"the checkpoint {folder} is intact but cannot be resumed from ({first_line(error)}); another version of"
          " this program wrote it: use that one, or delete the folder to go on from the checkpoint before."
        ) from error
      return found.tree, found.record
    return None

  def close(self):
    """Blocks until everything started is on disk; a Refusal if that failed."""
    with self._writing():
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()

  def _seal(self):
    """Called when the files of a step are all written and their folder does not yet bear its final name."""
    if is_primary():
      seal(self._unsealed)

  @contextlib.contextmanager
  def _writing(self):
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise  # another process died
    except Exception as error:  # Orbax raises assorted types for disks that are full, read-only or gone
      raise Refusal(
        f"no checkpoint can be written to {self._directory} ({first_line(error)}); what was saved before is kept, and"
        " the same command resumes from it once that is mended."
      ) from error


def seal(folder):
  """Writes the sha256 of every file under `folder` to its file SEAL, as `sha256sum --check` reads it."""
  lines = [f"{_sha256(path)}  {path.relative_to(folder)}\n" for path in sorted(_sealed_files(folder))]
  (folder / SEAL).write_text("".join(lines))


def broken(folder):
  """Why `folder` is not as it was sealed, in words, or None if it is."""
  try:
    want = dict(reversed(line.split("  ", 1)) for line in (folder / SEAL).read_text().splitlines())
    have = {str(path.relative_to(folder)): _sha256(path) for path in _sealed_files(folder)}
  except (OSError, ValueError) as error:
    return first_line(error)
  names = sorted(name for name in want.keys() | have.keys() if want.get(name) != have.get(name))
  return f"{len(names)} files differ from {SEAL}, such as {names[0]}" if names else None


def _sealed_files(folder):
  return (path for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in UNSEALED)


def _sha256(path):
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


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
  card = {**card, "digest": digest(variables)}
  if is_primary():
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
  try:
    with ocp.StandardCheckpointer() as writer:
      writer.save(scratch / "variables", variables)
      writer.wait_until_finished()
    if is_primary():
      (scratch / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
      shutil.rmtree(directory, ignore_errors=True)
      scratch.rename(directory)
  finally:
    if is_primary():
      shutil.rmtree(scratch, ignore_errors=True)
  barrier(f"saved {directory.name}")
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
  silence_absl()
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


def silence_absl():
  logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails is told in our own words
