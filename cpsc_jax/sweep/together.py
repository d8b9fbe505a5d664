"""Members of one program, trained side by side: their states are stacked, and an epoch is `jax.vmap` of that of one.

Every member is begun and ended as an ordinary run is, in its own folder, and shares compiled programs with the first.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from cpsc_jax import algorithm, experiment, loop, nets, run, streams, teach
from cpsc_jax.config import Config
from cpsc_jax.datasets import Data
from cpsc_jax.errors import NonFiniteLoss
from cpsc_jax.mesh import MEMBERS, by_member, device_memory, members_mesh, replicated
from cpsc_jax.progress import say, working
from cpsc_jax.record import claimed, read_origin, write_whole
from cpsc_jax.setup import Setup
from cpsc_jax.state import State, Tree
from cpsc_jax.streams import Stream
from cpsc_jax.sweep.members import FAILED, Member

SHARE_OF_MEMORY = 0.8  # of a device, that the program of several members may take
GROUP = "group.json"  # in the folder of members that train together: their names, in their order


class Program:
  """The epoch of several runs as one program.

  Attributes:
    needed: bytes on each device.
  """

  def __init__(self, setup: Setup, iterations: int, states: Sequence[State], teachers: Sequence[Tree]):
    """`states` are the runs' initial ones, `teachers` the variables of each one's teacher; or of the one that all have.

    Where the runs are no multiple of the devices, copies of the last one fill them.
    """
    split, whole = by_member(setup.mesh), replicated(setup.mesh)
    self._filled, shared = -len(states) % setup.mesh.shape[MEMBERS], len(teachers) == 1
    self._stack = jax.jit(lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees), out_shardings=split)
    self._states, self._teachers = states, teachers
    together = jax.vmap(algorithm.epoch(setup, iterations), in_axes=(0, None if shared else 0), spmd_axis_name=MEMBERS)
    compiled = jax.jit(
      together, in_shardings=(split, whole if shared else split), out_shardings=(split, split), donate_argnums=0
    )
    shapes = [jax.eval_shape(self._stack, self._whole(trees)) for trees in (states, teachers)]
    if shared:
      shapes[1] = teachers[0]
    with working(f"compiling the program of {len(states)} members"):
      self._program = compiled.lower(*shapes).compile()
    memory = self._program.memory_analysis()
    # Arguments are donated, so that results lie in their place.
    self.needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes

  def _whole(self, trees: Sequence[Tree]) -> list[Tree]:
    return [*trees, *[trees[-1]] * self._filled]

  def stacked(self, trees: Sequence[Tree]) -> Tree:
    """What belongs to each run -> one tree, with the runs along the first axis of every array."""
    return self._stack(self._whole(trees))

  def loaded(self) -> tuple[State, Callable[[State], tuple[State, dict]]]:
    """(the initial states, stacked; stacked state -> (stacked state, losses (members, iterations, steps))).

    The epoch consumes its argument.
    """
    teacher = self._teachers[0] if len(self._teachers) == 1 else self.stacked(self._teachers)
    return self.stacked(self._states), lambda state: self._program(state, teacher)


def with_rates(state: State, config: Config, first: Config) -> State:
  """A run's state in a program whose learning rates are those of `first`: the factors make them its own."""
  hyper = state.hyper
  factors = {
    player: weights.replace(lr=weights.lr * (config[player].lr / first[player].lr))
    for player, weights in (("generator", hyper.generator), ("student", hyper.student))
  }
  return state.replace(hyper=hyper.replace(**factors))


def fitting(number: int, build: Callable[[int], Program], beside: int = 0) -> tuple[int, Program]:
  """(how many members fit in the memory of a device, at most `number`; their program).

  `beside` are the bytes that members who have begun take besides.
  """
  memory = device_memory()
  limit = SHARE_OF_MEMORY * memory - beside
  while True:
    program = build(number)
    if number == 1 or not memory or program.needed <= limit:
      return number, program
    number = max(min(number - 1, int(number * limit / program.needed)), 1)
    say(f"{(program.needed + beside) / 2**20:,.0f} MiB would not fit: {number} members together")


def beginning(state: State, copies: int) -> int:
  """How many members may begin: each holds so many copies of a state like this one until all end."""
  memory = device_memory()
  return max(int(SHARE_OF_MEMORY * memory / (copies * _bytes(state))), 1) if memory else sys.maxsize


def _bytes(state: State) -> int:
  return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def folder_of(root: pathlib.Path, members: Sequence[Member]) -> pathlib.Path:
  """The folder of the checkpoints of members that train together."""
  return root / hashlib.sha256("\n".join(member.name for member in members).encode()).hexdigest()[:12]


def carry_out(members: Sequence[Member], root: pathlib.Path, data: Data, whole: bool = False) -> list[Member]:
  """Trains members of one program together, as many of the first ones as fit in memory, and ends them; returns those.

  Args:
    root: holds the folders of members that train together (`folder_of`), which nobody needs when all have ended.
    whole: whether exactly these train together, as they did before an interruption.

  Raises:
    Refusal: as of a run.
    Preempted: SIGTERM arrived; the same call resumes.
  """
  began, mesh = time.monotonic(), members_mesh()
  with contextlib.ExitStack() as claims:
    with contextlib.ExitStack() as journals:
      teachers: dict[str, teach.Teacher] = {}
      runs: list[run.Begun] = []
      copies = 3 if any(member.earlier for member in members) else 2  # its own, and those in the stacked state
      for member in members:
        if runs and not whole and len(runs) >= beginning(runs[0].state, copies):
          break
        c, card = run.resolved(member.config, data)
        claims.enter_context(claimed(member.workdir, c))
        if c.teacher.checkpoint not in teachers:
          net = experiment.build_teacher(c, card)
          teachers[c.teacher.checkpoint] = teach.obtain_teacher(c, net, card, data, None, None, mesh, {})
        given, like = teachers[c.teacher.checkpoint], runs[0] if runs else None
        options = {"command": member.command, "like": like, "pages": False}
        ready = run.begun(c, member.workdir, mesh, data, given, card, **options)
        runs.append(journals.enter_context(ready))
      first, members = runs[0], members[: len(runs)]
      beside = len(runs) * (copies - 1) * _bytes(first.state)
      states = [with_rates(each.state, each.config, first.config) for each in runs]

      def build(number: int) -> Program:
        variables = {id(each.teacher): each.teacher.variables for each in runs[:number]}
        each_one = [each.teacher.variables for each in runs[:number]]
        taught = list(variables.values()) if len(variables) == 1 else each_one
        return Program(first.setup, first.config.schedule.iterations, states[:number], taught)

      number, program = (len(runs), build(len(runs))) if whole else fitting(len(runs), build, beside)
      runs, members = runs[:number], members[:number]
      state, epoch = program.loaded()
      folder = folder_of(root, members)
      folder.mkdir(parents=True, exist_ok=True)
      write_whole(folder / GROUP, (json.dumps([member.name for member in members]) + "\n").encode())
      origin = {name: _digest([each.plan.origin[name] for each in runs]) for name in first.plan.origin}
      plan = dataclasses.replace(
        first.plan,
        title=f"{number} members",
        epoch=epoch,
        workdir=folder,
        origin=origin,
        journal=None,
        settings={},
      )
      plans = [dataclasses.replace(each.plan, title=member.name) for each, member in zip(runs, members, strict=True)]
      if earlier := [ended_before(member, each) for member, each in zip(members, runs, strict=True) if member.earlier]:
        went_on = [out.state.replace(hyper=begin.hyper) for out, begin in zip(earlier, states, strict=False)]
        loop.save_together(plan, plans, program.stacked(went_on), earlier)
      preparing = (time.monotonic() - began) / number
      outcomes = loop.train_together(plan, plans, state)
    for member, each, outcome in zip(members, runs, outcomes, strict=True):
      if not member.done:
        _end(member, each, outcome, preparing, number)
  return list(members)


def ended_before(member: Member, begun: run.Begun) -> loop.Outcome:
  """What the shorter run ended with that a member goes on from."""
  known = read_origin(member.earlier) or {}
  origin = {name: known.get(name, value) for name, value in begun.plan.origin.items()}
  epochs = json.loads((member.earlier / "config.json").read_text())["schedule"]["epochs"]
  silent = {"journal": None, "on_epoch": None, "settings": {}}
  plan = dataclasses.replace(begun.plan, epochs=epochs, workdir=member.earlier, origin=origin, **silent)
  return loop.train(plan, begun.state)  # it trains nothing: all epochs are in its checkpoint


def _digest(values: Sequence[str | None]) -> str:
  return hashlib.sha256(json.dumps(list(values)).encode()).hexdigest()


def _end(
  member: Member, begun: run.Begun, outcome: loop.Outcome | NonFiniteLoss, preparing: float, number: int
) -> None:
  """Leaves a member as a run of its own would be left; the seconds are its share, `preparing` of them beforehand."""
  if isinstance(outcome, NonFiniteLoss):
    fail(member, outcome)
    return
  state = outcome.state.replace(hyper=begun.state.hyper)  # its own rates are those of its own config
  seconds = outcome.seconds + preparing
  outcome = dataclasses.replace(outcome, state=state, earlier_seconds=0.0)
  loop.save(begun.plan, outcome)
  run.ended(begun, outcome, time.monotonic() - seconds, {"together": number})


def fail(member: Member, failure: NonFiniteLoss) -> None:
  """Leaves word that a member has no results, and why."""
  member.workdir.mkdir(parents=True, exist_ok=True)
  write_whole(member.workdir / FAILED, (json.dumps({"why": str(failure)}) + "\n").encode())


@dataclasses.dataclass(frozen=True)
class Rehearsal:
  """What one iteration of members together costs: how many fit, its seconds, MiB on each device, and of compiling."""

  number: int
  seconds: float
  mib: float
  compiling: float


def rehearsed(c: Config, card: dict, data: Data, number: int, teachers: bool) -> Rehearsal:
  """The costs of `number` members of a resolved config, or of as many as fit, on random weights.

  `teachers` is whether they have several of them.
  """
  mesh, began = members_mesh(), time.monotonic()
  net, key = experiment.build_teacher(c, card), streams.root(c.seed)
  image = jnp.zeros((2, *data.spec.image_shape))
  variables = nets.init(net, streams.key(key, Stream.STUDENT_INIT), image)
  setup = experiment.build(c, data.spec, net, card, mesh)
  state = experiment.initial_state(c, setup, key, data.spec.image_shape, variables)

  number = min(number, beginning(state, 2))

  def build(number: int) -> Program:
    return Program(setup, 1, [state] * number, [variables] * (number if teachers else 1))

  number, program = fitting(number, build, number * _bytes(state))
  compiling = time.monotonic() - began
  state, epoch = program.loaded()
  state, _ = jax.block_until_ready(epoch(state))
  began = time.monotonic()
  jax.block_until_ready(epoch(state))
  return Rehearsal(number, time.monotonic() - began, program.needed / 2**20, compiling)
