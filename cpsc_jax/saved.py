"""Finds and loads the nets that a run saved; `new_files` is for output files that are written whole or not at all."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cpsc_jax import checkpoint, files, nets
from cpsc_jax.errors import Refusal, first_line

WHICH = ("student", "student_best", "teacher", "generator")
NO_GENERATOR = ("real_kd", "real_labels", "gaussian_noise", "no_rehearsal", "lwf", "real_rehearsal", "joint")  # arms
CARD_KEYS = ("net", "num_classes", "image_size", "channels", "mean", "std", "digest")
LARGEST_WIDTH = 2**16  # of a generator's latents and channels
GENERATOR_KEYS = ("latent_dim", "width", "conditional", "output", "epsilon", "init")  # what a card has of a config


class SavedNet(NamedTuple):
  """A net that computes in float32.

  Attributes:
    net: the module.
    variables: {"params", "batch_stats"} on no particular device.
    card: CARD_KEYS and, for a generator, GENERATOR_KEYS; class_names are optional.
  """

  net: Any
  variables: Any
  card: dict[str, Any]

  @property
  def is_generator(self) -> bool:
    return self.card["net"] in nets.GENERATORS


def find(workdir: str | pathlib.Path, which: str | None = None, default: str = "student") -> pathlib.Path:
  """The folder of a net of a finished run: `which`, one of WHICH, or the `default` if that is None.

  A `workdir` that itself holds a saved net is returned unchanged. Of a run of several phases it is that of the last
  phase which has one.

  Raises:
    Refusal: no run, an unfinished one, one without that net, or one whose teacher's place has another net now.
  """
  workdir = pathlib.Path(workdir)
  if (workdir / checkpoint.CARD).exists():
    if which:
      raise Refusal(f"{workdir} is a single saved net; remove --which, or give the WORKDIR that contains it.")
    return workdir
  if not (workdir / "config.json").exists():
    raise Refusal(
      f"no run and no saved net in {workdir}; give the --workdir of a finished run or the folder of a net in it."
    )
  config = _read_config(workdir)
  which = which or default
  if not (workdir / "results.json").exists():
    raise Refusal(
      f"the run '{config['name']}' in {workdir} is not finished; resume it with the command that started it:"
      f" cpsc-jax --config CONFIG --workdir {workdir}"
    )
  if which == "teacher" and config["teacher"]["checkpoint"]:
    return _given_teacher(workdir, pathlib.Path(config["teacher"]["checkpoint"]))
  if (workdir / which).exists():
    return workdir / which
  numbered = {path.parent.name.removeprefix("phase_"): path for path in workdir.glob(f"phase_*/{which}")}
  if phases := {int(number): path for number, path in numbered.items() if number.isdecimal()}:
    return phases[max(phases)]
  if which == "generator" and config["arm"] in NO_GENERATOR:
    raise Refusal(f"the run in {workdir} has no generator: it was run with arm '{config['arm']}', not 'distill'.")
  if which == "generator":
    raise Refusal(
      f"the run in {workdir} saved no generator: its method trains a new one for every batch. Its samples are in"
      f" {workdir / 'pool.npz'} and samples.png."
    )
  return workdir / which


def _given_teacher(workdir: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """`folder`, where the run in `workdir` had its teacher from, if that is there still."""
  path = workdir / "results.json"
  try:
    digest = files.read_json(path)["teacher"]["digest"]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise Refusal(f"{path} does not say which teacher the run had ({error}); restore the file.") from error
  if checkpoint.read_card(folder)["digest"] != digest:
    raise Refusal(f"{folder} has another net now than the teacher of the run in {workdir}; put that one back.")
  return folder


def load(folder: str | pathlib.Path) -> SavedNet:
  """The net saved in a folder, its bytes verified.

  Raises:
    Refusal: no saved net, an incomplete card, or damaged files.
  """
  folder = pathlib.Path(folder)
  card = checkpoint.read_card(folder)
  needed = (*CARD_KEYS, *(GENERATOR_KEYS if card.get("net") in nets.GENERATORS else ()))
  lacking = [key for key in needed if key not in card]
  wrong = f"lacks {', '.join(lacking)}" if lacking else ""
  if not wrong and card["net"] in nets.GENERATORS:
    wrong = _wrong_in_generator(card)
  if wrong:
    raise Refusal(f"{folder / checkpoint.CARD} {wrong}; save the net again.")
  net, inputs = rebuild(card)
  try:
    shapes = jax.eval_shape(lambda key: nets.init(net, key, *inputs), jax.random.key(0))
  except (TypeError, ValueError) as error:  # JAX says so of shapes that do not fit
    raise Refusal(
      f"{folder / checkpoint.CARD} describes a net that cannot be built ({first_line(error)}); save the net again."
    ) from error
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # it may have been saved from devices not present
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
  variables, _ = checkpoint.load_net(folder, like)
  # Uncommitted arrays, so that the caller chooses the device.
  return SavedNet(net, jax.tree.map(jnp.asarray, jax.device_get(variables)), card)


def _wrong_in_generator(card: dict[str, Any]) -> str:
  """What the card of a generator says that cannot be; an empty text if it is right."""
  for key in ("latent_dim", "width"):
    if not isinstance(card[key], int) or isinstance(card[key], bool) or not 1 <= card[key] <= LARGEST_WIDTH:
      return f"says another {key} than a whole number from 1 to {LARGEST_WIDTH:,}"
  choices = {"conditional": (True, False), "output": ("tanh", "sigmoid"), "init": ("torch", "normal")}
  for key, values in choices.items():
    if card[key] not in values:
      return f"says another {key} than {' or '.join(map(str, values))}"
  if type(card["epsilon"]) not in (int, float) or not 0 <= card["epsilon"] <= 1:
    return "says another epsilon than a number from 0 to 1"
  return ""


def rebuild(card: dict[str, Any]) -> tuple[Any, tuple[jax.Array, ...]]:
  """(module, example inputs) of the net that a card describes.

  The inputs are images (2, H, W, K) of a classifier, or latents (2, D) and labels (2,) of a generator.

  Raises:
    Refusal: a net of an unknown name, or a generator that cannot make images of that size.
  """
  classes, size, channels = card["num_classes"], card["image_size"], card["channels"]
  if card["net"] in nets.GENERATORS:
    latents, labels = jnp.zeros((2, card["latent_dim"])), jnp.zeros((2,), jnp.int32)
    classes = classes if card["conditional"] else 1
    net = nets.generator(card["net"], classes, size, channels, card["width"], form=nets.Form.of(card, card))
    return net, (latents, labels)
  net, images = nets.classifier(card["net"], classes), jnp.zeros((2, size, size, channels))
  if "quantised" in card:
    try:
      net = nets.Quantised(net, **card["quantised"])
    except TypeError as error:
      raise Refusal(f"the card says of the quantised net what is not known here ({error}); save it again.") from error
  return net, (images,)


def class_names(card: dict[str, Any]) -> list[str]:
  """The names of the classes; their numbers where the card has no names."""
  return card["class_names"] if "class_names" in card else [str(label) for label in range(card["num_classes"])]


@contextlib.contextmanager
def new_files(*paths: str | pathlib.Path) -> Iterator[list[pathlib.Path]]:
  """Yields a path of the same name in a scratch folder for each of `paths`, which are in one folder.

  If the block succeeds, all are moved to their places; else none is, and nothing is left.

  Raises:
    Refusal: one of the paths exists already or cannot be written.
  """
  wanted = [pathlib.Path(path) for path in paths]
  folder = wanted[0].parent
  try:
    for path in wanted:
      if os.path.lexists(path):
        raise Refusal(f"{path} already exists; delete it or choose another --out.")
    with tempfile.TemporaryDirectory(prefix=".cpsc_jax.", dir=folder, ignore_cleanup_errors=True) as scratch:
      made = [pathlib.Path(scratch, path.name) for path in wanted]
      made[0].touch()  # a name that cannot be written is refused before any work
      yield made
      moved = []
      try:
        for source, path in zip(made, wanted, strict=True):
          source.rename(path)
          moved.append(path)
      except OSError:
        for path in moved:
          path.unlink()
        raise
  except OSError as error:
    raise Refusal(f"cannot write {wanted[0]} ({error.strerror or error}); choose another --out.") from error


def _read_config(workdir: pathlib.Path) -> dict[str, Any]:
  path = workdir / "config.json"
  try:
    config = files.read_json(path)
  except (OSError, ValueError) as error:
    raise Refusal(f"cannot read {path} ({error}); restore the file or start a new run in another folder.") from error
  teacher = config.get("teacher") if isinstance(config, dict) else None
  texts = [config.get("name"), config.get("arm"), teacher.get("checkpoint")] if isinstance(teacher, dict) else [None]
  if not all(isinstance(text, str) for text in texts) or "generator" not in config:
    raise Refusal(f"{path} is not the config of a run; give the --workdir of a run.")
  return config
