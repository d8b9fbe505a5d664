"""Distillation from Python: arrays and modules in, a `Run` out. The command line does the same from files."""

import dataclasses
import json
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from cpsc_jax import checkpoint, datasets, main, nets, sample, saved
from cpsc_jax.datasets import Dataset, InMemory
from cpsc_jax.errors import Refusal, first_line
from cpsc_jax.interop import export
from cpsc_jax.mesh import make_mesh, replicate
from cpsc_jax.run import run
from cpsc_jax.schema import REAL_ARMS, flatten
from cpsc_jax.state import Tree
from cpsc_jax.teach import Teacher


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished distillation.

  Attributes:
    student: (module, variables) of the last epoch, or of the best where config.evaluate.headline is "best".
    results: what results.json holds on the command line: every figure, with seed, versions, hardware and config.
    history: {"teacher": [...], "student": [...]}, an entry per epoch.
    generator: (module, variables), or None where the method keeps none.
    card: what the student is: net, classes, image size, mean and std of its input, class names.
    latent_dim: width of the generator's latents.
  """

  student: tuple[Any, Tree]
  results: dict
  history: dict
  generator: tuple[Any, Tree] | None
  card: dict
  latent_dim: int

  @property
  def accuracy(self) -> float:
    """The student's accuracy on the images it was evaluated on, at the headline epoch."""
    return self.results["student"][self.results["headline"]]["accuracy"]

  def samples(self, per_class: int = 16, seed: int = 0) -> np.ndarray:
    """Fresh samples of every class, (C, per_class, H, W, K) in [0, 1].

    Raises:
      Refusal: the method keeps no generator.
    """
    if self.generator is None:
      raise Refusal("this run has no generator to sample from: its method starts a new one in every iteration.")
    net, variables = self.generator
    card = {**self.card, "latent_dim": self.latent_dim}
    images = sample.draw(saved.SavedNet(net, variables, card), range(card["num_classes"]), per_class, seed)
    return datasets.denormalise(images, card["mean"], card["std"])

  def export(self, path: str | pathlib.Path) -> float:
    """Writes the student to the new file `path`, as its suffix says: .onnx, .safetensors, .pt, .pth or .stablehlo.

    Returns the largest difference between the file's outputs and the student's, as a fraction of the largest output.

    Raises:
      Refusal: an unknown suffix, a missing package, or a file that cannot be written.
    """
    card = {**self.card, "digest": checkpoint.digest(self.student[1])}
    return export.export_net(saved.SavedNet(*self.student, card), export.format_of(path), path)


def distill(
  teacher: tuple[Any, Tree] | str | pathlib.Path,
  student: Any,
  image_shape: Sequence[int],
  num_classes: int,
  mean: Sequence[float],
  std: Sequence[float],
  test: tuple[Any, Any],
  *,
  config: str | ml_collections.ConfigDict = "default",
  overrides: Mapping[str, Any] | None = None,
  workdir: str | pathlib.Path | None = None,
  class_names: Sequence[str] | None = None,
  photographs: bool = True,
  on_epoch: Callable[[dict], None] | None = None,
) -> Run:
  """Distils a teacher into a smaller student without the teacher's data.

  Args:
    teacher: (module, variables) of a Flax module with __call__(x) or __call__(x, train), that argument under any
      customary name, that returns logits (N, C) or an `Output`; or the folder of a saved teacher, which `cpsc-jax
      convert` makes of PyTorch weights.
    student: the name of a net, such as "wrn_16_1" (docs/teachers.md lists them), or a module of your own like the
      teacher's, which is then known by the name of its type.
    image_shape: (H, W, K) of the images, H = W.
    num_classes: classes of teacher and student.
    mean, std: per channel or one for all, of pixels in [0, 1]; the teacher's input is (x - mean) / std.
    test: (images (N, H, W, K) uint8 or floats k / 255, labels (N,)), on which both are evaluated;
      nothing is trained on them.
    config: the name of a ready config ("digits", "cifar100:smoke", ...) or a config.
    overrides: {dotted key: value} of the config, such as {"schedule.epochs": 10}.
    workdir: where everything is written as on the command line, and resumed from; None: nothing is written.
    class_names: what the classes are called.
    photographs: whether a horizontal flip keeps an image's class.
    on_epoch: is called with every epoch's entry of the history.

  Raises:
    Refusal: names what does not fit, and how to mend it.
  """
  image_shape, num_classes = _whole("image_shape", image_shape), _whole("num_classes", [num_classes])[0]
  saved_teacher = isinstance(teacher, str | pathlib.Path)
  if len(image_shape) != 3 or image_shape[0] != image_shape[1]:
    raise Refusal(f"image_shape is {image_shape}; images must be square: (H, W, K) with H = W.")
  _check_pair("test", test, "(images, labels)")
  if not saved_teacher:
    _check_pair("teacher", teacher, "(module, variables), or the folder of a saved teacher")
  name = student if isinstance(student, str) else _register(student, image_shape, num_classes)
  c, (height, _, channels) = _config(config, name, overrides or {}), image_shape
  statistics = {"mean": _per_channel("mean", mean, channels), "std": _per_channel("std", std, channels)}
  spec = Dataset(num_classes, height, channels, **statistics, sizes={}, photographs=photographs)
  data, given = InMemory(spec, *test, class_names), None
  c.dataset.name = data.name
  if saved_teacher:
    _check_normalisation(teacher, statistics)
    c.teacher.checkpoint = str(teacher)
  else:
    given = _given_teacher(*teacher, data)
    c.teacher.checkpoint = f"given from Python, digest {given.card['digest'][:16]}"  # a workdir is of one teacher only
  finished = run(c, workdir, data=data, given=given, on_epoch=on_epoch)
  if finished.student is None:
    return _reopened(pathlib.Path(workdir), finished.results)
  chosen = finished.student_best if finished.results["headline"] == "best" else finished.student
  latent_dim = finished.results["config"]["generator"]["latent_dim"]
  return Run(chosen, finished.results, finished.history, finished.generator, finished.card, latent_dim)


def _config(config: str | ml_collections.ConfigDict, student: str, overrides: Mapping[str, Any]) -> Any:
  """A config of the caller's own, with the overrides."""
  if isinstance(config, str):
    config, _ = main.parse(["distill", f"--config={config}"])
  c = ml_collections.ConfigDict(config.to_dict()).lock()
  values = dict(flatten(c))
  for key, value in {"student.net": student, **overrides}.items():
    if key not in values:
      raise Refusal(
        f"the config has no key '{key}'{nets.suggestion(key, values)}; docs/config.md and --help explain all keys."
      )
    try:
      c.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as error:
      kind = type(values[key]).__name__
      raise Refusal(f"config.{key} is {value!r}; it must be of type {kind}, such as {values[key]!r}.") from error
  if c.task != "distil":
    raise Refusal(f"config.task is '{c.task}'; from Python only 'distil' can run. Use the command line for the others.")
  if c.arm in REAL_ARMS or c.evaluate.split != "test":
    raise Refusal(
      f"config.arm is '{c.arm}' and config.evaluate.split '{c.evaluate.split}'; from arrays only data-free arms on"
      " 'test' can run. Prepare the data set (cpsc-jax prepare) and use the command line for the others."
    )
  return c


def _whole(name: str, values: Any) -> tuple[int, ...]:
  """Whole numbers above 0 of any integer type, as Python's."""
  try:
    numbers = tuple(operator.index(value) for value in values)
  except TypeError:
    numbers = ()
  if not numbers or min(numbers) < 1:
    raise Refusal(f"{name} is {values!r}; it must be of whole numbers above 0.")
  return numbers


def _per_channel(name: str, values: Any, channels: int) -> tuple[float, ...]:
  """A number for each channel, from a sequence or an array of any shape, or from one number for all."""
  given = " ".join(repr(values).split())
  try:
    numbers = np.asarray(values, np.float64).ravel()
  except (TypeError, ValueError):
    numbers = np.array([])
  numbers = np.repeat(numbers, channels) if np.ndim(values) == 0 else numbers
  if len(numbers) != channels or not np.isfinite(numbers).all() or (name == "std" and min(numbers) <= 0):
    raise Refusal(
      f"{name} is {given}; it must be {channels} finite number{'s' * (channels > 1)}, one per channel, and std above 0."
    )
  if max(abs(numbers)) > datasets.LARGEST_STATISTIC:
    raise Refusal(f"{name} is {given}; it must be of pixels in [0, 1]: divide by 255 what is of pixels up to 255.")
  return tuple(numbers.tolist())


def _plain(variables: Any) -> Any:
  """Variables as plain dicts, whatever mappings they are made of."""
  return {key: _plain(value) for key, value in variables.items()} if isinstance(variables, Mapping) else variables


def _check_pair(name: str, value: Any, expected: str) -> None:
  if not isinstance(value, tuple | list) or len(value) != 2:
    raise Refusal(f"{name} must be {expected}; got {type(value).__name__}.")


def _check_normalisation(folder: str | pathlib.Path, statistics: Mapping[str, tuple[float, ...]]) -> None:
  """Refuses another mean or std than the saved teacher's; how many there must be is checked with its channels."""
  card = checkpoint.read_card(folder)
  for key, values in statistics.items():
    if len(card.get(key, ())) == len(values) and not np.allclose(card[key], values):
      raise Refusal(f"the teacher in {folder} has {key} {card[key]}, not {list(values)}; give its own.")


def _adapted(module: Any, image_shape: tuple[int, ...]) -> Any:
  """A module of the caller's that returns an `Output`, tried on two images."""
  try:
    return nets.adapt(module, image_shape)
  except Refusal:
    raise
  except Exception as error:  # a module of the caller's may raise anything
    raise Refusal(
      f"{type(module).__name__} cannot be applied to images of shape {image_shape}: {first_line(error)}"
    ) from error


def _register(student: Any, image_shape: tuple[int, ...], num_classes: int) -> str:
  """Makes a module of the caller's known by the name of its type."""
  module, name = _adapted(student, image_shape), type(student).__name__
  _check_logits("student", nets.output_shapes(module, image_shape).logits, num_classes)
  if not nets.takes_flag(module) and nets.has_statistics(module, image_shape):
    raise Refusal(
      f"the student {name} takes no argument that says whether it is trained, so that its batch norm would never learn;"
      " define __call__(self, x, train)."
    )
  nets.NETS[name] = lambda num_classes, dtype=None: module
  return name


def _check_logits(who: str, logits: jax.ShapeDtypeStruct, num_classes: int) -> None:
  if logits.shape != (2, num_classes):
    raise Refusal(f"the {who} gives {logits.shape[-1]} logits, and num_classes is {num_classes}.")


def _given_teacher(module: Any, variables: Tree, data: InMemory) -> Teacher:
  """The caller's module and variables as a teacher, tried on two images."""
  spec, net = data.spec, _adapted(module, data.spec.image_shape)
  if not isinstance(variables, Mapping) or "params" not in variables:
    raise Refusal(
      "the teacher's variables have no 'params'; expected them as module.init returns them: {'params': ...,"
      " 'batch_stats': ...}."
    )
  variables = {"batch_stats": {}, **_plain(variables)}
  x = jax.ShapeDtypeStruct((2, *spec.image_shape), np.float32)
  try:
    logits = jax.eval_shape(lambda x: net.apply(variables, x, train=False), x).logits
  except Exception as error:  # a module of the caller's may raise anything
    raise Refusal(f"the teacher cannot be applied to its variables: {first_line(error)}") from error
  _check_logits("teacher", logits, spec.num_classes)
  card = {
    "net": type(module).__name__,
    "num_classes": spec.num_classes,
    "image_size": spec.image_size,
    "channels": spec.channels,
    "mean": list(spec.mean),
    "std": list(spec.std),
    "dataset": data.name,
    "digest": checkpoint.digest(variables),
  }
  return Teacher(net, replicate(jax.tree.map(np.asarray, variables), make_mesh()), card)


def _reopened(workdir: pathlib.Path, results: dict) -> Run:
  """The `Run` of a folder that was finished before."""
  student = saved.load(workdir / ("student_best" if results["headline"] == "best" else "student"))
  generator = saved.load(workdir / "generator") if (workdir / "generator").exists() else None
  history = json.loads((workdir / "history.json").read_text())
  latent_dim = results["config"]["generator"]["latent_dim"]
  pair = (generator.net, generator.variables) if generator else None
  return Run((student.net, student.variables), results, history, pair, student.card, latent_dim)
