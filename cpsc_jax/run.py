"""One run, top to bottom: teacher, training, results."""

import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence

import jax

from cpsc_jax import algorithm, config, datasets, experiment, nets, record, schema, streams, tasks, teach
from cpsc_jax.loop import Outcome, Plan, train
from cpsc_jax.measures import Measures
from cpsc_jax.mesh import make_mesh, primary_first, replicated
from cpsc_jax.progress import say
from cpsc_jax.setup import Setup
from cpsc_jax.state import State
from cpsc_jax.streams import Stream


@dataclasses.dataclass(frozen=True)
class Begun:
  """A run that is about to train.

  Attributes:
    config: as it runs.
    workdir: its folder, or None.
    setup, teacher, measures: what it trains with and is measured by.
    plan, state: what `loop.train` takes.
    results: what `record.begun` gave.
    before: scores before the first epoch, where the task reports them.
  """

  config: config.Config
  workdir: pathlib.Path | None
  setup: Setup
  teacher: teach.Teacher
  measures: Measures
  plan: Plan
  state: State
  results: dict
  before: dict[str, float]


def run(
  c: config.Config,
  workdir: str | pathlib.Path | None,
  started: float | None = None,
  data: datasets.Data | None = None,
  given: teach.Teacher | None = None,
  on_epoch: Callable[[dict], None] | None = None,
  command: Sequence[str] | None = None,
  on_begun: Callable[["Begun"], None] | None = None,
) -> record.Finished:
  """Carries out a config and returns what came of it; with a `workdir`, everything is also written there.

  A finished workdir is left alone; an interrupted one is resumed.

  Args:
    started: time.monotonic() at which the whole run began.
    data: the data set, in place of the config's.
    given: a teacher, in place of the config's.
    on_epoch: is called with every epoch's entry of the history.
    command: the words of the command line, for the record.
    on_begun: is called with the run before it trains.

  Raises:
    Refusal: bad config, missing data, a teacher that does not fit, or a workdir that belongs to another config.
  """
  started = time.monotonic() if started is None else started
  mesh, workdir = make_mesh(), None if workdir is None else pathlib.Path(workdir)
  data = data or datasets.find(c.dataset.name, c.dataset.data_dir)
  c, card = resolved(c, data, given)
  if results := record.earlier_results(workdir, c):
    say(f"{workdir} is finished already; delete it or choose another --workdir to run again.")
    return record.Finished(results)
  primary_first(data.require)
  with record.claimed(workdir, c):
    with begun(c, workdir, mesh, data, given, card, on_epoch, command) as ready:
      if on_begun:
        on_begun(ready)
      outcome = train(ready.plan, ready.state)
    return ended(ready, outcome, started)


def resolved(c: config.Config, data: datasets.Data, given: teach.Teacher | None = None) -> tuple[config.Config, dict]:
  """(the config that runs, its teacher's card), after all checks.

  Raises:
    Refusal: bad config, or a teacher that does not fit.
  """
  card = given.card if given else teach.describe_teacher(c, data)
  c = tasks.of(c).of_teacher(c, card)
  net = given.net if given else nets.classifier(card["net"], card["num_classes"])
  return config.resolve(c, data.spec, make_mesh(), net), card


@contextlib.contextmanager
def begun(
  c: config.Config,
  workdir: pathlib.Path | None,
  mesh: jax.sharding.Mesh,
  data: datasets.Data,
  given: teach.Teacher | None,
  card: dict,
  on_epoch: Callable[[dict], None] | None = None,
  command: Sequence[str] | None = None,
  like: Begun | None = None,
  pages: bool = True,
) -> Iterator[Begun]:
  """Makes a run ready to train within the block, in a workdir that is its own.

  Args:
    c: resolved.
    card: the teacher's.
    like: a run of the same data, nets and method, whose compiled programs this one shares.
    pages: whether the run's page is written while it goes on.
  """
  test = data.load_evaluation(c.evaluate.split)
  origin = {} if workdir is None else {"config": record.config_digest(workdir), "test_images": test.digest()}
  record.bind(workdir, origin)
  test = test.put(replicated(mesh))
  net = given.net if given else experiment.build_teacher(c, card)
  if like:
    setup = dataclasses.replace(like.setup, weights=experiment.weights(c, like.setup.method))
  else:
    setup = experiment.build(c, data.spec, net, card, mesh)
  teacher = given or teach.obtain_teacher(c, net, card, data, test, workdir, mesh, origin)
  origin["teacher"] = teacher.card.get("digest")
  record.bind(workdir, origin)
  real_counts = None
  if c.arm in schema.REAL_ARMS:
    setup, (epoch, state), real = teach.real_arm(c, setup, teacher, data)
    real_counts = teach.images_per_class(c, data) if c.dataset.imbalance > 1 else None
    origin |= real
  elif tasks.of(c).with_real:
    setup, (epoch, state), real = teach.new_classes(c, setup, teacher, data)
    origin |= real
  else:
    epoch, state = distillation(c, setup, teacher, data)
  counts = teacher.card.get("images_per_class") or real_counts
  measures = Measures(c, setup, teacher, test, like.measures.programs if like else None, counts)
  say(measures.headline(state))
  accuracy, student = measures.teacher_accuracy, measures.student(state)
  results = record.begun(c, data, teacher, accuracy, student, len(test), measures.long_tail(), command)
  before = {name: float(score) for name, score in measures(state).items()} if tasks.of(c).report else {}
  with record.journal(workdir, results, setup, teacher.card["num_classes"], pages) as journal:
    plan = Plan(
      title=c.arm,
      epoch=epoch,
      measure=measures,
      variables=measures.student,
      epochs=c.schedule.epochs,
      measure_every=c.evaluate.every,
      save_every=c.checkpoint.every,
      save_minutes=c.checkpoint.minutes,
      workdir=workdir,
      on_epoch=on_epoch,
      diagnose=measures.diagnose,
      diagnose_every=c.evaluate.diagnostics_every,
      journal=journal,
      settings=dict(schema.flatten(c)),
      origin=origin,
    )
    yield Begun(c, workdir, setup, teacher, measures, plan, state, results, before)


def ended(run: Begun, outcome: Outcome, started: float, more: dict | None = None) -> record.Finished:
  """What came of a run that has trained; with a workdir, everything is written there.

  Args:
    started: time.monotonic() at which the whole run began.
    more: what results.json is to say in addition.
  """
  report = tasks.of(run.config).report
  sheet = run.measures.sheet(outcome.state)
  more = {**(report(run.config, run.setup, run.before, outcome.history) if report else {}), **(more or {})}
  return record.finish(run.workdir, run.config, run.setup, run.teacher, run.results, outcome, sheet, started, more)


def teacher_in(folder: pathlib.Path, c: config.Config, card: dict, data: datasets.Data) -> teach.Teacher:
  """The teacher of a config by itself, trained or resumed in a folder that is claimed for it.

  Args:
    c: resolved.
    card: what `teach.describe_teacher` gave.
  """
  mesh, test = make_mesh(), data.load_evaluation(c.evaluate.split)
  origin = {"config": record.config_digest(folder), "test_images": test.digest()}
  record.bind(folder, origin)
  net = experiment.build_teacher(c, card)
  return teach.obtain_teacher(c, net, card, data, test.put(replicated(mesh)), folder, mesh, origin)


def distillation(c: config.Config, setup: Setup, teacher: teach.Teacher, data: datasets.Data) -> teach.Phase:
  """(state -> (state, losses), the state it begins with) of data-free training."""
  program = algorithm.compile_epoch(setup, c.schedule.iterations)
  key = streams.key(streams.root(c.seed), Stream.DISTILLATION)
  state = experiment.initial_state(c, setup, key, data.spec.image_shape, teacher.variables)
  return lambda state: program(state, teacher.variables), state
