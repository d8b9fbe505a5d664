"""Saving, verifying and restoring, through Orbax.

`Checkpointer` writes the checkpoints from which a training resumes, `save_net` and `load_net` a finished network with
its card: which net it is and how its input is normalised. Both add checksums, because Orbax does not notice damaged
bytes.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from cpsc_jax import checksums, files
from cpsc_jax.errors import Refusal, first_line
from cpsc_jax.mesh import barrier, broadcast, is_primary

Tree = Any

CARD = "net.json"
CARD_KEYS = ("net", "num_classes", "image_size", "channels", "mean", "std")
LARGEST = {"num_classes": 2**20, "image_size": 2**13, "channels": 2**10}
LONGEST_NAME = 100
SPARE = 2**24  # bytes that a saved net may have beside its arrays
SEAL = "seal"  # sha256 of everything else in the card
ORIGIN = {  # what a training comes from, and how to call another one
  "config": "another config",
  "test_images": "other test images",
  "training_images": "other training images",
  "teacher": "another teacher",
}
TEMPORARY = ".orbax-checkpoint-tmp"  # what Orbax appends to the name of a folder that is not complete yet
# Orbax writes the last two after the checksums.
NOT_CHECKED = (checksums.NAME, "_CHECKPOINT_METADATA", "commit_success.txt")


def changed_origin(begun: Mapping[str, str], now: Mapping[str, str]) -> str:
  """What was exchanged since something was begun, in words ("another config and ..."); empty if nothing was.

  Args:
    begun, now: digests by the names in ORIGIN; what `now` does not have is not compared.
  """
  return " and ".join(words for name, words in ORIGIN.items() if name in now and begun.get(name) != now[name])


def digest(tree: Tree) -> str:
  """sha256 over the paths, types, shapes and bytes of all leaves, hex; of typed PRNG keys, over their data."""
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

  A pytree may hold None, empty containers, typed PRNG keys and flax dataclasses.

  All processes call every method; process 0 writes the checksums, verifies them and decides.
  """

  def __init__(self, directory: str | pathlib.Path, origin: Mapping[str, str] | None = None):
    """Raises a Refusal if the directory cannot be written to.

    Args:
      origin: what the training comes from, by the names in ORIGIN; written into every checkpoint, and one of another
        origin is refused.
    """
    silence()
    self._directory, self._origin = pathlib.Path(directory).absolute(), dict(origin or {})
    options = ocp.CheckpointManagerOptions(
      max_to_keep=2,
      create=True,
      cleanup_tmp_directories=True,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
    )
    with self._writing():
      self._manager = ocp.CheckpointManager(self._directory, options=options)

  def save(self, step: int, tree: Tree, record: dict[str, Any]) -> None:
    """Starts writing step `step`; returns once the arrays are copied, the files are written in the background.

    Raises:
      Refusal: this write or the one before failed, for instance on a full disk; earlier checkpoints are kept.
    """
    with self._writing():
      silence()
      self._manager.wait_until_finished()
      if is_primary():  # where Orbax cannot make its folder, its threads wait minutes for it
        with tempfile.TemporaryFile(dir=self._directory):
          pass
      self._unfinished = self._directory / f"{step}{TEMPORARY}"
      record = {**record, "origin": self._origin}
      self._manager.save(
        step, args=ocp.args.Composite(tree=ocp.args.StandardSave(tree), record=ocp.args.JsonSave(record))
      )

  def restore(self, like: Tree) -> tuple[Tree, dict[str, Any]] | None:
    """The newest intact (tree, record), or None if there is none.

    A checkpoint whose files do not match its checksums is named in the log and deleted, and the one before it is used.

    Args:
      like: a tree of arrays, or of their shapes, with the structure, types and shardings of the result.

    Raises:
      Refusal: an intact checkpoint is of another origin, or has another structure, other shapes or other types than
        `like`.
      OSError: a file of a checkpoint is there but cannot be read.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    for step in sorted(self._manager.all_steps(), reverse=True):
      folder = self._directory / str(step)
      damage = checksums.verify(folder, written_files(folder)) if is_primary() else None
      if broadcast(bool(damage)):
        if is_primary():
          logging.getLogger("cpsc_jax").warning("checkpoint %s is damaged and was deleted: %s", folder, damage)
        with self._writing():
          self._manager.delete(step)
        continue
      try:
        record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore())).record
        self._check_origin(folder, record.pop("origin", {}))
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args).tree, record
      except Refusal:
        raise
      except jax.errors.JaxRuntimeError:
        raise
      except Exception as error:  # Orbax raises various types
        raise Refusal(
          f"the checkpoint {folder} is intact but cannot be restored ({first_line(error)}); it was written by another"
          " version of this program: use that version, or delete the folder to resume from the checkpoint before it."
        ) from error
    return None

  def close(self) -> None:
    """Waits until every checkpoint is on disk; raises a Refusal if a write failed."""
    with self._writing():
      try:
        self._manager.wait_until_finished()
      finally:
        self._manager.close()

  def _check_origin(self, folder: pathlib.Path, begun: Mapping[str, str]) -> None:
    if changed := changed_origin(begun, self._origin):
      raise Refusal(
        f"the checkpoint {folder} was written with {changed}, or by an older version of this program; put that back, or"
        " delete the folder to resume from the checkpoint before it."
      )

  def _write_checksums(self) -> None:
    """Called when all files of a step are written, before their folder is renamed to its final name."""
    if is_primary():
      checksums.write(self._unfinished, written_files(self._unfinished))

  def latest(self) -> int | None:
    """The step of the newest checkpoint that is complete, once those under way are; None without any."""
    with contextlib.suppress(Exception):  # what failed is raised by the next `save` or `close`
      self._manager.wait_until_finished()
    steps = [int(path.name) for path in self._directory.glob("*") if path.name.isdecimal()]
    return max(steps, default=None)

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise  # another process died
    except Exception as error:  # Orbax raises various types for disks that are full, read-only or gone
      kept = "nothing was" if self.latest() is None else f"that of epoch {self.latest()} is kept; nothing later was"
      raise Refusal(
        f"no checkpoint can be written to {self._directory} ({reason(error)}): {kept} saved; the same command resumes"
        " once the directory can be written to."
      ) from error


def reason(error: Exception) -> str:
  """Why a write failed: the words of the operating system if it has said some, else the exception in one line."""
  known = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO, errno.ENOENT)
  words = (os.strerror(number) for number in known)
  return next((each for each in words if each in str(error)), first_line(error))


def written_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """{name: path} of all files of a checkpoint that its checksums cover."""
  files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
  return {name: path for name, path in files.items() if name not in NOT_CHECKED}


def save_net(directory: str | pathlib.Path, variables: Tree, card: Mapping[str, Any]) -> dict[str, Any]:
  """Writes variables (an Orbax checkpoint) and card (JSON) to `directory`, completely or not at all.

  Args:
    directory: is replaced if it exists.
    variables: {"params", "batch_stats"} of the net; "batch_stats" may be missing.
    card: the net's name in nets.NETS, its classes, its images and how they are normalised (CARD_KEYS); other entries
      are kept.

  Returns:
    The card as written, with the digest of the variables and a seal of its own.

  Raises:
    Refusal: the card lacks a key, or says what cannot be; or the disk is full or cannot be written to.
  """
  silence()
  if wrong := wrong_in(card):
    raise Refusal(f"the card of the net to be saved in {directory} {wrong}.")
  variables = {"batch_stats": {}, **variables}
  directory = pathlib.Path(directory).absolute()
  scratch = directory.with_name(directory.name + ".partial")
  card = sealed({**card, "digest": digest(variables)})
  try:
    if is_primary():
      shutil.rmtree(scratch, ignore_errors=True)
      scratch.mkdir(parents=True)
    with ocp.StandardCheckpointer() as writer:
      writer.save(scratch / "variables", variables)
      writer.wait_until_finished()
    if is_primary():
      checksums.write(scratch / "variables", written_files(scratch / "variables"))
      (scratch / CARD).write_text(json.dumps(card, indent=2, sort_keys=True) + "\n")
      shutil.rmtree(directory, ignore_errors=True)
      scratch.rename(directory)
  except jax.errors.JaxRuntimeError:
    raise  # another process died
  except Exception as error:  # Orbax raises various types for disks that are full, read-only or gone
    raise Refusal(f"{directory} cannot be written ({reason(error)}); mend that and repeat the command.") from error
  finally:
    if is_primary():
      shutil.rmtree(scratch, ignore_errors=True)
  barrier(f"saved {directory.name}")
  return card


def sealed(card: Mapping[str, Any]) -> dict[str, Any]:
  """The card with a digest of all that it says."""
  said = {key: value for key, value in card.items() if key != SEAL}
  return {**said, SEAL: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def wrong_in(card: Mapping[str, Any]) -> str:
  """What a card lacks, or says that cannot be; an empty text if it is right."""
  if lacking := [key for key in CARD_KEYS if key not in card]:
    return f"lacks {', '.join(lacking)}"
  name, names = card["net"], card.get("class_names", [])
  if not isinstance(name, str) or not 1 <= len(name) <= LONGEST_NAME or not name.isprintable():
    return f"says net {_short(name)}; it must be a name of up to {LONGEST_NAME} characters"
  for key, largest in LARGEST.items():
    if not isinstance(card[key], int) or isinstance(card[key], bool) or not 1 <= card[key] <= largest:
      return f"says {key} {_short(card[key])}; it must be a whole number from 1 to {largest:,}"
  for key in ("mean", "std"):
    values = card[key] if isinstance(card[key], list | tuple) else ()
    numbers = [isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in values]
    if not all(numbers) or len(values) != card["channels"] or (key == "std" and min(values) <= 0):
      what = f"{card['channels']} finite numbers{' above 0' if key == 'std' else ''}, one for each channel"
      return f"says {key} {_short(card[key])}; it must be {what}"
  if "class_names" in card and not (
    isinstance(names, list | tuple)
    and len(names) == card["num_classes"]
    and all(isinstance(each, str) for each in names)
  ):
    return f"says class_names {_short(names)}; it must be {card['num_classes']:,} texts, one for each class"
  counts = card.get("images_per_class", [0] * card["num_classes"])
  whole = isinstance(counts, list) and all(type(each) is int and 0 <= each < 2**40 for each in counts)
  if not whole or len(counts) != card["num_classes"]:
    return f"says images_per_class {_short(counts)}; it must be {card['num_classes']:,} counts, one for each class"
  return ""


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."


def read_card(directory: str | pathlib.Path) -> dict[str, Any]:
  """The card of a saved net: net, num_classes, image_size, channels, mean, std, digest.

  Raises:
    Refusal: no net is saved there, or its card was changed since.
  """
  path = pathlib.Path(directory) / CARD
  try:
    card = files.read_json(path)
  except (OSError, ValueError) as error:
    raise Refusal(
      f"no saved net in {directory} ({path.name}: {getattr(error, 'strerror', None) or error}); name a folder that"
      " cpsc-jax wrote, such as WORKDIR/teacher."
    ) from error
  if not isinstance(card, dict) or card.get(SEAL) != sealed(card)[SEAL]:
    raise Refusal(
      f"{path} was changed since it was written, or is of an older version: its seal does not fit what it says; restore"
      " the file, or save or convert the net again."
    )
  if wrong := wrong_in(card):
    raise Refusal(f"{path} {wrong}; save the net again.")
  return card


def load_net(directory: str | pathlib.Path, like: Tree) -> tuple[Tree, dict[str, Any]]:
  """(variables, card) of a saved net.

  Args:
    directory: where `save_net` wrote it.
    like: a tree of arrays, or of their shapes, with the structure of the net's variables.

  Raises:
    Refusal: no net there, variables of other shapes, or bytes that do not match the digest.
  """
  silence()
  directory = pathlib.Path(directory).absolute()
  card = read_card(directory)
  try:
    _check_files(directory / "variables", sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(like)))
    if damage := _damage(directory / "variables"):  # Orbax fails on damaged arrays with many a message of its own
      raise ValueError(damage)
    with ocp.StandardCheckpointer() as reader:
      _check_shapes(reader.metadata(directory / "variables").item_metadata.tree, like)
      variables = reader.restore(directory / "variables", jax.tree.map(ocp.utils.to_shape_dtype_struct, like))
  except Exception as error:  # Orbax raises various types for damaged files
    raise Refusal(
      f"the net saved in {directory} cannot be read ({first_line(error)}); restore the folder or save the net again."
    ) from error
  if digest(variables) != card["digest"]:
    raise Refusal(
      f"the net saved in {directory} is damaged: its bytes do not match its digest; restore the folder or save the net"
      " again."
    )
  return variables, card


def _damage(folder: pathlib.Path) -> str | None:
  """What differs from the checksums; None if nothing does, or if none were written, as before they were."""
  return checksums.verify(folder, written_files(folder)) if (folder / checksums.NAME).exists() else None


def _check_files(folder: pathlib.Path, needed: int) -> None:
  """Raises unless all that is below a folder are files that can be read at once, and not much larger than needed."""
  sizes = []
  for path in folder.rglob("*"):
    kind = path.lstat()
    if not (stat.S_ISREG(kind.st_mode) or stat.S_ISDIR(kind.st_mode)):
      raise ValueError(f"{path.relative_to(folder)} is no file")
    sizes.append(kind.st_size)
  if sum(sizes) > 2 * needed + SPARE:
    raise ValueError(f"its files have {sum(sizes):,} bytes, and its net {needed:,}")


def _check_shapes(stored: Tree, like: Tree) -> None:
  """Raises unless the arrays have the shapes of `like` and are not stored in larger pieces: nothing larger is read."""
  found = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(stored)}
  for path, leaf in jax.tree_util.tree_leaves_with_path(like):
    name = jax.tree_util.keystr(path)
    if name not in found:
      raise ValueError(f"it has no {name}")
    shape, piece = tuple(found[name].shape), tuple(found[name].storage.chunk_shape)
    if shape != leaf.shape or any(n > max(m, 1) for n, m in zip(piece, shape, strict=True)):
      raise ValueError(f"{name} has shape {shape} in pieces of {piece}, not {leaf.shape}")


def silence() -> None:
  """Hides what Orbax and its threads print; what fails is raised as a Refusal."""
  for name in ("absl", "asyncio"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
  _ignore_closed_loops()


@functools.cache
def _ignore_closed_loops() -> None:
  """When a write fails, Orbax closes its event loop, and each of its other writes then complains of that."""
  before = sys.unraisablehook

  def hook(complaint: Any) -> None:
    if not (isinstance(complaint.exc_value, RuntimeError) and "Event loop is closed" in str(complaint.exc_value)):
      before(complaint)

  sys.unraisablehook = hook
