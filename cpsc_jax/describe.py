"""What can be said without a run: the keys, as `--help` and docs/config.md have them, what there is, versions.

python -m cpsc_jax.describe > docs/config.md
"""

import shutil
import textwrap
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from cpsc_jax import datasets, nets, schema
from cpsc_jax.methods import METHODS


def keys(values: Mapping[str, Any]) -> str:
  """Every key of a config, {dotted key: value}, by section: its value, what it means and what it may be."""
  width = min(shutil.get_terminal_size().columns, 110)
  lines, section = [], None
  for name, key in schema.keys_of(values["method"], values["task"]).items():
    if schema.section_of(name) != section:
      section = schema.section_of(name)
      lines += ["", *textwrap.wrap(f"{section or 'config'}: {schema.SECTIONS[section]}", width)]
    changed = "" if values[name] == key.default else f" (default: {key.default!r})"
    lines.append(f"  --config.{name}={values[name]!r}{changed}")
    lines += textwrap.wrap(
      f"{key.meaning} [{schema.kind_of(key)}]", width, initial_indent=" " * 6, subsequent_indent=" " * 6
    )
  return "\n".join(lines)


def inventory(configs: Mapping[str, str]) -> str:
  """The ready configs, {name: what it is}, and the methods, nets and data sets by name."""
  configs = "\n".join(
    textwrap.fill(what, 110, initial_indent=f"  {name:24}", subsequent_indent=" " * 26)
    for name, what in configs.items()
  )
  lists = {
    "methods": METHODS,
    "nets": (*nets.NETS, "wrn_D_K", "cifar_resnetD", "small_resnetD"),
    "generators": nets.GENERATORS,
    "data sets": datasets.DATASETS,
  }
  texts = [
    f"{title}:\n{textwrap.fill(', '.join(names), 100, initial_indent='  ', subsequent_indent='  ')}"
    for title, names in lists.items()
  ]
  variants = (
    "variants, behind a colon:\n  NAME:smoke              seconds through the whole path\n"
    "  NAME:cpu                CIFAR-10 on two CPU cores (cifar10 and METHOD_cifar10)\n"
    "  METHOD_cifar10:digits   the method on the digits"
  )
  return "\n\n".join([f"configs:\n{configs}", variants, *texts])


def versions() -> str:
  """This package's version and those of what it computes with."""
  return (
    f"cpsc_jax {metadata.version('cpsc_jax')} ("
    + ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "flax", "optax"))
    + ")"
  )


def page() -> str:
  """docs/config.md."""
  lines = [
    "# Every key of a config",
    "",
    "Made from [cpsc_jax/schema.py](../cpsc_jax/schema.py) by `python -m cpsc_jax.describe > docs/config.md`. Any key",
    "can be set on the command line, such as `--config.student.lr=0.05`; `cpsc-jax --config digits --help` prints this",
    "list with the values of that config. Keys of one method or task alone are in its configs.",
  ]
  some = schema.KEYS_OF | schema.KEYS_OF_TASK
  every = schema.KEYS | {name: key for own in some.values() for name, key in own.items()}
  for section, title in schema.SECTIONS.items():
    lines += ["", f"## {section or 'config'}", "", f"{title[0].upper()}{title[1:]}.", ""]
    lines += ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for name, key in every.items():
      if schema.section_of(name) == section:
        owners = [f"`{owner}`" for owner, own in some.items() if name in own]
        only = f" ({', '.join(owners)} only)" if owners else ""
        cells = (f"`{name}`", f"`{key.default!r}`", schema.kind_of(key), key.meaning + only)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  print(page(), end="")
