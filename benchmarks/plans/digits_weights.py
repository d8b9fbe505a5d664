"""The digits: accuracy against the weight of each of the generator's terms, as in Fig. 3 of the paper, over five seeds.

One weight at a time, the others as in the config, nothing inherited. The weights are the generator's; those of the
student's terms with the same Greek letters stay.
"""

from benchmarks.plan import Row

PAIR, BASE = "Digits, WRN-16-1 -> WRN-10-1, nothing inherited: weights of the generator's terms", "cpsc"
SEEDS = (20, 21, 22, 23, 24)
VALUES = {  # the config's own among them
  "ikd": ("alpha", (0.0, 1.0, 2.5, 5.0, 10.0)),
  "bn": ("beta", (0.0, 0.3, 1.0, 3.0, 10.0)),
  "scl": ("gamma", (0.0, 0.2, 0.7, 2.0, 5.0)),
  "ce": ("eta", (0.0, 0.7, 2.0, 4.0, 8.0)),
}
OF_CONFIG = {"ikd": 5.0, "bn": 1.0, "scl": 0.7, "ce": 4.0}


def name(term: str, value: float) -> str:
  return BASE if value == OF_CONFIG[term] else f"{VALUES[term][0]} {value:g}"


def row(name: str, *flags: str, teacher: str = BASE) -> Row:
  return Row(name, "digits", tuple(f"--config.{flag}" for flag in ("student.inherit=False", *flags)), SEEDS, teacher)


ROWS = (
  row(BASE, teacher=""),
  *(
    row(name(term, value), f"loss.generator.{term}={value:g}")
    for term, (_, values) in VALUES.items()
    for value in values
    if value != OF_CONFIG[term]
  ),
)
CURVES = {
  f"{letter}, weight of {term}": {value: name(term, value) for value in values}
  for term, (letter, values) in VALUES.items()
}
