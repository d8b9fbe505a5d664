"""A run of several phases: class-incremental learning, each phase an ordinary run in a folder of its own.

The network of the first classes is trained as teachers are, in WORKDIR/teacher; each phase after it is a run in
WORKDIR/phase_N whose teacher is the network before it. What was finished is not repeated, and what was interrupted is
resumed, inside any phase.
"""

import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from cpsc_jax import config as configs
from cpsc_jax import datasets, evaluate, nets, record, saved, teach
from cpsc_jax.errors import Refusal
from cpsc_jax.mesh import make_mesh, primary_first, replicate, replicated
from cpsc_jax.progress import say
from cpsc_jax.run import run as run_phase
from cpsc_jax.run import teacher_in
from cpsc_jax.tasks import incremental


def run(
  c: configs.Config,
  workdir: str | pathlib.Path,
  data: datasets.Data | None = None,
  command: Sequence[str] | None = None,
) -> record.Finished:
  """Carries out all phases of a config of class-incremental learning and returns what came of them.

  Args:
    data: the data set, in place of the config's.
    command: the words of the command line, for the record.

  Raises:
    Refusal: as `cpsc_jax.run.run`; phases, order or arm that cannot be.
  """
  mesh, workdir = make_mesh(), pathlib.Path(workdir)
  whole = data or datasets.find(c.dataset.name, c.dataset.data_dir)
  if c.incremental.known:
    raise Refusal(f"config.incremental.known is {c.incremental.known}; it is set for each phase, leave it 0.")
  c = configs.resolve(c, whole.spec, mesh)
  sizes = incremental.sizes(c, whole.spec.num_classes)
  order = incremental.class_order(c, whole.spec.num_classes)
  if results := record.earlier_results(workdir, c):
    say(f"{workdir} is finished already; delete it or choose another --workdir to run again.")
    return record.Finished(results)
  primary_first(whole.require)
  ends = np.cumsum(sizes).tolist()
  _check_measurable(whole, order, ends, c.evaluate.split)
  with record.claimed(workdir, c):
    views = [datasets.Classes(whole, order, end - new, end) for new, end in zip(sizes, ends, strict=True)]
    first = _first_network(c, views[0], workdir)
    rows, outcomes = [accuracies(first, views[0], ends, c, mesh)], []
    say(_line(1, sizes, rows))
    for number in range(2, len(sizes) + 1):
      before = _folder(workdir, number - 1) / "student" if number > 2 else _first_folder(c, workdir)
      view = views[number - 1]
      if c.arm == "joint":
        view = datasets.Classes(whole, order, 0, ends[number - 1])
      phase = phase_config(c, number, ends[number - 2], ends[number - 1], str(before))
      outcomes.append(run_phase(phase, _folder(workdir, number), data=view, command=command).results)
      net = saved.load(_folder(workdir, number) / "student")
      rows.append(accuracies(net, view, ends, c, mesh))
      say(_line(number, sizes, rows))
    results = _results(c, whole, order, sizes, rows, first, outcomes, command)
    return record.finish_phases(workdir, results, net)


def _check_measurable(data: datasets.Data, order: Sequence[int], ends: Sequence[int], split: str) -> None:
  """Raises a Refusal if a phase has no image to be measured on: a rare class may have none in the validation part."""
  classes = (
    data.labels("train")[datasets.is_held_out(data.spec)]
    if split == "validation"
    else data.labels(data.spec.test_split)
  )
  labels = np.argsort(order)[classes]
  counts = np.histogram(labels, [0, *ends])[0]
  if not counts.all():
    number = int(np.argmin(counts)) + 1
    raise Refusal(
      f"the classes of phase {number} have no image in the {split} part of '{data.name}', on which"
      " config.evaluate.split has every phase measured; choose another split, fewer phases or another order."
    )


def phase_config(c: configs.Config, number: int, known: int, seen: int, teacher: str) -> ml_collections.ConfigDict:
  """The config of one phase, from the second on.

  All classes together have more images than the new ones, and the arm "joint" goes through them as many times.
  """
  phase = ml_collections.ConfigDict(c.to_dict())
  phase.name, phase.incremental.known, phase.teacher.checkpoint = f"{c.name}_phase_{number}", known, teacher
  if c.arm == "joint":
    phase.student.steps = round(c.student.steps * seen / (seen - known))
  return phase


def accuracies(
  net: saved.SavedNet, data: datasets.Classes, ends: Sequence[int], c: configs.Config, mesh: jax.sharding.Mesh
) -> list[float]:
  """Accuracy on the classes of each phase so far, of a network of all their classes; the last is that over all."""
  test = data.load_evaluation(c.evaluate.split).put(replicated(mesh))
  card = net.card
  classify = evaluate.compile_classifier(net.net, card["mean"], card["std"], c.evaluate.batch_size, mesh)
  right = np.asarray(classify(replicate(net.variables, mesh), test.images).labels) == np.asarray(test.labels)
  phase = np.searchsorted(ends, np.asarray(test.labels), side="right")
  return [float(right[phase == each].mean()) for each in range(phase.max() + 1)] + [float(right.mean())]


def measures(rows: Sequence[Sequence[float]]) -> dict[str, Any]:
  """What is said of a run whose phase i has `accuracies` rows[i].

  "accuracy" after each phase over all classes seen; "average", its mean; "forgetting", over the phases but the last,
  the mean of the best accuracy on a phase's classes before the last phase less that after it.
  """
  seen, matrix = [row[-1] for row in rows], [list(row[:-1]) for row in rows]
  lost = [max(row[j] for row in matrix[j:-1]) - matrix[-1][j] for j in range(len(matrix) - 1)]
  return {"accuracy": seen, "matrix": matrix, "average": float(np.mean(seen)), "forgetting": float(np.mean(lost))}


def _folder(workdir: pathlib.Path, number: int) -> pathlib.Path:
  return workdir / f"phase_{number}"


def _first_network(c: configs.Config, data: datasets.Classes, workdir: pathlib.Path) -> saved.SavedNet:
  """The network of the first classes: the given one, that in the folder of an earlier run, or one trained now."""
  card = teach.describe_teacher(c, data)
  names = data.class_names()
  if c.teacher.checkpoint and card.get("class_names", names) != names:
    raise Refusal(
      f"the network in {c.teacher.checkpoint} knows the classes {', '.join(card['class_names'])}, and the first phase"
      f" has {', '.join(names)}; set config.incremental.order to begin with its classes."
    )
  teacher_in(workdir, c, card | {"class_names": names}, data)
  return saved.load(_first_folder(c, workdir))


def _first_folder(c: configs.Config, workdir: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(c.teacher.checkpoint or workdir / "teacher")


def _line(number: int, sizes: Sequence[int], rows: Sequence[Sequence[float]]) -> str:
  *each, seen = rows[-1]
  shown = ", ".join(f"{accuracy:.4f}" for accuracy in each)
  return f"phase {number} of {len(sizes)}: accuracy {seen:.4f} over {sum(sizes[:number])} classes; by phase {shown}"


def _results(c, data, order, sizes, rows, first, outcomes, command) -> dict[str, Any]:
  """What results.json says of all phases: as of a run, of the last phase's student, and "incremental" besides."""
  last, names = outcomes[-1], data.class_names()
  seconds = {
    "teacher": first.card.get("seconds", 0.0) if not c.teacher.checkpoint else 0.0,
    "student": sum(outcome["seconds_by_part"]["student"] for outcome in outcomes),
  }
  trained = first.card.get("environments", []) if not c.teacher.checkpoint else []
  samples = {player: sum(outcome["samples"][player] for outcome in outcomes) for player in ("generator", "student")}
  last = {name: value for name, value in last.items() if name != "warnings"}
  return {
    **last,
    **record.about(c, command),
    "teacher": {
      "net": first.card["net"],
      "parameters": nets.count_parameters(first.variables["params"]),
      "accuracy": rows[0][-1],
      "digest": first.card.get("digest"),
      "seed": first.card.get("seed"),
      "checkpoint": c.teacher.checkpoint or "trained in this run",
    },
    "class_names": [names[each] for each in order],
    "incremental": {"sizes": list(sizes), "order": list(order), **measures(rows)},
    "samples": samples,
    "seconds_by_part": seconds,
    "seconds": sum(outcome["seconds"] for outcome in outcomes) + seconds["teacher"],
    "environments": _each_once([*trained, *(env for outcome in outcomes for env in outcome["environments"])]),
  }


def _each_once(values: Iterable[Any]) -> list[Any]:
  found: list[Any] = []
  for value in values:
    if value not in found:
      found.append(value)
  return found
