"""oneDNN's convolutions against XLA's: the shapes of every net, dtypes, threads; and what happens without them."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import with_devices
from jax import lax
from parity import assert_close

from cpsc_jax import nets
from cpsc_jax.nets import convolution, onednn

LAYOUT = ("NHWC", "HWIO", "NHWC")


@pytest.fixture
def library():
  if not onednn.usable(jnp.ones((1, 8, 8, 1))):
    pytest.skip("oneDNN or a C++ compiler is not installed")


def cases_of(classifiers):
  """{(image shape, kernel shape, strides, padding)} of all convolutions of nets and generators, on 32-pixel images."""
  found, original = set(), convolution._conv

  def record(x, w, strides, padding, precision):
    found.add((x.shape[1:], w.shape, strides, padding))
    return original(x, w, strides, padding, precision)

  convolution._conv = record
  try:
    image = jnp.zeros((2, 32, 32, 3))
    for name in classifiers:
      net = nets.classifier(name, 10)
      jax.eval_shape(lambda x, net=net: net.init(jax.random.key(0), x, train=False), image)
    for name in nets.GENERATORS:
      net = nets.generator(name, 10, 32, 3, 64)
      latents = jnp.zeros((2, getattr(net, "latent_dim", 16))), jnp.zeros((2,), jnp.int32)
      jax.eval_shape(lambda z, y, net=net: net.init(jax.random.key(0), z, y, train=False), *latents)
  finally:
    convolution._conv = original
  return sorted(found)


def both_ways(x, w, dy, strides, padding):
  """(value, input gradient, weight gradient) by oneDNN, and by XLA in float32."""
  ours = jax.jit(
    lambda x, w, dy: (
      onednn.forward(x, w, strides, padding),
      onednn.input_gradient(dy, w, x.shape, strides, padding),
      onednn.weight_gradient(x, dy, w.shape, strides, padding),
    )
  )(x, w, dy)

  def reference(x, w, dy):
    y, pull = jax.vjp(lambda x, w: lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=LAYOUT), x, w)
    return y, *pull(dy)

  return ours, jax.jit(reference)(*(a.astype(jnp.float32) for a in (x, w, dy)))


def arrays(batch, image, kernel, strides, padding, dtype):
  rng = np.random.default_rng(0)
  sizes = zip(image[:2], kernel[:2], strides, padding, strict=True)
  out = [(size + sum(pads) - k) // s + 1 for size, k, s, pads in sizes]
  shapes = (batch, *image), kernel, (batch, *out, kernel[3])
  return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize(
  "classifiers",
  [("wrn_10_1", "small_resnet8", "resnet18"), pytest.param((*nets.NETS, "wrn_40_2"), marks=pytest.mark.slow)],
  ids=["few", "all"],
)
def test_every_shape_of_the_nets(library, classifiers):
  for image, kernel, strides, padding in cases_of(classifiers):
    ours, theirs = both_ways(*arrays(3, image, kernel, strides, padding, jnp.float32), strides, padding)
    for a, b in zip(ours, theirs, strict=True):
      assert_close(a, b, 3e-5, f"{image} {kernel} {strides} {padding}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
  ("image", "kernel", "strides", "padding"),
  [
    ((7, 9, 5), (3, 3, 5, 6), (2, 2), ((1, 1), (1, 1))),
    ((8, 8, 16), (4, 2, 16, 8), (3, 1), ((0, 2), (1, 0))),
    ((6, 6, 33), (1, 1, 33, 17), (1, 1), ((0, 0), (0, 0))),
    ((5, 5, 1), (5, 5, 1, 1), (1, 1), ((0, 0), (0, 0))),
    ((16, 16, 64), (3, 3, 64, 64), (1, 1), ((1, 1), (1, 1))),
  ],
)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_odd_shapes_and_dtypes(library, image, kernel, strides, padding, batch, dtype):
  inputs = arrays(batch, image, kernel, strides, padding, dtype)
  ours, theirs = both_ways(*inputs, strides, padding)
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == inputs[0].dtype
    assert_close(a.astype(jnp.float32), b, 3e-5 if dtype == "float32" else 1e-2)


def test_batches_of_convolutions(library):
  x, w, _ = arrays(6, (8, 8, 4), (3, 3, 4, 4), (1, 1), ((1, 1), (1, 1)), jnp.float32)

  def gradient(x, w):
    def loss(x, w):
      return jnp.sum(jnp.square(convolution._conv(x, w, (1, 1), ((1, 1), (1, 1)), None)))

    return jax.grad(loss, (0, 1))(x, w)

  xs, ws = x.reshape(3, 2, 8, 8, 4), jnp.stack([w, 2 * w, 3 * w])
  ours = jax.jit(jax.vmap(gradient))(xs, ws)
  for i in range(3):
    for a, b in zip(ours, gradient(xs[i], ws[i]), strict=True):
      np.testing.assert_array_equal(a[i], b)


@pytest.mark.parametrize("size", [4, 16])  # of the larger ones each member has a thread
@pytest.mark.parametrize("members", [(3,), (1,), (2, 3)])
@pytest.mark.parametrize("shared", ["nothing", "images", "weights"])
def test_members_share_what_they_share(library, members, shared, size):
  """Under jax.vmap, also one within another, each convolution is what it is by itself, to round-off."""
  rng = np.random.default_rng(0)
  axes = {"images": members if shared != "images" else (), "weights": members if shared != "weights" else ()}
  x = jnp.asarray(rng.normal(size=(*axes["images"], size, size, size, size)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(*axes["weights"], 3, 3, size, size + 2)), jnp.float32)

  def gradient(x, w):
    def loss(x, w):
      return jnp.mean(jnp.square(convolution._conv(x, w, (2, 1), ((1, 1), (0, 1)), None)))

    return jax.value_and_grad(loss, (0, 1))(x, w)

  together = gradient
  for _ in members:
    together = jax.vmap(together, (0 if axes["images"] else None, 0 if axes["weights"] else None))
  value, gradients = jax.jit(together)(x, w)
  for index in np.ndindex(*members):
    wanted, theirs = gradient(x[index] if axes["images"] else x, w[index] if axes["weights"] else w)
    np.testing.assert_allclose(value[index], wanted, rtol=1e-5)
    for ours, one in zip(gradients, theirs, strict=True):
      assert_close(ours[index], one, 1e-5)


THREADS = """
import json, sys, jax, jax.numpy as jnp, numpy as np
from jax import lax
from cpsc_jax.nets import convolution, onednn

x = jnp.asarray(np.random.default_rng(0).normal(size=(13, 16, 16, 16)), jnp.float32)
ws = jnp.asarray(np.random.default_rng(1).normal(size=(12, 3, 3, 16, 16)), jnp.float32) / 12

def loss(ws, x):  # 12 convolutions that do not wait for each other
  ys = [convolution._conv(x, w, (1, 1), ((1, 1), (1, 1)), None) for w in ws]
  return sum(jnp.mean(jnp.square(y)) for y in ys)

def step(state, _):
  dw, dx = jax.grad(loss, (0, 1))(*state)
  return (state[0] - dw, state[1] - dx), None

ws, x = jax.jit(lambda *state: lax.scan(step, state, length=20)[0])(ws, x)
sums = [float(jnp.vdot(a, jnp.cos(jnp.arange(a.size)).reshape(a.shape))) for a in (ws, x)]
print(json.dumps([onednn.usable(x), jax.device_count(), sums]))
"""


def in_process(**env):
  done = subprocess.run([sys.executable, "-c", THREADS], env={**os.environ, **env}, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_threads_and_devices(library):
  """The same from one thread, from three, which share each convolution and begin many at once, and without oneDNN."""
  used, _, want = in_process(CPSC_JAX_ONEDNN="off")
  assert not used
  for threads in ("1", "3"):
    used, _, got = in_process(NPROC=threads)
    assert used
    np.testing.assert_allclose(got, want, rtol=1e-4)
  used, devices, got = in_process(**with_devices(2))
  assert not used and devices == 2


def test_what_xla_computes_by_itself():
  image = jnp.ones((2, 8, 8, 3))
  assert not onednn.usable(image.astype(jnp.float16))
  assert not onednn.usable(jnp.ones((0, 8, 8, 3)))
  with onednn.disabled():
    assert not onednn.usable(image)
  (n,) = jax.export.symbolic_shape("n")
  jax.eval_shape(
    lambda x: onednn.usable(x) and pytest.fail("not known yet"), jax.ShapeDtypeStruct((n, 8, 8, 3), "float32")
  )


def test_cache_is_made_mended_and_optional(library, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  paths = onednn._installed(onednn.LIBRARY, "libdnnl.so.3"), onednn._installed(onednn.HEADERS, "dnnl.hpp")
  onednn._binding(*paths)
  (kept,) = (tmp_path / "cpsc_jax").iterdir()
  whole = kept.read_bytes()
  monkeypatch.setattr(onednn, "_compile", lambda *_: pytest.fail("compiled again"))
  onednn._binding(*paths)

  def compile_again(library, headers, folder):
    (folder / "binding.so").write_bytes(whole)
    return folder / "binding.so"

  monkeypatch.setattr(onednn, "_compile", compile_again)
  kept.unlink()  # the file that this process has open must stay as it is
  kept.write_bytes(whole[: len(whole) // 2])
  assert onednn._binding(*paths).cpsc_supports(32)
  assert kept.read_bytes() == whole
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert onednn._binding(*paths).cpsc_supports(32)


@pytest.mark.parametrize(
  ("path", "compiler", "said"),
  [("", "c++", "there is no C++ compiler"), ("/usr/bin:/bin", "false", "could not compile")],
)
def test_without_a_compiler_the_reason_is_said(library, tmp_path, monkeypatch, capsys, path, compiler, said):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setenv("PATH", path)
  monkeypatch.setenv("CXX", compiler)
  assert onednn._library.__wrapped__() is None
  assert said in capsys.readouterr().out


def test_without_the_wheels_nothing_is_said(monkeypatch, capsys):
  monkeypatch.setattr(onednn.importlib.metadata, "files", lambda name: None)
  assert onednn._library.__wrapped__() is None
  monkeypatch.setenv("CPSC_JAX_ONEDNN", "off")
  assert onednn._library.__wrapped__() is None
  assert not capsys.readouterr().out
