"""The digits: what each part of CPSC-DFKD is worth, over five seeds, each with the same teachers.

Nothing is inherited, which separates the parts: a student that starts as its teacher learns from any images. Parts are
left out one by one, and the generator's terms are tried each alone; the student's terms stay, but for those that need
what was left out.

Without labels in the generator nothing that it draws depends on the class asked for. Then `ce` asks of the same noise
now for one class and now for another, `scl` pulls samples together that were paired at random, and the student's `ce`
teaches labels that mean nothing. So the row without the conditional generator leaves these three out; the row after it
keeps them.
"""

from benchmarks.plan import Row

PAIR, BASE = "Digits, WRN-16-1 -> WRN-10-1, nothing inherited: the parts of CPSC-DFKD", "cpsc"
SEEDS = (20, 21, 22, 23, 24)
TERMS = ("adversarial", "ikd", "bn", "scl", "ce")


def row(name: str, *flags: str, teacher: str = BASE) -> Row:
  return Row(name, "digits", tuple(f"--config.{flag}" for flag in ("student.inherit=False", *flags)), SEEDS, teacher)


def without(*terms: str) -> tuple[str, ...]:
  return tuple(f"loss.generator.{term}=0" for term in terms)


UNCONDITIONAL = "generator.conditional=False"
ROWS = (
  row(BASE, teacher=""),
  row("the paper's weights", "loss.generator.ce=0.7"),  # the config's is 4, the other weights are the paper's
  row("untrained generator", "arm=untrained_generator"),
  row("- conditional generator, ce, scl", UNCONDITIONAL, *without("ce", "scl"), "loss.student.ce=0"),
  row("- conditional generator alone", UNCONDITIONAL),
  *(row(f"- {term}", *without(term)) for term in TERMS),
  *(row(f"{term} alone", *without(*(other for other in TERMS if other != term))) for term in TERMS),
)
