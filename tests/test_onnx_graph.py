"""JAX functions against their ONNX graphs in onnxruntime: every rule; test_export.py has whole nets."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from parity import assert_close

from cpsc_jax.errors import Refusal

onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnx and onnxruntime: pip install -e '.[test]'")
from cpsc_jax.interop import onnx_graph  # noqa: E402

RNG = np.random.default_rng(0)
TABLE, MATRIX, KERNEL = (RNG.standard_normal(shape, np.float32) for shape in ((5, 4), (4, 6), (3, 3, 4, 5)))
LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x, w=KERNEL, strides=(1, 1), padding=((1, 0), (2, 1)), **kw):
  return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT, **kw)


# name, after the primitives under test -> function of x (N, 6, 6, 4)
CASES = {
  "abs neg sign": lambda x: jnp.abs(x) - jnp.sign(-x),
  "add sub mul div": lambda x: (x + TABLE[0] - x[:, :1]) * (2.0 - x) / (3.0 + x * x) - TABLE[1],
  "exp log sqrt rsqrt": lambda x: jnp.log(1 + jnp.exp(x)) + jnp.sqrt(x * x + 1) * lax.rsqrt(x * x + 2),
  "sin cos tanh logistic erf": lambda x: jnp.sin(x) + jnp.cos(x) + jnp.tanh(x) + nn.sigmoid(x) + lax.erf(x),
  "floor ceil round": lambda x: jnp.floor(3 * x) + 2 * jnp.ceil(3 * x) + 4 * jnp.round(jnp.floor(3 * x) / 2),
  "pow integer_pow square": lambda x: jnp.abs(x) ** jnp.float32(1.5) + x**3 + jnp.square(x),
  "max min clamp": lambda x: jnp.maximum(x, 0) + jnp.maximum(x, -x / 2) + jnp.minimum(x, 0.3) + lax.clamp(-1.0, x, 1.0),
  "eq ne lt le gt ge": lambda x: sum(
    i * op(jnp.floor(x), 0.0) for i, op in enumerate((lax.eq, lax.ne, lax.lt, lax.le, lax.gt, lax.ge), start=1)
  ),
  "and or not": lambda x: ((x > 0) & (x < 1) | ~(x > -1)).astype(jnp.float32),
  "select_n": lambda x: jnp.where(x > 0, x, TABLE[2]),
  "convert_element_type": lambda x: (10 * x).astype(jnp.int32).astype(jnp.float32),
  "copy stop_gradient name": lambda x: checkpoint_name(lax.stop_gradient(jnp.copy(x)), "kept") * 2,
  "reshape": lambda x: conv(x).reshape(x.shape[0], -1),
  "squeeze": lambda x: lax.squeeze(x[:, :1], (1,)) + lax.squeeze(x[:, :, 2:3], (2,)),
  "transpose": lambda x: jnp.transpose(conv(x), (0, 3, 2, 1)) * 2,
  "broadcast_in_dim": lambda x: jnp.repeat(x, 2, axis=1),
  "broadcast_in_dim of a constant to the batch": lambda x: jnp.concatenate(
    [x, jnp.broadcast_to(TABLE[3], (x.shape[0], 6, 6, 4))], -1
  ),
  "concatenate": lambda x: jnp.concatenate([conv(x), conv(-x)], axis=-1),
  "slice": lambda x: lax.slice_in_dim(lax.slice_in_dim(conv(x), 1, 5, 2, axis=1), 0, 3, axis=3),
  "split": lambda x: jnp.split(conv(x), (1, 3), axis=3)[1],
  "rev": lambda x: lax.rev(conv(x), (1, 3)),
  "gather of one index": lambda x: x[:, 2] + x[..., 0, :],
  "gather of a range": lambda x: x[:, 1:-1, :, 1:3],
  "gather of every second": lambda x: conv(x)[:, ::2, ::-2],
  "gather of rows": lambda x: jnp.asarray(TABLE)[lax.clamp(-5, (2 * x[:, 0]).astype(jnp.int32), 4)],
  "pad": lambda x: jnp.pad(conv(x), ((0, 0), (1, 2), (0, 0), (3, 0)), constant_values=0.5),
  "pad that cuts": lambda x: lax.pad(x, jnp.float32(0), ((0, 0, 0), (-1, -2, 0), (1, -1, 0), (0, 0, 0))),
  "reduce_sum": lambda x: jnp.mean(conv(x), (1, 2)) + jnp.sum(conv(x), (1, 2)),
  "reduce_max reduce_min": lambda x: jnp.max(conv(x), 3) + jnp.min(conv(x), 3) + jnp.max(x, (1, 2, 3))[:, None, None],
  "reduce_window_max": lambda x: nn.max_pool(x, (3, 2), (2, 1), ((1, 0), (0, 1))),
  "reduce_window_sum": lambda x: nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False),
  "conv_general_dilated": lambda x: conv(x, strides=(2, 1), rhs_dilation=(1, 2)),
  "conv_general_dilated in groups": lambda x: conv(x, KERNEL[:, :, :1, :4].repeat(2, 3), feature_group_count=4),
  "conv_general_dilated of a dilated input": lambda x: conv(x, padding=((2, 1), (0, 2)), lhs_dilation=(2, 3)),
  "dot_general": lambda x: jnp.mean(x, (1, 2)) @ MATRIX,
  "dot_general over a batch": lambda x: jnp.einsum("nhwk,ngwk->nhgw", x, jnp.tanh(x)),
  "dot_general of a last axis that goes to the middle": lambda x: jnp.einsum("nhwk,kq->nqwh", x, MATRIX),
  "jit, checkpoint, custom_jvp": lambda x: jax.checkpoint(jax.jit(lambda x: nn.relu6(x) + nn.silu(x)))(x),
}


def primitives(jaxpr):
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    inner = onnx_graph.unpacked(eqn)
    if inner is not None:
      yield from primitives(getattr(inner, "jaxpr", inner))


def in_onnxruntime(function, *arrays, variables=()):
  inputs = {f"input_{i}": (a.shape[1:], a.dtype) for i, a in enumerate(arrays)}
  model = onnx_graph.build(function, variables, inputs, "output", {})
  session = onnxruntime.InferenceSession(model.SerializeToString())

  def transposed(a, axes):
    return a.transpose(axes) if a.ndim == 4 else a

  def run(*arrays):
    channels_first = [transposed(a, (0, 3, 1, 2)) for a in arrays]
    (result,) = session.run(None, dict(zip(inputs, channels_first, strict=True)))
    return transposed(result, (0, 2, 3, 1))

  return model, run


@pytest.mark.parametrize("case", CASES)
def test_rule(case):
  x = np.random.default_rng(1).standard_normal((3, 6, 6, 4), np.float32)
  _, run = in_onnxruntime(lambda _, x: CASES[case](x), x)
  for size in (1, 3):
    assert_close(run(x[:size]), CASES[case](jnp.asarray(x[:size])), 1e-6, case)


def test_every_rule_is_tested():
  (batch,) = jax.export.symbolic_shape("batch")
  x = jax.ShapeDtypeStruct((batch, 6, 6, 4), jnp.float32)
  seen = {name for case in CASES.values() for name in primitives(jax.make_jaxpr(case)(x).jaxpr)}
  assert set(onnx_graph.RULES) <= seen


class Own(nn.Module):
  """A network of the user's: patches, attention, group and layer norm, no batch norm."""

  @nn.compact
  def __call__(self, x):
    x = nn.gelu(nn.GroupNorm(2)(nn.Conv(8, (3, 3), (2, 2))(x)))
    x = x.reshape(x.shape[0], -1, 8)
    x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    return nn.Dense(5)(x.mean(1)), x


def test_a_module_of_the_user():
  x = np.random.default_rng(1).standard_normal((3, 8, 8, 3), np.float32)
  variables = jax.jit(Own().init)(jax.random.key(0), x)
  model, run = in_onnxruntime(lambda v, x: Own().apply(v, x)[0], x, variables=variables)
  for size in (1, 3):
    assert_close(run(x[:size]), jax.jit(Own().apply)(variables, x[:size])[0], 1e-5)
  assert "params.Conv_0.kernel" in {i.name for i in model.graph.initializer}


def test_unsupported_primitives_are_refused():
  x = np.ones((2, 6, 6, 4), np.float32)
  for function, name in (
    (lambda _, x: jnp.sort(x), "sort"),
    (lambda _, x: jnp.cumsum(x, 1), "cumsum"),
    (lambda _, x: lax.pad(x, jnp.float32(0), ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0))), "pad"),
    (lambda _, x: jnp.broadcast_to(TABLE[0], (2 * x.shape[0], 4)), "broadcast_in_dim"),
    (lambda _, x: x / x.shape[0], "dim_as_value"),
    (lambda _, x: lax.slice_in_dim(x, 1, x.shape[0], axis=0), "slice"),
    (lambda _, x: lax.cond(jnp.sum(x) > 0, jnp.sin, jnp.cos, x), "cond"),
  ):
    with pytest.raises(Refusal, match=f"'{name}'.*stablehlo"):
      in_onnxruntime(function, x)
  with pytest.raises(Refusal, match="the ONNX graph is not valid.*And"):
    in_onnxruntime(lambda _, x: x.astype(jnp.int32) & 1, x)


def test_unused_equations_are_left_out():
  def function(_, x):
    jnp.sort(x)
    return jnp.tanh(x)

  model, _ = in_onnxruntime(function, np.ones((2, 6, 6, 4), np.float32))
  assert [node.op_type for node in model.graph.node] == ["Tanh", "Identity"]


def test_equal_nodes_are_written_once():
  model, _ = in_onnxruntime(lambda _, x: jnp.exp(x) * jnp.exp(x) + jnp.exp(x), np.ones((2, 3), np.float32))
  assert [node.op_type for node in model.graph.node] == ["Exp", "Mul", "Add", "Identity"]
