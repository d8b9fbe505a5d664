"""The normalisation of a teacher's inputs is told from what its first batch norm has stored."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from cpsc_jax import nets, saved
from cpsc_jax.errors import Refusal
from cpsc_jax.interop.convert import __main__ as convert
from cpsc_jax.interop.convert import families, mapping, normalisations, torch_files
from cpsc_jax.interop.convert.__main__ import main, shapes_of
from cpsc_jax.state import Output

CHECKPOINTS = SHARED / "data" / "checkpoints"
RIGHT = {
  "resnet20-12fca82f.th": "ImageNet",
  "resnet56-4bfd9763.th": "ImageNet",
  "WRN10_1_cifar10.pth": "most CIFAR-10 code",
  "WRN16_1_cifar10.pth": "most CIFAR-10 code",
  "resnet8_cifar10.pth": "most CIFAR-10 code",
  "resnet20_cifar10.pth": "most CIFAR-10 code",
  "resnet20_cifar100.pth": "CIFAR-100",
  "resnet32_cifar100.pth": "CIFAR-100",
}


def smooth_images(number=200, side=32, channels=3, seed=0):
  """Random images with the strong correlation of neighbours that photographs have, and channels of their own."""
  random = np.random.default_rng(seed)
  coarse = random.normal(0, 1, (number, side // 8, side // 8, channels)) + random.normal(0, 1, (number, 1, 1, channels))
  x = np.repeat(np.repeat(coarse, 8, 1), 8, 2) * [0.14, 0.16, 0.2] + [0.4, 0.5, 0.55]
  return (255 * np.clip(x[..., :channels], 0, 1)).astype(np.uint8)


def taught(images, mean, std, augmentation=True):
  """A net whose first batch norm has stored the moments of these images under a normalisation."""
  net = nets.classifier("wrn_10_1", 10)
  x = normalisations.augmented(images) if augmentation else images
  x = (jnp.asarray(x, jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
  variables = nets.init(net, jax.random.key(0), x[:2])
  seen = jax.jit(lambda x: nets.forward_observed(net, variables, x).statistics.seen)(x)
  variables["batch_stats"]["block1_0"]["bn1"] = {key: seen["block1_0", "bn1"][key] for key in ("mean", "var")}
  return net, variables


@pytest.mark.parametrize(
  ("name", "augmentation"), [*((name, True) for name in normalisations.KNOWN), ("ImageNet", False)]
)
def test_the_right_one_is_found_on_other_images(name, augmentation):
  tried = normalisations.candidates(3, {})
  net, variables = taught(smooth_images(), *tried[name], augmentation)
  matches = normalisations.rank(net, variables, smooth_images(seed=1), tried)
  assert matches[0].name == name and matches[0].cropped == augmentation and matches[0].distance < 0.02
  assert [m.distance for m in matches] == sorted(m.distance for m in matches) and len(matches) == len(tried)


def test_images_are_looked_at_in_parts_with_the_same_result(monkeypatch):
  tried = normalisations.candidates(3, {})
  net, variables = taught(smooth_images(), *tried["ImageNet"])
  found = []
  for at_once in (200 * 32**2, 50 * 32**2):
    monkeypatch.setattr(normalisations, "AT_ONCE", at_once)
    found.append(normalisations.rank(net, variables, smooth_images(seed=1), tried))
  for whole, parts in zip(*found, strict=True):
    assert whole.name == parts.name and whole.distance == pytest.approx(parts.distance, rel=1e-3, abs=1e-6)


def test_one_that_is_none_of_the_known_is_not_sure():
  tried = normalisations.candidates(3, {})
  net, variables = taught(smooth_images(), (0.2, 0.9, 0.1), (1.5, 0.1, 0.4))
  assert not normalisations.is_sure(normalisations.rank(net, variables, smooth_images(seed=1), tried))


def test_candidates_are_each_tried_once_and_fit_the_channels():
  own = {
    "mine": ((0.1, 0.2, 0.3), (0.2, 0.2, 0.2)),
    "none": None,
    "rounded": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
  }
  found = normalisations.candidates(3, {**own, "grey": ((0.3,), (0.2,))})
  assert list(found) == [*normalisations.KNOWN, "mine", "grey"] and found["grey"] == ((0.3,) * 3, (0.2,) * 3)
  assert set(normalisations.candidates(1, {})) == {"-1 to 1", "0 to 1"}


def test_a_net_without_batch_norm_has_no_ranking():

  class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      return Output(nn.Dense(10)(x.reshape(len(x), -1)))

  net = Plain()
  variables = net.init(jax.random.key(0), smooth_images(2).astype(np.float32), train=False)
  assert normalisations.rank(net, variables, smooth_images(60), normalisations.candidates(3, {})) == []


def test_folders_of_images(tmp_path):
  with pytest.raises(Refusal, match="has 0 PNG or JPEG images; give a folder with 50 or more"):
    normalisations.images_below(tmp_path, 32, 3)
  (tmp_path / "deep" / "er").mkdir(parents=True)
  images = smooth_images(60)
  for number, image in enumerate(images):
    Image.fromarray(image).save((tmp_path if number % 2 else tmp_path / "deep" / "er") / f"{number}.png")
  (tmp_path / "notes.txt").write_text("no image")
  found = normalisations.images_below(tmp_path, 32, 3)
  assert found.shape == (60, 32, 32, 3) and found.dtype == np.uint8
  assert sorted(map(bytes, found)) == sorted(map(bytes, images))
  assert normalisations.images_below(tmp_path, 16, 1).shape == (60, 16, 16, 1)
  with pytest.raises(Refusal, match="images of 1 or 3 channels"):
    normalisations.images_below(tmp_path, 32, 4)


@pytest.fixture(scope="module")
def photographs():
  """{data set: (test images, labels)}, of the real archives."""
  if not CHECKPOINTS.exists():
    pytest.skip("needs the checkpoints and images of ../shared/data")
  sys.path.insert(0, str(SHARED / "data"))
  unpack = pytest.importorskip("unpack")
  cifar100 = unpack.mosaics(SHARED / "data" / "cifar100" / "test.npz")
  return {"cifar10": unpack.cifar10("test")[:2], "cifar100": cifar100[:2]}


TRIED = ("most CIFAR-10 code", "CIFAR-10", "CIFAR-100", "ImageNet")
EVERY = 4  # how many of the test images stand for one that is classified


def decided(source, *flags):
  """What the converter decides about a checkpoint, in words; (words, how it came to it, mean)."""
  args = convert.parser().parse_args([str(source), "--out", "nowhere", *map(str, flags)])
  weights, _ = torch_files.read(args.source)
  shapes = {key: array.shape for key, array in weights.items()}
  family, name = families.recognise(shapes)
  facts = family.measure(shapes)
  card = {"net": name, "image_size": 32, **facts}
  net, inputs = saved.rebuild(card)
  variables = mapping.from_torch(family.naming, weights, shapes_of(net, inputs))
  data = convert.customary_data(facts)
  return *convert.normalisation(args, family, card, data, net, variables), net, variables


@pytest.mark.slow
def test_real_checkpoints_are_never_wrong_in_silence(photographs, tmp_path):
  """Accuracy of others' nets under each normalisation, and what the converter takes or warns of. Prints a table."""
  rows, folders = [], {}
  for name, (images, _) in photographs.items():
    folders[name] = tmp_path / name
    folders[name].mkdir()
    for number, image in enumerate(images[:: len(images) // 1000]):
      Image.fromarray(image).save(folders[name] / f"{number:05d}.png")
  for file, right in RIGHT.items():
    images, labels = photographs["cifar100" if "cifar100" in file else "cifar10"]
    source, given = CHECKPOINTS / file, ("--images", folders["cifar100" if "cifar100" in file else "cifar10"])
    seen, doubts, net, variables = decided(source, *given)
    wanted = normalisations.KNOWN[right]
    assert normalisations.same((seen["mean"], seen["std"]), wanted) and not doubts and right in seen["normalisation"]
    blind, warned, *_ = decided(source)
    is_right = normalisations.same((blind["mean"], blind["std"]), wanted)
    assert warned and "not compared" in warned[0]
    batches, wanted_labels = jnp.asarray(images[::EVERY]).reshape(-1, 250, 32, 32, 3), labels[::EVERY].reshape(-1, 250)

    @jax.jit
    def predicted(mean, std, net=net, variables=variables, batches=batches):
      def classify(batch):
        return jnp.argmax(net.apply(variables, (batch / 255 - mean) / std, train=False).logits, axis=1)

      return jax.lax.map(classify, batches)

    shares, told = {}, []
    for name in TRIED:
      mean, std = normalisations.KNOWN[name]
      shares[name] = float(np.mean(np.asarray(predicted(jnp.asarray(mean), jnp.asarray(std))) == wanted_labels))
      flags = (f"--mean={','.join(map(str, mean))}", f"--std={','.join(map(str, std))}")
      (said, warning, *_), (alone, silence, *_) = decided(source, *flags, *given), decided(source, *flags)
      assert said["mean"] == list(mean) and bool(warning) == (name != right)
      assert all(f"that of {right} fits the images better" in line for line in warning)
      assert not silence and "not compared with what the net has stored" in alone["normalisation"]
      told.append("right" if name == right else "warned")
    assert shares[right] > max(shares.values()) - 0.01
    cells = [f"**{100 * share:.1f}**" if name == right else f"{100 * share:.1f}" for name, share in shares.items()]
    print(file, seen["normalisation"], sep=": ")
    without = "right, warned" if is_right else f"wrong ({blind['normalisation']}), warned"
    rows.append(f"| {file} | {' | '.join(cells)} | {right}, sure | {without} | {', '.join(told)} |")
  print("\n".join(rows))


@pytest.mark.skipif(not CHECKPOINTS.exists(), reason="needs the checkpoints of ../shared/data")
def test_without_images_the_choice_is_doubted_and_with_flags_it_is_not(tmp_path, capsys):
  source = str(CHECKPOINTS / "resnet20_cifar100.pth")
  assert main([source, "--out", str(tmp_path / "a")]) == 0
  shown = capsys.readouterr().out
  assert "WARNING" in shown and "not compared with what the net has stored" in shown and "--images FOLDER" in shown
  flags = ["--mean=0.507,0.487,0.441", "--std=0.267,0.256,0.276"]
  assert main([source, "--out", str(tmp_path / "b"), *flags]) == 0 and "WARNING" not in capsys.readouterr().out
