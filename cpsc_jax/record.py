"""What a run leaves: its folder, its results and its files, each written whole or not at all."""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import pathlib
import platform
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import numpy as np

from cpsc_jax import checkpoint, checksums, datasets, diagnostics, environment, nets, report, saved, schema, tasks
from cpsc_jax import config as configs
from cpsc_jax.config import Config
from cpsc_jax.errors import Refusal
from cpsc_jax.loop import Outcome
from cpsc_jax.mesh import is_primary, make_mesh, primary_first, replicate, replicated
from cpsc_jax.pool import Pool
from cpsc_jax.progress import say, working
from cpsc_jax.setup import Setup
from cpsc_jax.state import Tree
from cpsc_jax.teach import Teacher

SECONDS_BETWEEN_PAGES = 10.0  # of a run that goes on
_DELETE_ORIGIN = "delete it if nothing was exchanged since the run was begun; its checkpoints say so themselves"
_DELETE_RESULTS = "delete that file and run the same command again to have it written anew"


@dataclasses.dataclass(frozen=True)
class Finished:
  """A finished run.

  Attributes:
    results: what results.json holds.
    history: what history.json holds; None where the run was finished before.
    student: (module, variables) of the last epoch, without heads and in float32; None where it was finished before.
    student_best: the same of the best epoch.
    generator: (module, variables), or None where the method keeps none.
    card: what the student is: its net, classes and normalisation.
  """

  results: dict
  history: dict | None = None
  student: tuple[Any, Tree] | None = None
  student_best: tuple[Any, Tree] | None = None
  generator: tuple[Any, Tree] | None = None
  card: dict | None = None


def earlier_results(workdir: pathlib.Path | None, config: Config) -> dict | None:
  """The results of a finished run of `config` in `workdir`, or None; nothing is written.

  Raises:
    Refusal: the folder belongs to another config, or cannot be read.
  """
  if workdir is None:
    return None
  saved = _read(workdir / "config.json", "choose another --workdir")
  if saved is None:
    left = ("results.json", "origin.json", "checkpoints", "teacher_training")
    found = [name for name in left if (workdir / name).exists()]
    if found:
      raise Refusal(
        f"{workdir} has {', '.join(found)} of a run but no config.json that says of which; choose another --workdir."
      )
    return None
  if changed := differences(workdir, config, saved):
    begun = (read_origin(workdir) or {}).get("config")
    if begun and begun != _digest_of_config(saved):
      raise Refusal(
        f"{workdir / 'config.json'} was changed since the run was begun (it differs in {', '.join(changed)}); restore"
        " it or choose another --workdir."
      )
    raise Refusal(
      f"{workdir} belongs to another config (it differs in {', '.join(changed)}); choose another --workdir."
    )
  if (workdir / "results.json").exists():
    checksums.check_finished(workdir)
  results = _read(workdir / "results.json", _DELETE_RESULTS)
  if results and config.teacher.checkpoint and _same_teacher(workdir, config) is False:
    raise Refusal(
      f"{workdir} is finished, with another teacher than the one that is in {config.teacher.checkpoint} now; put that"
      " one back or choose another --workdir."
    )
  return results


def differences(workdir: pathlib.Path, config: Config, saved: dict) -> list[str]:
  """The dotted keys in which `config` is not what `workdir` was begun with, whose config.json says `saved`.

  The folder of a given teacher may have been moved: if its digest is that of the beginning, its place does not count.
  """
  changed = configs.differences(config, saved)
  if "teacher.checkpoint" in changed and saved.get("teacher", {}).get("checkpoint") and _same_teacher(workdir, config):
    changed.remove("teacher.checkpoint")
  return changed


def _same_teacher(workdir: pathlib.Path, config: Config) -> bool | None:
  """Whether the teacher that `config` names is the one that `workdir` was begun with; None where that is not known."""
  begun = (read_origin(workdir) or {}).get("teacher")
  begun = begun or (_read(workdir / "results.json", _DELETE_RESULTS) or {}).get("teacher", {}).get("digest")
  if not (begun and (pathlib.Path(config.teacher.checkpoint) / checkpoint.CARD).exists()):
    return None
  return checkpoint.read_card(config.teacher.checkpoint).get("digest") == begun


def _read(path: pathlib.Path, mend: str) -> dict | None:
  """What a JSON file of an object says; None without the file."""
  try:
    content = json.loads(path.read_text()) if path.exists() else None
  except (OSError, ValueError) as error:
    raise Refusal(f"{path} cannot be read ({error}); {mend}.") from error
  if content is not None and not isinstance(content, dict):
    raise Refusal(f"{path} is damaged: it holds no JSON object; {mend}.")
  return content


@contextlib.contextmanager
def claimed(workdir: pathlib.Path | None, config: Config) -> Iterator[None]:
  """Makes `workdir` this config's, on all processes, and keeps other runs out of it within the block.

  Raises:
    Refusal: it cannot be written, is another run's by now, or is not the folder that process 0 sees.
  """
  with contextlib.ExitStack() as held:
    if workdir is not None:
      primary_first(lambda: _claim(workdir, config, held))
    yield


def _claim(workdir: pathlib.Path, config: Config, held: contextlib.ExitStack) -> None:
  if not is_primary() and not (workdir / "config.json").exists():
    raise Refusal(
      f"process {jax.process_index()} does not see {workdir} of process 0; name a folder that all processes share."
    )
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if is_primary():
      held.enter_context(locked(workdir / ".lock"))
      earlier_results(workdir, config)  # another run may have begun there since that was asked
    if not (workdir / "config.json").exists():
      write_whole(workdir / "config.json", configs.dump(config).encode())
    (workdir / ".writable").touch()
    (workdir / ".writable").unlink()
  except OSError as error:
    raise Refusal(f"cannot write to {workdir} ({error.strerror}); choose another --workdir.") from error


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
  """Holds a file for this process; the operating system, of a network's file server too, lets go of it when it dies.

  Raises:
    Refusal: another process holds it; says which, and since when.
  """
  with open(path, "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      raise Refusal(
        f"{path.parent} is in use by {file.read().strip() or 'another run'}; wait for its end, stop it, or choose"
        " another --workdir."
      ) from None
    except OSError as error:
      say(f"{path.parent} cannot be locked ({error.strerror}); see to it that no other run uses it")
    file.truncate(0)
    file.write(
      f"process {os.getpid()} of {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC\n"
    )
    file.flush()
    yield
    file.truncate(0)


def bind(workdir: pathlib.Path | None, origin: Mapping[str, str]) -> None:
  """Makes `workdir` a run of this origin, on all processes: what is resumed later must have the same.

  Args:
    origin: digests by the names in `checkpoint.ORIGIN`, as far as they are known yet.

  Raises:
    Refusal: the run was begun with something else.
  """
  if workdir is not None:
    primary_first(lambda: _bind(workdir, origin))


def _bind(workdir: pathlib.Path, origin: Mapping[str, str]) -> None:
  begun = read_origin(workdir) or {}
  known = {name: value for name, value in origin.items() if name in begun}
  if changed := checkpoint.changed_origin(begun, known):
    raise Refusal(
      f"{workdir} was begun with {changed} (digests in {workdir / 'origin.json'}); put that one back or choose another"
      " --workdir."
    )
  if len(known) < len(origin):
    content = checkpoint.sealed({**begun, **origin, "versions": begun.get("versions") or environment.versions()})
    write_whole(workdir / "origin.json", (json.dumps(content, indent=2) + "\n").encode())


def read_origin(workdir: pathlib.Path) -> dict | None:
  """What `bind` has written of a folder: digests by the names in `checkpoint.ORIGIN`, and more; None without it.

  Raises:
    Refusal: it was changed since.
  """
  path = workdir / "origin.json"
  origin = _read(path, _DELETE_ORIGIN)
  if origin is not None and origin.get(checkpoint.SEAL) != checkpoint.sealed(origin)[checkpoint.SEAL]:
    raise Refusal(
      f"{path} was changed since it was written, or is of an older version: its seal does not fit what it says;"
      f" restore it, or {_DELETE_ORIGIN}."
    )
  return origin


def config_digest(workdir: pathlib.Path | None) -> str | None:
  """sha256 of the config in `workdir`, but for places that may change; None without a workdir."""
  saved = None if workdir is None else _read(workdir / "config.json", "choose another --workdir")
  return _digest_of_config(saved) if saved else None


def _digest_of_config(saved: dict) -> str:
  places = ("dataset.data_dir", "teacher.checkpoint")
  said = {key: value for key, value in schema.flatten(saved) if key not in places}
  return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def begun(
  config: Config,
  data: datasets.Data,
  teacher: Teacher,
  teacher_accuracy: float,
  student: Tree,
  test_images: int,
  long_tail: dict | None,
  command: Sequence[str] | None,
) -> dict:
  """What results.json says that is known before the training.

  Args:
    student: its variables as they will be saved.
    long_tail: what `Measures.long_tail` says.
  """
  return {
    **about(config, command),
    "teacher": _about_teacher(config, teacher, teacher_accuracy),
    "student": {"net": config.student.net, "parameters": nets.count_parameters(student["params"])},
    "evaluation": {"split": config.evaluate.split, "images": test_images},
    "class_names": data.class_names(),
    **({"long_tail": long_tail} if long_tail else {}),
  }


@contextlib.contextmanager
def journal(
  workdir: pathlib.Path | None, results: dict, setup: Setup, num_classes: int, pages: bool = True
) -> Iterator["Journal | None"]:
  """The run's `Journal`, None without a workdir; a page that is being written at the end of the block is completed.

  `pages` is whether there is a page before the end.
  """
  if workdir is None:
    yield None
    return
  with futures.ThreadPoolExecutor(1, "cpsc_jax page") as threads:
    yield Journal(workdir, results, setup, num_classes, threads if pages else None)


class Journal:
  """What a run writes while it goes on: a file for every diagnosis, and the page of the run so far.

  It is called as `cpsc_jax.loop.Plan.journal`; the page is written by one of `threads`, beside the training.
  """

  def __init__(
    self, workdir: pathlib.Path, results: dict, setup: Setup, num_classes: int, threads: futures.Executor | None
  ):
    """`results` is what `begun` gave. Without threads there are no pages."""
    self._workdir, self._results, self._classes, self._threads = workdir, results, num_classes, threads
    self._terms = list(setup.method.generator_terms) if setup.generator else []
    self._writing: futures.Future | None = None
    self._wrote = -float("inf")  # when the last page was begun

  def __call__(self, history: list[dict], arrays: dict[str, Any]) -> None:
    if arrays:
      path = diagnosis_of(self._workdir, history[-1]["epoch"])
      path.parent.mkdir(exist_ok=True)
      save_arrays(path, **self._named(arrays))
    idle = self._threads and (self._writing is None or self._writing.done())
    if "accuracy" in history[-1] and idle and time.monotonic() - self._wrote >= SECONDS_BETWEEN_PAGES:
      self._wrote = time.monotonic()
      self._writing = self._threads.submit(self._write_page, list(history))

  def _named(self, arrays: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays as they are kept: with names for their entries, and what is wrong in words."""
    arrays = dict(arrays)
    if "norm_distance" in arrays:
      layers = arrays.pop("norm_distance")
      arrays["layers"] = np.array([name.partition(" ")[2] for name in layers])
      arrays["norm_distance"] = np.array(list(layers.values()))
    if "term_value" in arrays:
      arrays["terms"] = np.array(self._terms)
    return {**arrays, "warnings": np.array(diagnostics.warnings(arrays, self._classes), dtype=str)}

  def _write_page(self, history: list[dict]) -> None:
    scored = [entry for entry in history if "accuracy" in entry]
    best = max(scored, key=lambda entry: entry["accuracy"])
    scores = {which: _scores_of(entry) for which, entry in (("last", scored[-1]), ("best", best))}
    results = {**self._results, "student": {**self._results["student"], **scores}}
    try:
      report.write_page(self._workdir, results, {"teacher": [], "student": history})
    except (OSError, Refusal) as error:
      say(f"{self._workdir / report.PAGE} of the run so far cannot be written: {error}")


def diagnosis_of(workdir: pathlib.Path, epoch: int) -> pathlib.Path:
  """The file of what the diagnosis after an epoch found."""
  return workdir / report.DIAGNOSTICS / f"{epoch:06d}.npz"


def finish(
  workdir: pathlib.Path | None,
  config: Config,
  setup: Setup,
  teacher: Teacher,
  results: dict,
  outcome: Outcome,
  sheet: tuple[np.ndarray, np.ndarray] | None,
  started: float,
  more: dict[str, Any] | None = None,
) -> Finished:
  """Works out the results of a training that has ended and, with a `workdir`, writes all of its files.

  Args:
    results: what `begun` gave.
    sheet: (samples (C, n, H, W, K) in normalised space, label fidelity (C,)), or None where nothing was generated.
    started: time.monotonic() at which the whole run began.
    more: what the task adds to the results.
  """
  card = {key: teacher.card[key] for key in ("num_classes", "image_size", "channels", "mean", "std")}
  names = results["class_names"]  # of the student's classes, the first of which are the teacher's
  card["class_names"] = names[: card["num_classes"]]
  generator_card = card | {key: config.generator[key] for key in ("net", *saved.GENERATOR_KEYS)}
  student_card = card | {
    "num_classes": len(names),
    "class_names": names,
    "net": config.student.net,
    "dataset": config.dataset.name,
    "teacher_digest": teacher.card.get("digest"),
  }
  net, last = nets.deployed(setup.student.net, outcome.state.student.variables)
  if isinstance(net, nets.Quantised):
    student_card["quantised"] = net.card
  pool = setup.method.pool(outcome.state)
  generator = outcome.state.generator if setup.method.keeps_generator else None
  of_training = {
    "student": {**results["student"], **_scores(config, outcome)},
    "generator": _about_generator(config, setup, outcome, sheet),
    **(more or {}),
    "samples": _samples_drawn(config, setup),
    "seconds_by_part": {"teacher": teacher.seconds, "student": outcome.seconds},
    "environments": _environments(teacher, outcome),
  }
  results = {**results, **of_training}
  if outcome.state.prior is not None:
    shares = np.asarray(outcome.state.prior.shares, np.float64)
    results["prior"] = {"kind": config.generator.prior, "shares": shares.tolist()}
  if "long_tail" in results:
    results["long_tail"] = {
      **results["long_tail"],
      "student": _thirds(config, outcome, results["long_tail"]["classes"]),
    }
  started -= teacher.earlier_seconds + outcome.earlier_seconds
  results["agreement"] = results["student"][config.evaluate.headline]["agreement"]
  history = {"teacher": teacher.card.get("history", []), "student": outcome.history}
  held = held_images(pool, card, setup.mesh) if pool is not None else None
  if held:
    results["generator"]["pool"] = len(held["labels"])
  if workdir is not None:
    checkpoint.save_net(workdir / "student", last, student_card)
    checkpoint.save_net(workdir / "student_best", outcome.best_variables, student_card)
    if generator:
      checkpoint.save_net(workdir / "generator", generator.variables, generator_card)
    if is_primary():
      _write_files(workdir, results, history, sheet, card, held, started)
  results["seconds"] = results.get("seconds", time.monotonic() - started)
  nets_of_run = {"student": (net, last), "student_best": (net, outcome.best_variables)}
  if generator:
    nets_of_run["generator"] = nets.deployed(setup.generator.net, generator.variables)
  return Finished(results, history, card=student_card, **nets_of_run)


def finish_phases(workdir: pathlib.Path, results: dict, net: saved.SavedNet) -> Finished:
  """Writes what a run of several phases ended with: its last network, pictures, page and results.json."""
  checkpoint.save_net(workdir / "student", replicate(net.variables, make_mesh()), net.card)
  if is_primary():
    report.write_phases(workdir, results)
    _write_results(workdir, results)
  return Finished(results, card=net.card, student=(net.net, net.variables))


def _write_files(workdir, results, history, sheet, card, held, started) -> None:
  """results.json comes last: a folder that has it is complete."""
  last = diagnosis_of(workdir, history["student"][-1]["epoch"])
  if last.exists():
    results["warnings"] = report.read_diagnosis(last)["warnings"].tolist()
  if sheet:
    images = datasets.denormalise(sheet[0][:, : report.COLUMNS], card["mean"], card["std"])
    save_arrays(workdir / "samples.npz", images=images)
  if held:
    save_arrays(workdir / "pool.npz", **held)
  write_whole(workdir / "history.json", (json.dumps(history, sort_keys=True) + "\n").encode())
  with working("drawing the pictures"):
    report.draw(workdir, results)
    results["seconds"] = time.monotonic() - started
    report.write_page(workdir, results, history)
  _write_results(workdir, results)


def _write_results(workdir: pathlib.Path, results: dict) -> None:
  """results.json and the checksums of what lasts."""
  scratch = workdir / "results.json.partial"
  scratch.write_text(json.dumps(results, indent=2) + "\n")
  checksums.write(workdir, _lasting(workdir) | {"results.json": scratch})
  os.replace(scratch, workdir / "results.json")


def _lasting(workdir: pathlib.Path) -> dict[str, pathlib.Path]:
  """{name: path} of what a finished run leaves, but for pictures, logs and checkpoints."""
  names = ("config.json", "origin.json", "history.json", "samples.npz", "pool.npz")
  files = [workdir / name for name in names]
  files += [path for name in (*saved.WHICH, report.DIAGNOSTICS) for path in (workdir / name).rglob("*")]
  return {str(path.relative_to(workdir)): path for path in files if path.is_file()}


def about(config: Config, command: Sequence[str] | None) -> dict:
  """What results.json says of any run of a config, begun here by a command line."""
  return {
    "name": config.name,
    "arm": config.arm,
    "method": config.method,
    "reference": config.reference,
    "seed": config.seed,
    "headline": config.evaluate.headline,
    "versions": environment.versions(),
    "hardware": environment.hardware(),
    "command": shlex.join(command) if command else None,
    "changed": configs.changes(config),
    "config": json.loads(configs.dump(config)),
  }


def _environments(teacher: Teacher, outcome: Outcome) -> list[dict]:
  """Every environment in which this run trained, each once; where they are several, it was resumed in another one."""
  trained = teacher.card.get("environments", []) if teacher.seconds else []
  both = [*trained, *outcome.environments]
  return [each for number, each in enumerate(both) if each not in both[:number]]


def _about_teacher(config: Config, teacher: Teacher, accuracy: float) -> dict:
  return {
    "net": teacher.card["net"],
    "parameters": nets.count_parameters(teacher.variables["params"]),
    "accuracy": accuracy,
    "digest": teacher.card.get("digest"),
    "seed": teacher.card.get("seed"),  # that it was trained with, if this program has trained it
    "checkpoint": config.teacher.checkpoint or "trained in this run",
  }


def _scores(config: Config, outcome: Outcome) -> dict:
  """Epoch, accuracy and agreement of the last and of the best epoch."""
  return {which: _scores_of(entry) for which, entry in _entries(config, outcome).items()}


def _entries(config: Config, outcome: Outcome) -> dict[str, dict]:
  """What the history says of the last and of the best epoch."""
  scored = {entry["epoch"]: entry for entry in outcome.history if "accuracy" in entry}
  return {"last": scored[config.schedule.epochs], "best": scored[outcome.best_epoch]}


def _thirds(config: Config, outcome: Outcome, classes: Mapping[str, list[int]]) -> dict[str, dict[str, float]]:
  """The student's accuracy on the classes of each third of a long tail, at the last and at the best epoch."""
  entries = _entries(config, outcome)
  return {which: {name: entry[f"{name}_accuracy"] for name in classes} for which, entry in entries.items()}


def _scores_of(entry: dict) -> dict:
  return {key: entry[key] for key in ("epoch", "accuracy", "agreement")}


def _about_generator(config: Config, setup: Setup, outcome: Outcome, sheet: Any) -> dict | None:
  if sheet is None:
    return None
  labelled, fidelity = setup.method.noise.labelled, setup.method.fidelity
  return {
    "net": config.generator.net,
    "parameters": nets.count_parameters(outcome.state.generator.params),
    fidelity: float(np.mean(sheet[1])) if labelled else None,
    f"{fidelity}_per_class": [float(f) for f in sheet[1]] if labelled else None,
  }


def _samples_drawn(config: Config, setup: Setup) -> dict[str, int]:
  """Images that generator updates and student updates have seen."""
  epochs, each, generator = config.schedule.epochs, config.schedule.iterations, setup.generator
  learning = epochs - tasks.waiting_epochs(config)
  return {
    "generator": epochs * each * setup.method.batch_size * generator.steps if generator else 0,
    "student": learning * each * tasks.of(config).images(config) * config.student.steps,
  }


def held_images(pool: Pool, card: dict, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
  """What an image pool holds at the end, as pictures: {"images": (N, H, W, K) uint8, "labels": (N,)}."""
  whole = jax.device_get(jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(pool))
  slots = min(int(whole.count), whole.slots)
  flat = {name: array[:slots].reshape(-1, *array.shape[2:]) for name, array in whole.arrays.items()}
  images = flat["images"]
  if images.dtype != np.uint8:
    images = np.round(255 * datasets.denormalise(images, card["mean"], card["std"])).astype(np.uint8)
  return {"images": images, "labels": flat["labels"]}


def save_arrays(path: pathlib.Path, **arrays: np.ndarray) -> None:
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  write_whole(path, buffer.getvalue())


def write_whole(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that nobody sees it half written."""
  scratch = path.with_name(path.name + ".partial")
  scratch.write_bytes(content)
  os.replace(scratch, path)
