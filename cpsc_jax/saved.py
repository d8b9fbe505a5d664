"""The nets that a run leaves behind: where they lie, and how they come back; files that are whole or not there."""

import contextlib
import json
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpsc_jax import checkpoint, nets
from cpsc_jax.errors import Refusal

WHICH = ("student", "student_best", "teacher", "generator")
CARD_KEYS = ("net", "num_classes", "image_size", "channels", "mean", "std", "digest")
GENERATOR_KEYS = ("latent_dim", "width")


class SavedNet(NamedTuple):
  """A module, its variables, and its card; a generator's card has latent_dim and width too."""

  net: Any
  variables: Any
  card: dict

  @property
  def is_generator(self):
    return self.card["net"] in nets.GENERATORS


def find(workdir, which=None, default="student"):
  """The folder of a net of a finished run: `which` was asked for or, if None, the `default`.

  A folder that holds a net itself is returned as it is.

  Raises:
    Refusal: no run, an unfinished one, or one that has no such net.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / checkpoint.CARD).exists():
    if which:
      raise Refusal(f"{workdir} holds one net; leave --which out, or name the WORKDIR above it.")
    return workdir
  if not (workdir / "config.json").exists():
    raise Refusal(f"no run and no saved net in {workdir}; name a WORKDIR of 'python -m cpsc_jax.main' or a net in it.")
  config = _read_config(workdir)
  which = which or default
  if not (workdir / "results.json").exists():
    raise Refusal(
      f"the run '{config['name']}' in {workdir} is not finished; the command that began it finishes it:"
      f" python -m cpsc_jax.main --config CONFIG --workdir {workdir}"
    )
  if which == "teacher" and config["teacher"]["checkpoint"]:
    return pathlib.Path(config["teacher"]["checkpoint"])
  if which == "generator" and config["arm"] in ("real_kd", "real_labels"):
    raise Refusal(f"the run in {workdir} has no generator: its arm is '{config['arm']}', not 'distill'.")
  if which == "generator" and not (workdir / which).exists():
    raise Refusal(
      f"the run in {workdir} keeps no generator: its method starts one afresh for every batch. What was drawn is in"
      f" {workdir / 'pool.npz'} and samples.png."
    )
  return workdir / which


def load(folder):
  """The `SavedNet` in a folder, its bytes verified.

  A generator's card that says nothing of its shape, as of older runs, is completed from the config.json beside it.

  Raises:
    Refusal: nothing there, a card that lacks something, or damage.
  """
  folder = pathlib.Path(folder)
  card = checkpoint.read_card(folder)
  if card.get("net") in nets.GENERATORS and not set(GENERATOR_KEYS) <= card.keys():
    workdir = folder.absolute().parent
    if (workdir / "config.json").exists():
      card |= {key: _read_config(workdir)["generator"][key] for key in GENERATOR_KEYS}
  needed = (*CARD_KEYS, *(GENERATOR_KEYS if card.get("net") in nets.GENERATORS else ()))
  lacking = [key for key in needed if key not in card]
  if lacking:
    raise Refusal(f"{folder / checkpoint.CARD} does not say {', '.join(lacking)}; save the net again.")
  net, inputs = rebuild(card)
  shapes = jax.eval_shape(lambda key: nets.init(net, key, *inputs), jax.random.key(0))
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # not the devices that it was saved from
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
  variables, _ = checkpoint.load_net(folder, like)
  # Bound to no device, so that every caller may say where it computes.
  return SavedNet(net, jax.tree.map(jnp.asarray, jax.device_get(variables)), card)


def rebuild(card):
  """(module, inputs of two samples) of what a card describes."""
  classes, size, channels = card["num_classes"], card["image_size"], card["channels"]
  if card["net"] in nets.GENERATORS:
    latents, labels = jnp.zeros((2, card["latent_dim"])), jnp.zeros((2,), jnp.int32)
    classes = classes if card.get("conditional", True) else 1  # cards of older runs do not say
    return nets.generator(card["net"], classes, size, channels, card["width"]), (latents, labels)
  return nets.classifier(card["net"], classes), (jnp.zeros((2, size, size, channels)),)


def class_names(card):
  """What the classes are called; numbers where the card does not say."""
  return card["class_names"] if "class_names" in card else [str(label) for label in range(card["num_classes"])]


@contextlib.contextmanager
def new_file(path):
  """Yields a scratch path beside `path`, renamed to it if the block ends well and removed otherwise.

  Raises:
    Refusal: `path` exists, or cannot be written.
  """
  path = pathlib.Path(path)
  scratch = path.with_name(f"partial.{path.name}")
  try:
    if path.exists():
      raise Refusal(f"{path} exists already; delete it or choose another --out.")
    scratch.touch()
    try:
      yield scratch
      scratch.rename(path)
    finally:
      scratch.unlink(missing_ok=True)
  except OSError as error:
    raise Refusal(f"cannot write {path} ({error.strerror or error}); choose another --out.") from error


def _read_config(workdir):
  path = workdir / "config.json"
  try:
    config = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise Refusal(f"cannot read {path} ({error}); restore it or run again.") from error
  if not {"name", "arm", "teacher", "generator"} <= set(config):
    raise Refusal(f"{path} is not the config of a run; name a WORKDIR of 'python -m cpsc_jax.main'.")
  return config
