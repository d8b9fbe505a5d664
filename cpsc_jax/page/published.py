"""What others have published for a pair of networks on a data set, in percent, at the best epoch on the test images.

From the READMEs of the repositories of CMI, Fast-Datafree, CuDFKD, AdaDFKD and SpaceshipNet. Their teachers differ from
run to run and from a user's own, so that gaps to the teacher compare better than accuracies.
"""

from typing import Any, NamedTuple


class Figures(NamedTuple):
  """Others' figures for one pair, in percent.

  Attributes:
    teacher: the teacher's accuracy.
    real: that of a student trained on the real data; None where it is not known.
    methods: {method: its student's accuracy}.
  """

  teacher: float
  real: float | None
  methods: dict[str, float]


_NAMES = ("DAFL", "ZSKT", "DFQ", "CMI", "FastDFKD, 10 steps", "AdaDFKD")


def _figures(teacher: float, real: float, *accuracies: float | None, **more: float) -> Figures:
  names = _NAMES[-len(accuracies) :]
  found = {name: accuracy for name, accuracy in zip(names, accuracies, strict=True) if accuracy is not None}
  return Figures(teacher, real, found | more)


# (data set, teacher, student)
FIGURES = {
  ("cifar10", "resnet34", "resnet18"): _figures(95.70, 95.20, 92.22, 93.32, 94.61, 94.84, 94.05, 95.32),
  ("cifar10", "vgg11", "resnet18"): _figures(92.25, 95.20, 81.10, 89.46, 90.84, 91.13, 90.53, 92.19),
  ("cifar10", "wrn_40_2", "wrn_16_1"): _figures(94.87, 91.12, 65.71, 83.74, 86.14, 90.01, 89.29, 90.05),
  ("cifar10", "wrn_40_2", "wrn_40_1"): _figures(94.87, 93.94, 81.33, 86.07, 91.69, 92.78, 92.51, 93.38),
  ("cifar10", "wrn_40_2", "wrn_16_2"): _figures(94.87, 93.95, 81.55, 89.66, 92.01, 92.52, 92.45, 93.15),
  ("cifar100", "resnet34", "resnet18"): _figures(78.05, 77.10, 77.01, 77.04, 74.34, 77.13, SpaceshipNet=77.41),
  ("cifar100", "vgg11", "resnet18"): _figures(71.32, 77.10, 68.32, 70.56, 67.44, 71.52),
  ("cifar100", "wrn_40_2", "wrn_16_1"): _figures(75.83, 65.31, 54.77, 57.91, 54.02, None),
  ("cifar100", "wrn_40_2", "wrn_40_1"): _figures(75.83, 72.19, 62.92, 68.88, 63.91, 68.19),
  ("cifar100", "wrn_40_2", "wrn_16_2"): _figures(75.83, 73.56, 59.01, 68.75, 65.12, 67.54),
}


def of(results: dict[str, Any]) -> dict[str, Any] | None:
  """What a page says of others beside a distillation: {"teacher", "real", "rows": [[method, accuracy, gap], ...]}.

  None where nothing is known, and of a run that is no distillation.
  """
  config = results["config"]
  if config.get("task", "distil") != "distil":
    return None
  nets = results["teacher"]["net"], results["student"]["net"]
  found = FIGURES.get((config.get("dataset", {}).get("name"), *nets))
  if found is None:
    return None
  rows = [[name, f"{value:.2f}", f"{found.teacher - value:.2f}"] for name, value in found.methods.items()]
  return {"teacher": f"{found.teacher:.2f}", "real": f"{found.real:.2f}", "rows": rows}
