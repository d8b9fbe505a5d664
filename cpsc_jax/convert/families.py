"""The families of PyTorch networks that this package knows, told apart by their keys and shapes."""

import re

from cpsc_jax.convert.mapping import ROWS, TRANSPOSED, Naming

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # as most public CIFAR code has it

RESIDUAL = (
  (r"(layer\d)_(\d+)/shortcut_conv", r"\1.\2.shortcut.0"),
  (r"(layer\d)_(\d+)/shortcut_bn", r"\1.\2.shortcut.1"),
  (r"(layer\d)_(\d+)/(\w+)", r"\1.\2.\3"),
)
ZOO = Naming(
  (
    (r"(block\d)_(\d+)/shortcut", r"\1.layer.\2.convShortcut"),  # wide ResNet
    (r"(block\d)_(\d+)/(\w+)", r"\1.layer.\2.\3"),
    (r"(block\d)_conv(\d+)", lambda m: f"{m[1]}.{3 * int(m[2])}"),  # VGG
    (r"(block\d)_bn(\d+)", lambda m: f"{m[1]}.{3 * int(m[2]) + 1}"),
    *RESIDUAL,
  )
)
LAYERED_WRN = Naming(
  (
    (r"block(\d)_(\d+)/shortcut", r"layer\1.layer.\2.convShortcut"),
    (r"block(\d)_(\d+)/(\w+)", r"layer\1.layer.\2.\3"),
    (r"fc", "linear"),
  )
)
TORCHVISION_RESNET = Naming(
  (
    (r"(layer\d)_(\d+)/shortcut_conv", r"\1.\2.downsample.0"),
    (r"(layer\d)_(\d+)/shortcut_bn", r"\1.\2.downsample.1"),
    (r"(layer\d)_(\d+)/(\w+)", r"\1.\2.\3"),
    (r"linear", "fc"),
  )
)
TORCHVISION_NUMBERED = Naming(((r"(features|classifier)_.*", lambda m: re.sub("[_/]", ".", m[0])),))
CIFAR_GENERATOR = Naming(
  (
    (r"project", "l1.0"),
    (r"cbn0", "conv_blocks0_0"),
    (r"cbn3", "conv_blocks3_2"),
    (r"conv(\d)", r"conv_blocks\1_0"),
    (r"cbn(\d)", r"conv_blocks\1_1"),
  ),
  {"project": ROWS},
)
DCGAN_GENERATOR = Naming(
  (
    (r"project", "project.1"),
    (r"cbn0", "conv_blocks0_0"),
    (r"conv(\d)", r"conv_blocks\1_0"),
    (r"cbn(\d)", r"conv_blocks\1_1"),
  ),
  {"project": ROWS, **{f"conv{i}": TRANSPOSED for i in range(1, 5)}},
)
