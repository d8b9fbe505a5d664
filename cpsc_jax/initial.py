"""States before the first iteration, and where their parts lie."""

import jax
import jax.numpy as jnp
import optax

from cpsc_jax import gradients, nets, streams
from cpsc_jax.mesh import place, replicated
from cpsc_jax.setup import Setup
from cpsc_jax.state import Hyper, State, TrainState, Tree, Weights, step_counter
from cpsc_jax.streams import Stream


def state(setup: Setup, key: jax.Array, image_shape: tuple[int, int, int]) -> State:
  """A state with fresh nets, drawn from the key () of a phase; the same on every device count."""
  image, generator = jnp.zeros((2, *image_shape)), None
  if setup.generator:
    inputs = jnp.zeros((2, setup.method.noise.latent_dim)), jnp.zeros((2,), jnp.int32)
    variables = nets.init(setup.generator.net, streams.key(key, Stream.GENERATOR_INIT), *inputs)
    generator = train_state(variables, setup.optimiser_of("generator"), setup.generator.loss_scaling)
  player = setup.student
  variables = nets.init(player.net, streams.key(key, Stream.STUDENT_INIT), image, kernels=player.init)
  student = train_state(variables, player.optimiser, player.loss_scaling)
  trained, memory = setup.method.init(streams.key(key, Stream.METHOD_INIT))
  hyper = Hyper(weights(setup.weights.get("generator", {})), weights(setup.weights["student"]))
  training = streams.key(key, Stream.TRAINING)
  return State(step_counter(), training, generator, student, trained, memory, hyper)


def weights(terms: dict[str, float]) -> Weights:
  return Weights({name: jnp.asarray(weight, float) for name, weight in terms.items()}, jnp.ones((), float))


def train_state(variables: Tree, tx: optax.GradientTransformation, loss_scaling: bool = False) -> TrainState:
  scale = gradients.initial_loss_scale() if loss_scaling else None
  opt_state = jax.jit(tx.init)(variables["params"])
  return TrainState(variables["params"], variables["batch_stats"], opt_state, scale)


def shardings(setup: Setup) -> State:
  """Where the parts of a state lie: on every device, but for what the method splits over them."""
  whole = replicated(setup.mesh)
  trained, memory = setup.method.shardings or (whole, whole)
  return State(whole, whole, whole, whole, trained, memory, whole)


def placed(setup: Setup, state: State) -> State:
  """The state on the devices of the setup's mesh."""
  return place(state, shardings(setup))
