"""The converter as a command: formats, flags, what it writes, and published checkpoints."""

import re
import runpy
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import shared
from cpsc_jax.configs import digits
from parity import jitted_forward, nhwc, shapes
from safetensors.numpy import save_file

from cpsc_jax import checkpoint, datasets, nets, teach
from cpsc_jax.interop import convert
from cpsc_jax.interop.convert.__main__ import main
from cpsc_jax.mesh import make_mesh

torch = pytest.importorskip("torch", reason="the files are made with torch: pip install -e '.[test]'")
import torch_zoo as zoo  # noqa: E402


@pytest.fixture(scope="module")
def twin():
  torch.manual_seed(0)
  return zoo.randomise(zoo.ThinResNet(8, 10, free=True)).eval()


def converted(capsys, source, *flags):
  """(card, printed) of a conversion that must succeed."""
  out = source.parent / f"{source.name}-teacher"
  code = main([str(source), "--out", str(out), *flags])
  stdout, stderr = capsys.readouterr()
  assert code == 0, stderr
  return checkpoint.read_card(out), stdout


def refused(capsys, *command):
  assert main([str(part) for part in command]) == 2
  line = capsys.readouterr().err
  assert line.startswith("cpsc_jax: ") and line.count("\n") == 1
  return line


def on_gpu(path):
  """Changes a file so that its tensors were saved from a GPU."""
  with zipfile.ZipFile(path) as archive:
    entries = [(name, archive.read(name)) for name in archive.namelist()]
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in entries:
      marked = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
      assert (marked != content) == name.endswith("data.pkl")
      archive.writestr(name, marked)


def prefixed(state, prefix):
  return {prefix + key: value for key, value in state.items()}


SAVED = {
  "bare.pth": lambda path, state: torch.save(state, path),
  "legacy.pth.tar": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
  "state_dict.ckpt": lambda path, state: torch.save({"epoch": 3, "state_dict": prefixed(state, "model.")}, path),
  "model.pt": lambda path, state: torch.save({"model": prefixed(state, "module.")}, path),
  "net.t7": lambda path, state: torch.save({"net": prefixed(state, "module._orig_mod."), "acc": 91.2}, path),
  "model_state_dict.pth": lambda path, state: torch.save({"model_state_dict": state, "optimizer": {}}, path),
  "parameters.pth": lambda path, state: torch.save(
    {key: torch.nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()}, path
  ),
  "double.pth": lambda path, state: torch.save({k: v.double() for k, v in state.items() if v.ndim}, path),
  "gpu.pth": lambda path, state: (torch.save(state, path), on_gpu(path)),
  "library.safetensors": lambda path, state: save_file({k: v.numpy() for k, v in state.items()}, path),
  "misnamed.bin": lambda path, state: save_file({k: v.numpy() for k, v in state.items()}, path),
}


@pytest.mark.parametrize("name", SAVED)
def test_formats(name, twin, tmp_path, capsys):
  """However a state dict is saved, the variables are the same."""
  SAVED[name](tmp_path / name, twin.state_dict())
  card, printed = converted(capsys, tmp_path / name)
  like = shapes(nets.classifier("cifar_resnet8", 10), jnp.zeros((2, 32, 32, 3)))
  variables = convert.from_torch("cifar_resnet8", zoo.arrays(twin), like)
  assert card["digest"] == checkpoint.digest(variables) and card["digest"] in printed
  assert card["net"] == "cifar_resnet8" and "cifar_resnet8, 10 classes, 75,290 parameters" in printed
  assert re.fullmatch("[0-9a-f]{64}", card["source_sha256"]) and card["source"] == name
  checkpoint.load_net(tmp_path / f"{name}-teacher", like)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_half_precision_becomes_single(kind, suffix, twin, tmp_path, capsys):
  from safetensors.torch import save_file as save_torch

  state = {key: value.to(kind) if value.ndim else value for key, value in twin.state_dict().items()}
  source = tmp_path / f"half.{suffix}"
  save_torch(state, source) if suffix == "safetensors" else torch.save(state, source)
  card, _ = converted(capsys, source)
  like = shapes(nets.classifier("cifar_resnet8", 10), jnp.zeros((2, 32, 32, 3)))
  variables, _ = checkpoint.load_net(f"{source}-teacher", like)
  expected = convert.from_torch("cifar_resnet8", {key: value.float().numpy() for key, value in state.items()}, like)
  jax.tree.map(np.testing.assert_array_equal, variables, expected)
  assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))


def test_without_pytorch(twin, tmp_path, capsys, monkeypatch):
  state = twin.state_dict()
  torch.save(state, tmp_path / "a.pth")
  save_file({key: value.numpy() for key, value in state.items()}, tmp_path / "a.safetensors")
  monkeypatch.setitem(sys.modules, "torch", None)
  card, _ = converted(capsys, tmp_path / "a.safetensors")
  assert card["net"] == "cifar_resnet8"
  line = refused(capsys, tmp_path / "a.pth", "--out", tmp_path / "out")
  assert "pip install 'cpsc_jax[torch]'" in line and ".safetensors" in line
  code = "import sys; sys.modules['torch'] = None; from cpsc_jax.interop.convert.__main__ import main; sys.exit(main())"
  command = [sys.executable, "-c", code, tmp_path / "a.safetensors", "--out", tmp_path / "without"]
  assert subprocess.run(command, capture_output=True, timeout=120).returncode == 0


@pytest.fixture
def source(twin, tmp_path):
  torch.save(twin.state_dict(), tmp_path / "a.pth")
  return tmp_path / "a.pth"


def test_flags_override(source, capsys):
  card, printed = converted(capsys, source)
  assert card["mean"] == [0.485, 0.456, 0.406] and "customary for this family" in printed
  again = source.rename(source.with_name("b.pth"))
  flags = ["--mean", "0.5,0.4,0.3", "--std=.2,.2,.2", "--image_size", "48", "--num_classes", "10"]
  card, printed = converted(capsys, again, *flags, "--arch", "cifar_resnet8")
  assert (card["mean"], card["std"], card["image_size"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2], 48)
  assert "mean 0.5, 0.4, 0.3, std 0.2, 0.2, 0.2" in printed and "from --mean and --std" in printed


REFUSED_FLAGS = {
  "classes": (["--num_classes", "100"], "has 10 classes, but --num_classes is 100"),
  "another net": (["--arch", "cifar_resnet14"], r"missing: layer1.1.bn1.running_mean.* and \d+ more"),
  "another family": (["--arch", "imagenet_resnet18"], "missing: .*unexpected: linear.bias, linear.weight; wrong shape"),
  "no net": (["--arch", "alexnet"], "no PyTorch family has a net 'alexnet'"),
  "no depth": (["--arch", "wrn_17_1"], "6n"),
  "mean without std": (["--mean", "0.5,0.5,0.5"], "must be given together"),
  "two channels": (["--mean", "0.5,0.5", "--std", "0.5,0.5"], "must be 3 finite numbers each, one per channel"),
  "no spread": (["--mean", "0.5,0.5,0.5", "--std", "0.5,0,0.5"], "positive"),
  "not finite": (["--mean", "0.5,0.5,nan", "--std", "1,1,1"], "finite"),
  "no size": (["--image_size", "0"], "--image_size must be between 8 and 1024, got 0"),
  "no data set": (["--check", "mnist"], "no data set 'mnist'"),
  "not prepared": (["--check", "cifar10", "--data_dir", "/nonexistent"], "prepare cifar10"),
  "other data": (["--check", "digits"], "digits"),
}


@pytest.mark.parametrize("case", REFUSED_FLAGS)
def test_flags_that_contradict_the_file(case, source, digits_dir, capsys):
  flags, message = REFUSED_FLAGS[case]
  data = [] if "--data_dir" in flags else ["--data_dir", digits_dir]
  assert re.search(message, refused(capsys, source, "--out", source.parent / "out", *flags, *data))
  assert sorted(source.parent.iterdir()) == [source]


def test_places_that_cannot_be_written(source, capsys):
  taken = source.parent / "taken"
  taken.mkdir()
  (taken / "thesis.txt").write_text("mine")
  assert "exists" in refused(capsys, source, "--out", taken)
  assert [path.name for path in taken.iterdir()] == ["thesis.txt"]
  assert "cannot be written" in refused(capsys, source, "--out", source / "below")
  assert "no file" in refused(capsys, source.parent / "none.pth", "--out", source.parent / "out")
  assert "no file" in refused(capsys, source.parent, "--out", source.parent / "out")


def test_no_customary_normalisation(tmp_path, capsys):
  """No data set has 17 classes, so that nets of the zoo need --mean and --std."""
  torch.save(zoo.WideResNet(10, 1, 17).state_dict(), tmp_path / "a.pth")
  assert "--mean and --std" in refused(capsys, tmp_path / "a.pth", "--out", tmp_path / "out")
  card, _ = converted(capsys, tmp_path / "a.pth", "--mean", "0,0,0", "--std", "1,1,1")
  assert (card["net"], card["num_classes"], card["image_size"]) == ("wrn_10_1", 17, 32)


def test_converted_teacher_is_checked_and_used(digits_dir, tmp_path, capsys):
  """A net of random weights: its accuracy on the digits is PyTorch's, and a run takes it as its teacher."""
  twin = zoo.randomise(zoo.WideResNet(10, 1, 10))
  twin.conv1 = torch.nn.Conv2d(1, 16, 3, 1, 1, bias=False)
  torch.save(twin.state_dict(), tmp_path / "a.pth")
  flags = ["--mean", "0.3", "--std", "0.4", "--data_dir", digits_dir]
  card, printed = converted(capsys, tmp_path / "a.pth", "--check", "digits", *flags)
  data = datasets.find("digits", digits_dir)
  test = data.load_evaluation("test")
  x = torch.tensor((np.asarray(test.images) / 255.0 - 0.3) / 0.4).permute(0, 3, 1, 2).float()
  with torch.no_grad():
    right = int((twin.eval()(x)[0].argmax(1).numpy() == np.asarray(test.labels)).sum())
  assert card["accuracy"] == right / 454 and f"({right} of the 454 test images of 'digits')" in printed
  config = digits.get_config()
  config.teacher.checkpoint = str(tmp_path / "a.pth-teacher")
  card = teach.describe_teacher(config, data)
  assert card["mean"] == [0.3]
  net = nets.classifier(card["net"], card["num_classes"])
  teacher = teach.obtain_teacher(config, net, card, data, test, tmp_path, make_mesh(), {})
  with torch.no_grad():
    logits = twin(x[:5])[0].numpy()
  ours = jitted_forward(teacher.net, False)(teacher.variables, jnp.asarray(nhwc(x[:5].numpy())))[0].logits
  np.testing.assert_allclose(ours, logits, atol=1e-4)


# Published checkpoints: file -> net, twin, correct predictions of 10,000 by PyTorch
PUBLISHED = {
  "resnet20-12fca82f.th": ("cifar_resnet20", lambda: zoo.ThinResNet(20, 10, free=True), 9173),
  "resnet56-4bfd9763.th": ("cifar_resnet56", lambda: zoo.ThinResNet(56, 10, free=True), 9339),
  "WRN10_1_cifar10.pth": ("wrn_10_1", lambda: zoo.WideResNet(10, 1, 10), 8806),
  "WRN16_1_cifar10.pth": ("wrn_16_1", lambda: zoo.WideResNet(16, 1, 10), 9175),
  "resnet8_cifar10.pth": ("small_resnet8", lambda: zoo.ThinResNet(8, 10, free=False), 8959),
  "resnet20_cifar10.pth": ("small_resnet20", lambda: zoo.ThinResNet(20, 10, free=False), 9302),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name, tmp_path, capsys):
  """Each converts without flags, and its logits on real images are PyTorch's."""
  source, (net_name, twin, _) = shared("data", "checkpoints", name), PUBLISHED[name]
  images = runpy.run_path(str(shared("data", "unpack.py")))["cifar10"]("test")[0][:32]
  out = tmp_path / "teacher"
  assert main([str(source), "--out", str(out)]) == 0
  net = nets.classifier(net_name, 10)
  variables, card = checkpoint.load_net(out, shapes(net, jnp.zeros((2, 32, 32, 3))))
  assert card["net"] == net_name
  content = torch.load(source, map_location="cpu", weights_only=True)
  state = content.get("state_dict") or content["model_state_dict"]
  state = {key.removeprefix("module."): value for key, value in state.items()}
  twin = twin().eval()
  twin.load_state_dict(zoo.layered(state) if net_name.startswith("wrn") else state)
  x = (images / np.float32(255) - np.float32(card["mean"])) / np.float32(card["std"])
  with torch.no_grad():
    theirs = twin(torch.tensor(x).permute(0, 3, 1, 2))[0].numpy()
  ours = jitted_forward(net, False)(variables, x)[0].logits
  assert np.abs(ours - theirs).max() <= 1e-4
  assert capsys.readouterr().out.startswith(f"{source}: ")


@pytest.fixture(scope="module")
def cifar10_dir(tmp_path_factory):
  from cpsc_jax.datasets.prepare import prepare

  folder = tmp_path_factory.mktemp("cifar10")
  subprocess.run([sys.executable, shared("data", "unpack.py"), "cifar10", folder], check=True)
  prepare("cifar10", str(folder), folder / "cifar-10-binary.tar.gz")
  return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_accuracy_of_published_checkpoints(name, cifar10_dir, tmp_path):
  source, (_, _, right) = shared("data", "checkpoints", name), PUBLISHED[name]
  assert main([str(source), "--out", str(tmp_path / "t"), "--check", "cifar10", "--data_dir", cifar10_dir]) == 0
  assert abs(checkpoint.read_card(tmp_path / "t")["accuracy"] * 10_000 - right) <= 2


@pytest.mark.parametrize("flag", ["check", "images"])
def test_what_is_for_classifiers_is_refused_of_a_generator(flag, tmp_path, capsys):
  torch.save(zoo.CifarGenerator(12, 4, 32, 3, 5).state_dict(), tmp_path / "g.pth")
  value = "digits" if flag == "check" else tmp_path / "nowhere"
  error = refused(capsys, tmp_path / "g.pth", "--out", tmp_path / "g", f"--{flag}", value)
  assert f"is a generator, and --{flag} is for classifiers; remove it." in error and not (tmp_path / "g").exists()
