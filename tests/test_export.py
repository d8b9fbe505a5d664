"""Exporting nets of a finished run and drawing samples: content of the files, equal outputs, refusals."""

import functools
import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors
from conftest import REPOSITORY, with_devices
from parity import assert_close, nhwc, shapes

from cpsc_jax import checkpoint, datasets, nets, sample, saved
from cpsc_jax.errors import Refusal
from cpsc_jax.interop import convert, export, onnx_graph

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[test]'")
onnx = pytest.importorskip("onnx", reason="needs onnx: pip install -e '.[test]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install -e '.[test]'")
import torch_zoo as zoo  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

LARGER = {"small_resnet8": 16, "dcgan": 16, "mobilenet_v2": 32}  # pixels; ImageNet's nets 32, the others 8
SAVED_GENERATORS = [name for name in nets.GENERATORS if name != "pixels"]  # which no run saves
EVERY = (*nets.NETS, "wrn_16_2", "cifar_resnet8", "small_resnet8", *SAVED_GENERATORS)
DEEPER = (
  "resnet34",
  "resnet50",
  "vgg13",
  "vgg16",
  *(f"imagenet_{n}" for n in ("resnet34", "resnet50", "vgg13", "vgg16", "vgg19")),
)
CLASSES, LATENT, WIDTH = 5, 6, 4


FORM = {"conditional": True, "output": "tanh", "epsilon": 0.0, "init": "torch"}


def pixels(name):
  return LARGER.get(name, 32 if name.startswith("imagenet") else 8)


def random_net(name, channels=3, **form):
  """A `SavedNet` with random variables, so that any reordering changes them; ImageNet's VGG with few hidden units."""
  card = {"net": name, "num_classes": CLASSES, "image_size": pixels(name), "channels": channels}
  card |= {"mean": [0.5] * channels, "std": [0.25] * channels, "latent_dim": LATENT, "width": WIDTH, **FORM, **form}
  net, inputs = saved.rebuild(card)
  net = net.clone(hidden=48) if name.startswith("imagenet_vgg") else net
  random = np.random.default_rng(0)

  def draw(path, like):
    spread = 0.7 * np.prod(like.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.2
    offset = 1.0 if path[-1].key in ("scale", "var") else 0.0
    return (offset + spread * random.standard_normal(like.shape)).astype(np.float32)

  variables = jax.tree_util.tree_map_with_path(draw, shapes(net, *inputs))
  variables = jax.tree.map(jax.numpy.asarray, variables)
  return saved.SavedNet(net, variables, {**card, "digest": checkpoint.digest(variables)})


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in DEEPER else n for n in EVERY])
def test_onnx_and_stablehlo_equal_jax(name, tmp_path, monkeypatch):
  net = random_net(name)
  assert export.write_onnx(tmp_path / "net.onnx", net) < 1e-5
  monkeypatch.setattr(export, "BATCHES", (max(export.BATCHES),))  # every size is compiled; test_formats has them all
  assert export.write_stablehlo(tmp_path / "net.stablehlo", net) < 1e-5
  model = onnx.load(tmp_path / "net.onnx")
  ports = [*model.graph.input, *model.graph.output]
  sizes = {port.name: [d.dim_param or d.dim_value for d in port.type.tensor_type.shape.dim] for port in ports}
  images = ["batch", 3, pixels(name), pixels(name)]
  if name in nets.GENERATORS:
    assert sizes == {"latent": ["batch", LATENT], "labels": ["batch"], "images": images}
  else:
    assert sizes == {"images": images, "logits": ["batch", CLASSES]}
  exported = jax.export.deserialize((tmp_path / "net.stablehlo").read_bytes())
  assert set(exported.platforms) == {"cpu", "cuda", "tpu"}


def test_the_graph_is_as_small_as_the_net(tmp_path):
  net = random_net("resnet18")
  inputs, output, call = export.signature(net)
  model = onnx_graph.build(call, net.variables, inputs, output, {})
  kinds = [node.op_type for node in model.graph.node]
  assert kinds.count("Conv") == 20 and set(kinds) == {
    *("Conv", "Add", "Mul", "Relu", "ReduceSum", "Div", "MatMul", "Identity")
  }
  options = onnxruntime.SessionOptions()
  options.optimized_model_filepath = str(tmp_path / "fused.onnx")
  options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
  onnxruntime.InferenceSession(model.SerializeToString(), options)
  fused = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
  assert "Mul" not in fused, "batch norm is fused into the convolutions"


TWINS = {
  "wrn_16_2": lambda: zoo.WideResNet(16, 2, CLASSES),
  "resnet18": lambda: zoo.ResNet((2, 2, 2, 2), CLASSES),
  "vgg11": lambda: zoo.VGG((1, 1, 2, 2, 2), CLASSES),
  "cifar_resnet8": lambda: zoo.ThinResNet(8, CLASSES, free=True),
  "imagenet_resnet18": lambda: zoo.ImageNetResNet((2, 2, 2, 2), CLASSES),
  "mobilenet_v2": lambda: zoo.MobileNetV2(CLASSES),
  "cifar": lambda: zoo.CifarGenerator(LATENT, WIDTH, 8, 3, CLASSES),
  "dcgan": lambda: zoo.DCGANGenerator(LATENT, WIDTH, 16, 3, CLASSES),
}


@pytest.mark.parametrize("name", TWINS)
def test_pytorch_loads_the_weights_strictly(name, tmp_path):
  """The round trip JAX -> PyTorch module -> JAX is bit-identical, and the outputs agree."""
  net = random_net(name)
  readers = {"torch": lambda path: torch.load(path, weights_only=True), "safetensors": load_file}
  for form, read in readers.items():
    twin = TWINS[name]().eval()
    assert export.FORMATS[form].write(tmp_path / form, net) < (1e-5 if form == "torch" else 1e-30)
    twin.load_state_dict(read(tmp_path / form), strict=True)
    assert checkpoint.digest(convert.from_torch(name, zoo.arrays(twin), net.variables)) == net.card["digest"]
  _, _, call = export.signature(net)
  random = np.random.default_rng(1)
  if net.is_generator:
    z, y = random.standard_normal((3, LATENT), np.float32), np.asarray([0, 4, 2])
    theirs, ours = (lambda: nhwc(twin(torch.from_numpy(z), torch.from_numpy(y)).numpy())), (z, y)
  else:
    x = random.standard_normal((3, 3, pixels(name), pixels(name)), np.float32)
    theirs, ours = (lambda: twin(torch.from_numpy(x))[0].numpy()), (nhwc(x),)
  with torch.no_grad():
    assert_close(jax.jit(call)(net.variables, *ours), theirs(), 1e-5)


ELSEWHERE = """
import json, sys
for name in ("cpsc_jax", "jax", "flax", "numpy.typing"):
  sys.modules[name] = None  # cannot be imported
import numpy, torch
for job in json.load(sys.stdin):
  space = {}
  exec(job["lines"], space)
  net, size = space["load"](), job["images"]
  torch.manual_seed(0)
  more = (torch.randn(5, job["latent"]), torch.arange(5)) if job["latent"] else (torch.randint(256, size).byte(),)
  numpy.savez(job["out"], *(a.numpy() for a in more), shown=(space["images"] if job["latent"] else space["logits"])
    .detach().numpy(), result=net(*more).detach().numpy(), floats=net(more[0] / 255 if not job["latent"] else more[0],
    *more[1:]).detach().numpy())
"""


def called_elsewhere(tmp_path, capsys, jobs):
  """Runs what `export --format torch` prints, where nothing of ours and no JAX can be imported; compares with JAX."""
  orders = []
  for number, (net, export_it) in enumerate(jobs):
    folder = tmp_path / f"folder {number}'s"
    folder.mkdir()
    capsys.readouterr()
    export_it(folder / f"{net.card['net']}-{number}.pth")
    printed = [line[4:] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert len(printed) == 3
    shape = [5, net.card["channels"], net.card["image_size"], net.card["image_size"]]
    latent = net.card["latent_dim"] if net.is_generator else 0
    out = str(folder / "results.npz")
    orders.append({"lines": "\n".join(printed), "images": shape, "latent": latent, "out": out})
  done = subprocess.run(
    [sys.executable, "-c", ELSEWHERE], input=json.dumps(orders), text=True, cwd="/", capture_output=True, check=False
  )
  assert done.returncode == 0, done.stderr
  for (net, _), order in zip(jobs, orders, strict=True):
    _, _, call = export.signature(net)
    mean, std = (np.asarray(net.card[key], np.float32) for key in ("mean", "std"))
    with np.load(order["out"]) as found:
      if net.is_generator:
        ours = datasets.denormalise(jax.jit(call)(net.variables, found["arr_0"], found["arr_1"]), mean, std)
        assert (
          found["shown"].shape == (1, *order["images"][1:]) and 0 <= found["shown"].min() < found["shown"].max() <= 1
        )
        assert_close(ours, nhwc(found["result"]), 1e-5)
        continue
      called = jax.jit(call)
      for name, pixels in (("result", found["arr_0"]), ("floats", found["arr_0"]), ("shown", 0 * found["arr_0"])):
        x = (nhwc(pixels).astype(np.float32) / 255 - mean) / std
        assert_close(called(net.variables, x)[: len(found[name])], found[name], 1e-4)


@pytest.mark.parametrize(
  "names",
  [
    ("wrn_16_2", "vgg11", "cifar_resnet8", "small_resnet8", *SAVED_GENERATORS),
    pytest.param(
      ("resnet18", "resnet50", "vgg16", "mobilenet_v2", *(n for n in EVERY if n.startswith("imagenet"))),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_printed_lines_call_the_exported_module(names, tmp_path, capsys):
  """In a process that has PyTorch and neither JAX nor this package; images of one channel and of three."""
  jobs = []
  for number, name in enumerate(names):
    net = random_net(name, channels=1 if number % 2 else 3)
    jobs.append((net, functools.partial(export.export_net, net, "torch")))
  called_elsewhere(tmp_path, capsys, jobs)


@pytest.mark.parametrize("form", [{"conditional": False}, {"output": "sigmoid", "epsilon": 1e-5}])
def test_modules_of_other_generators(form, tmp_path):
  for name in SAVED_GENERATORS:
    net = random_net(name, **form)
    assert export.write_torch(tmp_path / f"{name}.pth", net) < 1e-5
    text = (tmp_path / f"{name}_net.py").read_text()
    assert len(text.splitlines()) < 120 and "cpsc_jax" not in text


def test_modules_are_named_so_that_they_can_be_imported(tmp_path):
  for name in ("torch.pth", "my-net.v2.pth", "3.pt", "学生.pth", "a'b.pth"):
    stem = export.torch_nets.beside(tmp_path / name).stem
    assert stem.isidentifier() and stem.isascii() and stem not in sys.stdlib_module_names, name


def test_neither_file_is_written_where_one_exists(capsys, tmp_path, finished):
  (tmp_path / "x_net.py").write_text("mine")
  argv = (finished, "--format", "torch", "--out", tmp_path / "x.pth")
  refused(capsys, tmp_path, export.main, argv, "x_net.py already exists")
  assert (tmp_path / "x_net.py").read_text() == "mine"


def test_safetensors_metadata(tmp_path):
  net = random_net("wrn_10_1")
  export.write_safetensors(tmp_path / "weights", net)
  with safetensors.safe_open(tmp_path / "weights", "numpy") as file:
    said = file.metadata()
  assert said["net"] == "wrn_10_1" and said["digest"] == net.card["digest"]
  assert json.loads(said["mean"]) == [0.5] * 3 and json.loads(said["num_classes"]) == CLASSES
  assert json.loads(said["class_names"]) == ["0", "1", "2", "3", "4"]


# The commands, on a real run.


def out_of(tmp_path, *argv):
  assert export.main([*map(str, argv), "--out", str(tmp_path / "file")]) == 0
  module = ["file_net.py"] if "torch" in argv else []
  assert sorted(path.name for path in tmp_path.iterdir()) == ["file", *module]
  return tmp_path / "file"


def results_of(workdir):
  return json.loads((workdir / "results.json").read_text())


@pytest.mark.parametrize("which", ["student", "student_best", "teacher"])
def test_the_onnx_file_has_the_accuracy_of_the_run(which, finished, digits_dir, tmp_path, capsys):
  path = out_of(tmp_path, finished, "--format", "onnx", *(() if which == "student" else ("--which", which)))
  said = capsys.readouterr().out
  assert "77,562 parameters" in said and "of the largest output" in said and "mean [0.3057]" in said
  session = onnxruntime.InferenceSession(str(path))
  facts = session.get_modelmeta().custom_metadata_map
  test = datasets.find("digits", digits_dir).load_evaluation("test")
  mean, std = (np.asarray(json.loads(facts[key]), np.float32) for key in ("mean", "std"))
  images = ((np.asarray(test.images) / 255 - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
  (logits,) = session.run(["logits"], {"images": images})
  results = results_of(finished)
  figures = {
    "student": results["student"]["last"],
    "student_best": results["student"]["best"],
    "teacher": results["teacher"],
  }
  assert np.mean(logits.argmax(1) == np.asarray(test.labels)) == pytest.approx(figures[which]["accuracy"])


@pytest.mark.parametrize("which", ["student", "generator"])
@pytest.mark.parametrize("form", ["torch", "safetensors", "stablehlo"])
def test_formats(form, which, finished, tmp_path, capsys):
  out_of(tmp_path, finished, "--format", form, "--which", which)
  assert ("bit-identical" in capsys.readouterr().out) == (form == "safetensors")


def test_the_folder_of_a_net_is_accepted(finished, tmp_path):
  digest = checkpoint.read_card(finished / "generator")["digest"]
  path = out_of(tmp_path, finished / "generator", "--format", "safetensors")
  with safetensors.safe_open(path, "numpy") as file:
    assert file.metadata()["digest"] == digest and "conv_blocks3_2.weights.weight" in file.keys()  # noqa: SIM118


def test_the_command_runs_as_documented(finished, tmp_path):
  """Also as a module, and without --format where the suffix says it."""
  for module in (("cpsc_jax", "export"), ("cpsc_jax.interop.export",)):
    out = tmp_path / f"{module[0]}.safetensors"
    argv = [sys.executable, "-m", *module, finished, "--out", out]
    subprocess.run(argv, cwd=REPOSITORY, check=True, capture_output=True)
    assert out.stat().st_size > 4 * 77562


def arrays_of(tmp_path, workdir, *argv):
  path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
  assert sample.main([str(workdir), *argv, "--out", str(path)]) == 0
  with np.load(path) as arrays:
    return arrays["images"], arrays["labels"]


def test_samples(finished, tmp_path):
  images, labels = arrays_of(tmp_path, finished, "--classes", "3,5", "--per_class", "4")
  assert images.shape == (2, 4, 8, 8, 1) and labels.tolist() == [3, 5]
  assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.01
  every, labels = arrays_of(tmp_path, finished, "--per_class", "4")
  np.testing.assert_array_equal(every[[3, 5]], images)
  assert labels.tolist() == list(range(10))
  other, _ = arrays_of(tmp_path, finished, "--per_class", "4", "--seed", "1")
  assert np.abs(other - every).max() > 0.01
  generator = saved.load(finished / "generator")
  z = jax.random.normal(jax.random.fold_in(jax.random.key(0), 5), (4, 16))
  x = generator.net.apply(generator.variables, z, np.full(4, 5), train=False)
  np.testing.assert_allclose(images[1], datasets.denormalise(x, [0.3057], [0.3762]), atol=1e-5)


def test_a_picture_of_samples(finished, tmp_path):
  import matplotlib.image

  for name, classes in (("few", 2), ("many", 10)):
    out = tmp_path / f"{name}.png"
    assert sample.main([str(finished), "--classes", ",".join(map(str, range(classes))), "--out", str(out)]) == 0
  few, many = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("few", "many"))
  assert few.shape[1] == many.shape[1] > 700 and many.shape[0] > 3 * few.shape[0] / 2 > 150
  assert few[..., :3].std() > 0.05


def test_class_names_are_saved(finished):
  assert checkpoint.read_card(finished / "student")["class_names"] == [str(i) for i in range(10)]
  assert saved.class_names({"num_classes": 2, "class_names": ["cat", "dog"]}) == ["cat", "dog"]


def test_a_net_saved_on_other_devices(finished, tmp_path):
  program = """import sys, jax
from cpsc_jax import checkpoint, mesh, saved
net = saved.load(sys.argv[1])
assert jax.device_count() == 8
checkpoint.save_net(sys.argv[2], jax.device_put(net.variables, mesh.replicated(mesh.make_mesh())), net.card)"""
  environment = with_devices(8)
  argv = [sys.executable, "-c", program, finished / "student", tmp_path / "net"]
  subprocess.run(argv, cwd=REPOSITORY, env=environment, check=True, capture_output=True)
  digest = checkpoint.read_card(finished / "student")["digest"]
  assert checkpoint.digest(saved.load(tmp_path / "net").variables) == digest


def test_a_teacher_outside_the_run_is_found(finished, tmp_path):
  for name in ("config.json", "results.json"):
    shutil.copy(finished / name, tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  config["teacher"]["checkpoint"] = str(finished / "teacher")
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert saved.find(tmp_path, "teacher") == finished / "teacher"


def test_another_teacher_in_its_place_is_refused(capsys, tmp_path, finished):
  workdir = copy_of(finished, tmp_path, "config.json", "results.json")
  config = json.loads((workdir / "config.json").read_text())
  config["teacher"]["checkpoint"] = str(finished / "student")
  (workdir / "config.json").write_text(json.dumps(config))
  argv = (workdir, "--which", "teacher", "--format", "safetensors", "--out", tmp_path / "x")
  refused(capsys, tmp_path, export.main, argv, "has another net now than the teacher of the run")


# Refusals: one sentence, exit code 2, nothing written.


def refused(capsys, tmp_path, main, argv, *words):
  before = sorted(tmp_path.rglob("*"))
  assert main([str(a) for a in argv]) == 2
  error = capsys.readouterr().err
  assert error.startswith("cpsc_jax: ") and error.count("\n") == 1 and "Traceback" not in error, error
  for word in words:
    assert word in error, error
  assert sorted(tmp_path.rglob("*")) == before


def copy_of(finished, tmp_path, *parts):
  (tmp_path / "run").mkdir()
  for part in parts:
    (shutil.copytree if (finished / part).is_dir() else shutil.copy)(finished / part, tmp_path / "run" / part)
  return tmp_path / "run"


def test_bad_flags_are_refused(capsys, tmp_path, finished):
  out = ("--out", tmp_path / "x.png")
  for main, argv, *words in (
    (export.main, (finished, "--format", "tf", *out), "'tf'", "safetensors"),
    (export.main, (finished, *out), "--format", ".safetensors, .onnx"),
    (export.main, (finished, "--format", "onnx"), "--out"),
    (export.main, (finished, "--format", "onnx", "--which", "critic", *out), "'critic'", "student_best"),
    (export.main, (finished / "student", "--format", "onnx", "--which", "student", *out), "remove --which"),
    (sample.main, (finished, "--classes", "3,x", *out), "comma-separated integers", "3,x"),
    (sample.main, (finished, "--classes", "3,10", *out), "no class 10", "0 to 9"),
    (sample.main, (finished, "--classes=-1", *out), "no class -1"),
    (sample.main, (finished, "--per_class", "0", *out), "--per_class must be at least 1, got 0"),
    (sample.main, (finished, "--per_class", "101", *out), "--per_class must be at most 100", "got 101", ".npz"),
    (sample.main, (finished, "--seed", 2**40, *out), "--seed"),
    (sample.main, (finished, "--out", tmp_path / "x.gif"), ".png"),
    (sample.main, (finished / "student", *out), "not a generator"),
    (sample.main, (finished, "--out", tmp_path / f"{300 * 'n'}.png"), "choose another --out"),
    (sample.main, (tmp_path / (300 * "n"), *out), "File name too long; mend this"),
  ):
    refused(capsys, tmp_path, main, argv, *words)


def test_unfinished_runs_are_refused(capsys, tmp_path, finished):
  argv = ("--format", "onnx", "--out", tmp_path / "x")
  refused(capsys, tmp_path, export.main, (tmp_path / "nowhere", *argv), "no run and no saved net")
  workdir = copy_of(finished, tmp_path, "config.json", "student")
  command = f"cpsc-jax --config CONFIG --workdir {workdir}"
  refused(capsys, tmp_path, export.main, (workdir, *argv), "'digits_smoke'", "not finished", command)
  shutil.copy(finished / "results.json", workdir)
  refused(capsys, tmp_path, export.main, (workdir, "--which", "student_best", *argv), "no saved net")
  config = json.loads((workdir / "config.json").read_text())
  (workdir / "config.json").write_text(json.dumps({**config, "arm": "real_kd"}))
  refused(capsys, tmp_path, sample.main, (workdir, "--out", tmp_path / "x.png"), "no generator", "real_kd")
  for text in ("{", "[1]"):
    (workdir / "config.json").write_text(text)
    refused(capsys, tmp_path, export.main, (workdir, *argv), "config.json")


def test_damaged_nets_are_refused(capsys, tmp_path, finished):
  workdir = copy_of(finished, tmp_path, "config.json", "results.json", "student", "generator")
  for which in ("student", "generator"):
    card = json.loads((workdir / which / checkpoint.CARD).read_text())
    argv = (workdir, "--format", "safetensors", "--which", which, "--out", tmp_path / "x")
    fewer = {"num_classes": 7, "class_names": [*"abcdefg"]}
    for damage, word in (
      (card | {"digest": "0" * 64}, "damaged"),
      (card | fewer, "cannot be read"),
      (card | {"class_names": ["a"]}, "it must be 10 texts, one for each class"),
    ):
      (workdir / which / checkpoint.CARD).write_text(json.dumps(damage))
      refused(capsys, tmp_path, export.main, argv, "was changed since it was written")
      (workdir / which / checkpoint.CARD).write_text(json.dumps(checkpoint.sealed(damage)))
      refused(capsys, tmp_path, export.main, argv, word)
    lacking = checkpoint.sealed({k: v for k, v in card.items() if k != "mean"})
    (workdir / which / checkpoint.CARD).write_text(json.dumps(lacking))
    refused(capsys, tmp_path, export.main, argv, "lacks mean")
    (workdir / which / checkpoint.CARD).write_text("{")
    refused(capsys, tmp_path, export.main, argv, "no saved net")


def test_nothing_is_overwritten_or_left_behind(capsys, tmp_path, finished):
  (tmp_path / "mine.png").write_text("mine")
  out = ("--out", tmp_path / "mine.png")
  refused(capsys, tmp_path, export.main, (finished, "--format", "onnx", *out), "already exists")
  refused(capsys, tmp_path, sample.main, (finished, *out), "already exists")
  assert (tmp_path / "mine.png").read_text() == "mine"
  for place in (tmp_path / "no" / "x.png", tmp_path / "mine.png" / "x.png", tmp_path / ("n" * 300 + ".png")):
    refused(capsys, tmp_path, export.main, (finished, "--format", "onnx", "--out", place), "cannot write")
    refused(capsys, tmp_path, sample.main, (finished, "--out", place), "cannot write")


@pytest.mark.parametrize("form", [name for name, form in export.FORMATS.items() if form.packages])
def test_a_missing_package_names_its_extra(form, capsys, tmp_path, finished, monkeypatch):
  monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
  extra = {"onnx": "onnx", "stablehlo": "stablehlo"}.get(form, "torch")
  argv = (finished, "--format", form, "--out", tmp_path / "x")
  refused(capsys, tmp_path, export.main, argv, f"pip install 'cpsc_jax[{extra}]'")


def test_a_file_that_differs_from_the_net_is_removed(capsys, tmp_path, finished, monkeypatch):
  """A weight is changed before it is written."""

  def changed(tree):
    return jax.tree.map(lambda a: a + 1e-3 if a.ndim == 4 else a, tree)

  to_torch, signature = convert.to_torch, export.signature
  monkeypatch.setattr(convert, "to_torch", lambda name, variables: changed(to_torch(name, variables)))
  for form in ("torch", "safetensors"):
    argv = (finished, "--format", form, "--out", tmp_path / "x")
    refused(capsys, tmp_path, export.main, argv, f"the {form} file differs from the net")
  calls = []

  def once_changed(net):
    """The net that is written differs from the one that it is compared with."""
    inputs, output, call = signature(net)
    calls.append(net)
    return inputs, output, (lambda v, *x: call(changed(v), *x)) if len(calls) % 2 else call

  monkeypatch.setattr(export, "signature", once_changed)
  for form in ("onnx", "stablehlo"):
    argv = (finished, "--format", form, "--out", tmp_path / "x")
    refused(capsys, tmp_path, export.main, argv, f"the {form} file differs from the net by")


def test_a_net_without_pytorch_twin_still_exports(tmp_path):
  """Its weights have no PyTorch names, but its graph does not need them."""
  net = random_net("wrn_10_1")
  net = net._replace(card={**net.card, "net": "somebody_s"})
  assert export.write_onnx(tmp_path / "x.onnx", net) < 1e-5
  with pytest.raises(Refusal, match="somebody_s"):
    export.write_safetensors(tmp_path / "x.safetensors", net)
