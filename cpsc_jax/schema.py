"""Every key of a config in one table: its default value, what it may be, and what it means.

`configs/default.py`, the checks, `--help`, docs/config.md and the tests are all made from it. What a value must have to
do with other keys and with the data stands in config.py.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from cpsc_jax import methods
from cpsc_jax.errors import Refusal


@dataclasses.dataclass(frozen=True)
class Range:
  """Finite numbers from `low` to `high`; each end belongs to it unless it is open."""

  low: float
  high: float
  low_open: bool = False
  high_open: bool = False

  def has(self, value: float) -> bool:
    above = value > self.low if self.low_open else value >= self.low
    below = value < self.high if self.high_open else value <= self.high
    return math.isfinite(value) and above and below

  def __str__(self) -> str:
    if self.high == math.inf:
      return "a finite number"
    return f"{self.beginning} and {'less than' if self.high_open else 'at most'} {self.high:,}"

  @property
  def beginning(self) -> str:
    return f"{'greater than' if self.low_open else 'at least'} {self.low:,}"


@dataclasses.dataclass(frozen=True)
class Key:
  """A key: its default, whose type is the key's; its meaning; and its range, if a number, or its choices, if a text."""

  default: Any
  meaning: str
  allowed: Range | tuple[str, ...] | None = None

  def __post_init__(self) -> None:
    number = isinstance(self.default, int | float) and not isinstance(self.default, bool)
    assert number == isinstance(self.allowed, Range), f"{self} needs a range if it is a number, and only then"


MANY, HUGE = 10**9, 1e30  # more than any run has of anything; more than any weight or rate
COUNT, COUNT_OR_NONE, SIZE = Range(1, MANY), Range(0, MANY), Range(1, 2**20)
SHARE, PROBABILITY = Range(0, 1, high_open=True), Range(0, 1, low_open=True)
POSITIVE, NOT_NEGATIVE = Range(0, HUGE, low_open=True), Range(0, HUGE)
ANY = Range(-math.inf, math.inf)

SYNTHETIC_ARMS = ("distill", "untrained_generator", "gaussian_noise")  # without real images
REAL_ARMS = ("real_kd", "real_labels")
INCREMENTAL_ARMS = ("no_rehearsal", "lwf", "real_rehearsal", "joint")


def _optimiser(schedule: Key) -> dict[str, Key]:
  """The keys of how a classifier is trained, teacher or student."""
  return {
    "micro_batches": Key(1, "parts of a batch, to save memory; batch norm sees one part at a time", SIZE),
    "optimiser": Key("sgd", "what follows the gradients", ("sgd", "adam", "adamw", "nesterov")),
    "lr": Key(0.1, "learning rate at its highest", POSITIVE),
    "momentum": Key(0.9, "of SGD, plain or Nesterov's; decay of Adam's and AdamW's first moment", SHARE),
    "weight_decay": Key(5e-4, "of SGD and Adam added to the gradient, of AdamW apart from it", NOT_NEGATIVE),
    "decay_norms": Key(True, "weight decay on biases and on the scales of norms too"),
    "schedule": schedule,
    "lr_end": Key(0.0, 'where "cosine" ends', NOT_NEGATIVE),
    "milestones": Key((), "epochs at which the learning rate falls"),
    "decay": Key(0.1, "what it is multiplied by there", Range(0, 1)),
    "clip": Key(0.0, "largest norm of all gradients together; 0: any", NOT_NEGATIVE),
  }


TEACHER = {
  "checkpoint": Key(
    "", "folder of a saved teacher (WORKDIR/teacher of another run); empty: train one on the training split"
  ),
  "net": Key("resnet34", "a row of cpsc_jax.nets.NETS, or wrn_D_K; the rest of this section is for training one"),
  "epochs": Key(100, "passes over the training split", COUNT),
  "batch_size": Key(32, "over all devices together; what is left of an epoch is dropped", SIZE),
  **_optimiser(
    Key(
      "cosine",
      '"cosine": per step to lr_end; "cosine_per_epoch": the same in steps, as in the published code;'
      ' "steps": lr * decay at each milestone',
      ("cosine", "cosine_per_epoch", "steps"),
    )
  ),
  "warmup_epochs": Key(0, "epochs of linear warm-up", COUNT_OR_NONE),
  "label_smoothing": Key(0.0, "share of the uniform distribution in the targets", SHARE),
  "crop_pad": Key(4, "random crops after padding by so many black pixels; 0: none", COUNT_OR_NONE),
  "flip": Key(True, "random horizontal flips; refused for data sets whose classes do not survive them"),
}
STUDENT = {
  "net": Key("resnet18", "as teacher.net; where feature widths differ it is given a feature head"),
  "steps": Key(5, "student updates per iteration", COUNT),
  "crop_pad": Key(
    0,
    "random crops of what the student learns from, after padding by so many black pixels; 0: none, as published",
    COUNT_OR_NONE,
  ),
  "flip": Key(False, "random horizontal flips of the same"),
  "head": Key(
    "trained",
    'the feature head: "trained" by a contrast on detached features; "frozen": never, as in the published code',
    ("trained", "frozen"),
  ),
  "init": Key(
    "kaiming", 'of convolutions (He et al., fan out); "torch": PyTorch\'s default, uniform', ("kaiming", "torch")
  ),
  "norm_parts": Key(
    1,
    "parts of a batch of which the net's batch norms take statistics one by one; with as many as devices, or a"
    " multiple, none travel between them. Flax's own nn.BatchNorm takes the whole batch",
    SIZE,
  ),
  "inherit": Key(
    False,
    "whether layers start as the teacher's of the same name; narrower ones as evenly spaced channels of them (weight"
    " selection, ICLR 2024)",
  ),
  "classifier": Key(
    "own",
    '"teacher": the teacher\'s last linear layer, which is not trained (SimKD, CVPR 2022; with loss.student.features)',
    ("own", "teacher"),
  ),
  **_optimiser(
    Key(
      "cosine",
      '"cosine": per step to lr_end; "published_steps": per epoch, with 10 epochs of warm-up and an end'
      ' above 0; "steps": lr * decay at each milestone',
      ("cosine", "published_steps", "steps"),
    )
  ),
  "warmup_epochs": Key(10, "epochs of linear warm-up", COUNT_OR_NONE),
}
GENERATOR = {
  "net": Key(
    "cifar",
    '"cifar" (image size divisible by 4) or "dcgan" (by 16); "pixels" has no parameters: its latent'
    " is the image itself",
  ),
  "conditional": Key(
    True, "whether the label enters its batch norms (CFE); False for methods whose generator has none"
  ),
  "latent_dim": Key(256, "the width of the noise", SIZE),
  "embedding": Key(
    "",
    "NAYER: an embedding of the classes and layers drawn at random take the place of noise."
    ' "classifier": the rows of the teacher\'s classifier, standardised; "one_hot"; "learned"; or a .npy file with a'
    " row for each class; empty: noise",
  ),
  "width": Key(64, "channels of the narrowest layer", Range(1, 2**14)),
  "output": Key(
    "tanh",
    '"tanh": normalised pixels, as in the published code of CPSC-DFKD; "sigmoid": pixels in [0, 1],'
    " normalised afterwards",
    ("tanh", "sigmoid"),
  ),
  "init": Key(
    "torch",
    'PyTorch\'s defaults; "normal": kernels from N(0, 0.02), scales of norms from N(1, 0.02)',
    ("torch", "normal"),
  ),
  "epsilon": Key(0.0, "of its batch norms; 0: the net's own, 1e-3 (of dcgan 0.8)", NOT_NEGATIVE),
  "steps": Key(6, "generator updates per iteration", COUNT),
  "warmup_epochs": Key(
    0, "epochs at the start in which the generator learns alone; a control's student waits as long", COUNT_OR_NONE
  ),
  "ema": Key(
    0.0, "of an average of its parameters, which forgets 1 - ema in each iteration (MAD, NeurIPS 2022); 0: none", SHARE
  ),
  "ema_share": Key(0.5, "share of the student's fresh samples that this average draws", SHARE),
  "label_limit": Key(
    0, "labels are drawn from the first so many classes; 0: all. The published code draws from 100", COUNT_OR_NONE
  ),
  "labels": Key(
    "uniform",
    'labels are drawn one by one; "balanced": every batch has all classes equally often',
    ("uniform", "balanced"),
  ),
  "prior": Key(
    "uniform",
    'how often each class is asked for (docs/prior.md): "uniform"; "given", as prior_shares says; "teacher", as often'
    ' as among the teacher\'s training images, which is estimated from it; "need", more often where the student'
    " disagrees with the teacher",
    ("uniform", "given", "teacher", "need"),
  ),
  "prior_shares": Key(
    "",
    'of "given": a number for each class, 5,3,1, or a .json, .npy or .txt file of them; in proportion to these labels'
    " are drawn",
  ),
  "prior_floor": Key(0.5, 'of "need": the part of the labels that is drawn alike from all classes', PROBABILITY),
  "prior_momentum": Key(0.99, 'of "need": what is left of the estimate of a class after one more sample of it', SHARE),
  "between_share": Key(
    0.0, "share of the student's fresh samples that lie between classes (Qimera, NeurIPS 2021)", SHARE
  ),
  "between": Key(2, "so many classes each", Range(2, 2**10)),
  "student_mode": Key(
    "eval", 'of the student in generator steps; "train": its running statistics move there', ("eval", "train")
  ),
  "stats_in_student_steps": Key(False, "whether the generator's running statistics move in student steps"),
  "micro_batches": Key(1, "parts of a batch, to save memory; batch norm sees one part at a time", SIZE),
  "optimiser": Key(
    "adam",
    '"restarted_adam": rebuilt at every step, without moments; its schedule never acts',
    ("adam", "restarted_adam"),
  ),
  "lr": Key(1e-3, "of Adam", POSITIVE),
  "b1": Key(0.5, "decay of Adam's first moment", SHARE),
  "b2": Key(0.999, "decay of its second", SHARE),
  "schedule": Key("steps", '"steps": lr * decay at each milestone; "cosine": to 0 at the end', ("steps", "cosine")),
  "milestones": Key((50, 150), "epochs at which the learning rate falls"),
  "decay": Key(0.1, "what it is multiplied by there", Range(0, 1)),
  "clip": Key(0.0, "largest norm of all gradients together; 0: any", NOT_NEGATIVE),
  "crop_pad": Key(
    0, "random crops of what both nets see in generator steps, after padding by so many black pixels", COUNT_OR_NONE
  ),
  "flip": Key(False, "random horizontal flips of the same"),
  "jitter": Key(
    "crops",
    'of each image by itself; "rolls": the batch moves as one, by up to crop_pad pixels that enter on the other side',
    ("crops", "rolls"),
  ),
  "clip_pixels": Key(False, "whether the pixels of net `pixels` stay within black and white"),
}
POOL = {
  "size": Key(51200, "images held; the newest replace the oldest", COUNT),
  "batch_size": Key(256, "images that an inversion method makes at a time, over all devices together", SIZE),
  "replay_share": Key(
    0.0,
    "methods with fresh samples: share of the student's batch that is drawn from earlier batches,"
    " of which a pool of `size` holds the newest",
    SHARE,
  ),
  "fresh_share": Key(
    0.0,
    "inversion methods: share of the student's batch that the current generator draws; the rest comes from the pool",
    SHARE,
  ),
  "dtype": Key(
    "float32", 'of the images held; "uint8": as pictures of 8 bits, a quarter of the memory', ("float32", "uint8")
  ),
  "logits": Key(
    False,
    "whether the teacher's logits are kept beside each image, for one crop and flip that is drawn"
    " once: the teacher is asked once for an image and not at every student step",
  ),
  "views": Key(1, "crops and flips of each image of the pool in a student's batch", Range(1, 2**10)),
}
SCHEDULE = {
  "epochs": Key(600, "of the distillation, and of a control arm's student", COUNT),
  "horizon": Key(
    0,
    "epochs over which learning rates fall, where that is longer than the run: its start alone; 0: epochs",
    COUNT_OR_NONE,
  ),
  "iterations": Key(50, "per epoch", COUNT),
  "batch_size": Key(512, "of both players, over all devices together", SIZE),
  "lr_batch_size": Key(
    0,
    "the batch size that generator.lr and student.lr were chosen for; at another batch_size they are multiplied by"
    " the square root of the ratio; 0: never",
    Range(0, 2**20),
  ),
}
LOSS = {
  "ikd_form": Key("mse", 'or "log" (the published code\'s CIFAR-10 branch), for generator and student', ("mse", "log")),
  "scl_temperature": Key(0.07, "of the supervised contrast", POSITIVE),
  "scl_form": Key(
    "dense",
    '"dense" holds the similarities of all pairs, memory in the square of the batch; "blockwise"'
    " computes them block by block and again for the gradient: the same to round-off, memory in proportion to the"
    " batch",
    ("dense", "blockwise"),
  ),
  "scl_block": Key(1024, "columns at a time, blockwise", SIZE),
  "confidence": Key(
    1.0,
    "the generator's cross-entropy leaves alone the samples whose class the teacher gives this probability; 1: never",
    PROBABILITY,
  ),
  "double_softmax": Key(False, "both cross-entropies of CPSC-DFKD are given probabilities in place of logits"),
  "kd_temperature": Key(1.0, "of the student's term `kd`, which is multiplied by its square", POSITIVE),
  "kd_standardise": Key(False, "whether `kd` first gives both nets' logits mean 0 and deviation 1, sample by sample"),
  "kl_classes": Key(
    "sum",
    "over which KL sums in `kd` and ZSKT's `adversarial`; \"mean\": is averaged, as in ZSKT's code",
    ("sum", "mean"),
  ),
  "js_form": Key(
    "exact",
    'DeepInversion\'s `adversarial`: "exact", the Jensen-Shannon divergence of its eq. 8, or'
    ' "clamped", as its code has it',
    ("exact", "clamped"),
  ),
  "triplet.margin": Key(0.2, "of RGAL's triplets", NOT_NEGATIVE),
  "triplet.synthesis_of": Key(
    "teacher", 'whose stages synthesis compares; "student" in the published command', ("teacher", "student")
  ),
  "triplet.synthesis_from": Key(0, "the first stage it compares, counted from 0", COUNT_OR_NONE),
  "triplet.student_features": Key(
    "stages", 'what the student\'s triplets compare; "pooled": its last feature alone', ("stages", "pooled")
  ),
  "triplet.focal": Key(True, "whether synthesis draws negatives from 0.5 < D < 1 only (focal weighted sampling)"),
  "triplet.swapped": Key(
    True, "whether synthesis exchanges positives and negatives, as in the paper; its code does not"
  ),
}
# A term of weight 0 is not computed, and a weight other than 0 for a term that the method lacks is refused.
GENERATOR_WEIGHTS = {
  "adversarial": Key(1.0, "-KL(teacher || student), or what else the method calls a difference", NOT_NEGATIVE),
  "ikd": Key(5.0, "alpha: inverse distillation, logits far apart", NOT_NEGATIVE),
  "bn": Key(1.0, "beta: the teacher's batch norm statistics", NOT_NEGATIVE),
  "scl": Key(0.7, "gamma: supervised contrast across teacher and student views", NOT_NEGATIVE),
  "ce": Key(0.7, "eta: the teacher's prediction against the class asked for", NOT_NEGATIVE),
  "triplet": Key(0.0, "RGAL's, for any method: equal classes apart, different ones together", NOT_NEGATIVE),
  "one_hot": Key(0.0, "DAFL: the teacher's prediction against its own most likely class", NOT_NEGATIVE),
  "activation": Key(0.0, "DAFL: strong features of the teacher", NOT_NEGATIVE),
  "balance": Key(0.0, "DAFL: all classes alike over the batch", NOT_NEGATIVE),
  "variation": Key(0.0, "DeepInversion: total variation", NOT_NEGATIVE),
  "norm": Key(0.0, "DeepInversion: L2 norm of the batch", NOT_NEGATIVE),
}
STUDENT_WEIGHTS = {
  "kd": Key(1.0, "KL(teacher || student)", NOT_NEGATIVE),
  "l2": Key(5.0, "alpha: logit regression", NOT_NEGATIVE),
  "ce": Key(0.7, "eta: the student's prediction against the class asked for", NOT_NEGATIVE),
  "head": Key(
    1.0, "trains the feature head alone (contrast on detached features); without a head there is none", NOT_NEGATIVE
  ),
  "triplet": Key(0.0, "RGAL's, for any method: equal classes together, different ones apart", NOT_NEGATIVE),
  "channel": Key(0.0, "RGAL: spatial averages of the stages, projected", NOT_NEGATIVE),
  "l1": Key(0.0, "DFAD: absolute difference of logits", NOT_NEGATIVE),
  "attention": Key(0.0, "ZSKT: attention transfer", NOT_NEGATIVE),
  "features": Key(0.0, "SimKD: squared difference of the last features, for any method", NOT_NEGATIVE),
}
KEYS: dict[str, Key] = {
  "name": Key("default", "the run's name; the working directory is runs/NAME unless --workdir says otherwise"),
  "seed": Key(0, "of initial weights, noise, labels and the teacher's training", Range(0, 2**32 - 1)),
  "task": Key(
    "distil",
    'what becomes of the teacher: "distil", another network learns from it; "quantise", the same network at few bits;'
    ' "incremental", it learns more classes',
    ("distil", "quantise", "incremental"),
  ),
  "method": Key("cpsc", "configs/METHOD_cifar10.py sets what belongs to a method", tuple(methods.METHODS)),
  "arm": Key(
    "distill",
    'what trains the student: "distill"; or a control, "untrained_generator" (the generator keeps'
    ' its initial weights), "gaussian_noise" (images of normal noise, with the classes that the teacher gives them),'
    ' "real_kd" (the student\'s terms on the real training data) or "real_labels" (cross-entropy on the real labels).'
    ' Of class-incremental learning: "no_rehearsal" (the new images alone), "lwf" (with the previous network\'s'
    ' prediction on them), "real_rehearsal" (and some real images of old classes) or "joint" (all images of all'
    " classes seen)",
    (*SYNTHETIC_ARMS, *REAL_ARMS, *INCREMENTAL_ARMS),
  ),
  "reference": Key(
    False,
    "True: CPSC-DFKD as its published code runs it, with its weights and learning rates"
    " (docs/reference.md lists the options that it sets)",
  ),
  "precision": Key(
    "auto",
    'of convolutions and the generator\'s linear layer; "auto": bfloat16 on GPUs and TPUs, float32 on CPUs, and'
    " float16 in reference mode. Parameters, batch statistics, losses and what optimisers keep are float32 in any case,"
    " and so is the student that is reported, saved and exported",
    ("auto", "float32", "bfloat16", "float16"),
  ),
  "loss_scaling": Key(True, "dynamic loss scaling under float16; the other precisions need none"),
  "rematerialise": Key(
    False,
    "True: keep the outputs of convolutions only and compute everything else again in the"
    " backward pass. Saves memory where the compiler does not undo it (docs/scaling.md); none on a CPU",
  ),
  "dataset.name": Key("cifar10", "a row of cpsc_jax.datasets.DATASETS, or what your own images were prepared as"),
  "dataset.data_dir": Key("", "where prepared data live; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets"),
  "dataset.imbalance": Key(
    1.0,
    "the training split is cut to a long tail: the first class keeps all of its images, the last one this many times"
    " fewer, and the others what an exponential has between them; 1: as it is. With a teacher.checkpoint it changes"
    " nothing but the arms on real images",
    Range(1, MANY),
  ),
  **{f"teacher.{key}": value for key, value in TEACHER.items()},
  **{f"student.{key}": value for key, value in STUDENT.items()},
  **{f"generator.{key}": value for key, value in GENERATOR.items()},
  **{f"pool.{key}": value for key, value in POOL.items()},
  **{f"schedule.{key}": value for key, value in SCHEDULE.items()},
  **{f"loss.{key}": value for key, value in LOSS.items()},
  **{f"loss.generator.{key}": value for key, value in GENERATOR_WEIGHTS.items()},
  **{f"loss.student.{key}": value for key, value in STUDENT_WEIGHTS.items()},
  "evaluate.split": Key(
    "test",
    '"validation": a part held out of the training split, on which settings are to be chosen',
    ("test", "validation"),
  ),
  "evaluate.headline": Key(
    "last", 'which epoch the headline figure is of; "best" is selected on the same images', ("last", "best")
  ),
  "evaluate.every": Key(1, "epochs between evaluations; the last epoch is always evaluated", COUNT),
  "evaluate.batch_size": Key(500, "images at a time; any number, every image is counted once", SIZE),
  "evaluate.samples_per_class": Key(100, "fresh samples for label fidelity and diagnostics", SIZE),
  "evaluate.diagnostics_every": Key(
    10, "epochs between diagnoses (docs/report.md); the last epoch is always diagnosed; 0: none is", COUNT_OR_NONE
  ),
  "evaluate.gradients": Key(
    True,
    "whether a diagnosis also looks at the gradients of the generator's terms, and at batch norms: a program of its"
    " own, which takes a CPU some seconds to compile",
  ),
  "checkpoint.every": Key(10, "epochs between checkpoints; the last epoch is always saved", COUNT),
  "checkpoint.minutes": Key(
    10.0, "and at the end of an epoch if so many minutes have passed since the last one", POSITIVE
  ),
}
_EPISODES = {
  "episodes.bn_momentum": Key(0.9, "of the batch norm statistics that `bn` compares, over batches", SHARE),
  "episodes.warmup": Key(20, "batches at the start without a student's update", COUNT_OR_NONE),
}
# Keys that only the configs of one method have; `with_keys_of` adds them.
KEYS_OF: dict[str, dict[str, Key]] = {
  "cmi": {
    "pool.bank": Key(40960, "samples whose features are remembered", COUNT),
    "loss.generator.views": Key(0.0, "CMI: contrast of views", NOT_NEGATIVE),
    "loss.views.temperature": Key(0.1, "of the contrast of views", POSITIVE),
    "loss.views.negatives": Key(4096, "samples of the bank in it", COUNT),
    "loss.views.width": Key(256, "of the critic's output", SIZE),
    "loss.views.lr": Key(1e-3, "of the critic's Adam, whose other settings are Adam's own", POSITIVE),
    "loss.views.flip": Key(True, "whether local views are mirrored at random"),
    "loss.views.features": Key(
      "batch_norm", 'the teacher\'s that are compared; "stages": as published for ResNets', ("batch_norm", "stages")
    ),
  },
  "fast": {
    "episodes.form": Key("maml", '"maml" is first-order', ("maml", "reptile")),
    "episodes.latent_lr": Key(
      0.01, "of the latents' Adam; the generator's own step has generator.steps times generator.lr", POSITIVE
    ),
    "episodes.redraw_at": Key(0, "batch at which the generator's first layer is drawn anew; 0: never", COUNT_OR_NONE),
    **_EPISODES,
  },
  "nayer": {
    "episodes.life": Key(20, "batches that one generator makes", COUNT),
    "episodes.warmup_life": Key(100, "the same in the warm-up", COUNT),
    **_EPISODES,
  },
}
_BITS = Range(2, 32)
# Keys that only the configs of one task have.
KEYS_OF_TASK: dict[str, dict[str, Key]] = {
  "distil": {},
  "quantise": {
    "quantise.weights": Key(8, "bits of weights, 2 to 8; 32: float", _BITS),
    "quantise.activations": Key(8, "bits of what leaves each ReLU, 2 to 8; 32: float", _BITS),
    "quantise.first": Key(0, "bits of the first layer's weights; 0: as the others", Range(0, 32)),
    "quantise.last": Key(0, "bits of the last layer's weights; 0: as the others", Range(0, 32)),
    "quantise.levels": Key(
      "auto",
      'of weights: "asymmetric", from each output channel\'s minimum to its maximum, as published; "symmetric", around'
      ' 0, which int8 kernels need; "auto": symmetric with 8 bits',
      ("auto", "asymmetric", "symmetric"),
    ),
    "quantise.calibration": Key(
      1, "epochs after these in which the ranges of activations follow the samples and nothing else moves", COUNT
    ),
    "quantise.ranges": Key(
      "max",
      'where the ranges of activations end: "max", at the mean of the batches\' maxima, as published; "mse", at that of'
      " the ends with which the batches lose least by squared error, where gradients stop, too",
      ("max", "mse"),
    ),
    "quantise.momentum": Key(0.9, "of the mean over batches; it counts the first batches fully", SHARE),
  },
  "incremental": {
    "incremental.phases": Key(5, "in how many phases the classes come", Range(2, 2**10)),
    "incremental.first": Key(
      0, "classes of the first phase; the others bring equally many each; 0: so does the first", COUNT_OR_NONE
    ),
    "incremental.order": Key(
      "", "in which classes come: empty, as they are numbered; a number, the seed of a shuffle; or all classes, 3,1,0,2"
    ),
    "incremental.known": Key(0, "classes of the previous network; set for each phase, leave it 0", COUNT_OR_NONE),
    "incremental.batch_size": Key(
      64, "real images of new classes beside the schedule.batch_size samples in a student's batch", SIZE
    ),
    "incremental.rests": Key(False, "whether the generator learns nothing more after these"),
    "incremental.refine": Key(0, "epochs at the end of a phase in which the classifier alone learns", COUNT_OR_NONE),
    "incremental.refine_lr": Key(5e-3, "its learning rate then", POSITIVE),
    "incremental.balance": Key(
      "none",
      'how weights depend on the numbers of old and new classes: "rdfcil" multiplies local, old_logits and relation,'
      ' "abd" local, and the two kinds of images in classifier',
      ("none", "rdfcil", "abd"),
    ),
    "incremental.kept": Key(20, 'real images of each old class that the arm "real_rehearsal" keeps', COUNT),
    "loss.generator.confident": Key(
      0.0, "ABD: cross-entropy against the teacher's own most likely class", NOT_NEGATIVE
    ),
    "loss.generator.even": Key(0.0, "ABD: all classes equally common in the batch", NOT_NEGATIVE),
    "loss.generator.moments": Key(0.0, "ABD: `bn` as a divergence of normals, layer by layer", NOT_NEGATIVE),
    "loss.generator.smooth": Key(0.0, "ABD: difference from a blurred image", NOT_NEGATIVE),
    "loss.student.local": Key(1.0, "cross-entropy of real images over the new classes alone", NOT_NEGATIVE),
    "loss.student.balanced": Key(0.0, "cross-entropy over all classes, each of the same weight", NOT_NEGATIVE),
    "loss.student.classifier": Key(0.0, "ABD: cross-entropy over all classes, for the classifier alone", NOT_NEGATIVE),
    "loss.student.lwf": Key(0.0, "LwF: the previous network's prediction on real images, at T 2", NOT_NEGATIVE),
    "loss.student.old_logits": Key(0.0, "R-DFCIL: absolute difference of old logits on samples", NOT_NEGATIVE),
    "loss.student.old_features": Key(
      0.0, "ABD: squared difference of features seen through the old classifier", NOT_NEGATIVE
    ),
    "loss.student.relation": Key(0.0, "R-DFCIL: angles between real images, before and now", NOT_NEGATIVE),
    "loss.student.refine": Key(0.0, "`balanced`, in refinement, where of the others old_logits stays", NOT_NEGATIVE),
  },
}
SECTIONS = {
  "": "the run",
  "dataset": "the data",
  "teacher": "the teacher",
  "student": "the student",
  "generator": "the generator",
  "pool": "images that are kept. An inversion method starts a new generator in each iteration, takes generator.steps"
  " with it and one batch of latents, puts the best images into the pool, and takes student.steps on images of the"
  " pool. The learning rate of the generator then runs over these steps, and its milestones never act",
  "schedule": "how long, and how much at a time",
  "loss": "the forms of the losses",
  "loss.triplet": "RGAL's triplets",
  "loss.generator": "weights of the generator's terms; a term of weight 0 is not computed",
  "loss.student": "weights of the student's terms",
  "loss.views": "CMI's contrast of views",
  "episodes": "FastDFKD and NAYER",
  "quantise": "quantisation. The student is the teacher's own network and starts with its weights, whatever student.net"
  " and student.inherit say",
  "incremental": "class-incremental learning. In every phase after the first, which trains the teacher, the student is"
  " the previous network, whatever student.net says; schedule and student are those of each phase",
  "evaluate": "what is measured",
  "checkpoint": "what is saved",
}

_PLAIN = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a tuple of epochs"}


def defaults() -> ml_collections.ConfigDict:
  """A config, not yet locked, of all keys that every method has."""
  return ml_collections.ConfigDict(_tree(KEYS))


def add_keys_of(config: ml_collections.ConfigDict, method: str) -> None:
  """Adds the keys that only the configs of `method` have."""
  with config.unlocked():
    config.update(_tree(KEYS_OF[method]))


def add_keys_of_task(config: ml_collections.ConfigDict, task: str) -> None:
  """Makes `task` the config's, and adds the keys that only its configs have."""
  with config.unlocked():
    config.task = task
    config.update(_tree(KEYS_OF_TASK[task]))


def _tree(keys: Mapping[str, Key]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for name, key in keys.items():
    *sections, last = name.split(".")
    place = tree
    for section in sections:
      place = place.setdefault(section, {})
    place[last] = key.default
  return tree


def keys_of(method: str, task: str = "distil") -> dict[str, Key]:
  """{dotted key: what it is} of the configs of a method and a task."""
  return KEYS | KEYS_OF.get(method, {}) | KEYS_OF_TASK.get(task, {})


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """(dotted key, value) pairs of a config or of nested dictionaries."""
  for key, value in tree.items():
    if isinstance(value, dict | ml_collections.ConfigDict | ml_collections.FrozenConfigDict):
      yield from flatten(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def check(flat: Mapping[str, Any]) -> None:
  """Refuses what no config may hold, in {dotted key: value}: keys that are missing, of another type or out of range.

  Keys that are not of this package may be added by a user's own code; their numbers must be finite.

  Raises:
    Refusal: names the key, the value and what it must be.
  """
  method, task = (value if isinstance(value, str) else "" for value in (flat.get("method"), flat.get("task")))
  for name, key in (known := keys_of(method, task)).items():
    if name not in flat:
      owner = task if name in KEYS_OF_TASK.get(task, {}) else method
      start = "default.get_config() of cpsc_jax.configs" if name in KEYS else f"configs/{owner}_cifar10.py"
      raise Refusal(f"the config has no key '{name}'; start from {start} and change what differs.")
    if wrong := why_not(key, flat[name]):
      raise Refusal(f"config.{name} is {shown(flat[name])}; it must be {wrong}.")
  for name, value in flat.items():
    if name not in known and isinstance(value, float) and not math.isfinite(value):
      raise Refusal(f"config.{name} is {value}; it must be {ANY}.")


def why_not(key: Key, value: Any) -> str:
  """What a value of a key must be, if this one is not that; else an empty text."""
  kind = type(key.default)
  types = {float: (int, float), tuple: (tuple, list)}.get(kind, (kind,))
  if not isinstance(value, types) or (isinstance(value, bool) and kind is not bool):
    return f"one of {', '.join(key.allowed)}" if isinstance(key.allowed, tuple) else _PLAIN[kind]
  if isinstance(key.allowed, Range) and not key.allowed.has(value):
    return str(key.allowed)
  if isinstance(key.allowed, tuple) and value not in key.allowed:
    return f"one of {', '.join(key.allowed)}"
  if kind is str and not value.isprintable():
    return "a text without line breaks and control characters"
  if kind is tuple:
    numbers = all(isinstance(epoch, int) and not isinstance(epoch, bool) and 0 < epoch <= MANY for epoch in value)
    if not numbers or any(a >= b for a, b in zip(value, value[1:], strict=False)):
      return "epochs, whole numbers from 1 on, in increasing order"
  return ""


def shown(value: Any) -> str:
  """A value as a refusal quotes it: on one line and not too long."""
  text = f"'{value}'" if isinstance(value, str) else str(value)
  text = "".join(c if c.isprintable() else "?" for c in text)
  return text if len(text) < 80 else f"{text[:76]}..."


def section_of(name: str) -> str:
  return name.rpartition(".")[0]


def kind_of(key: Key) -> str:
  """What a key may be, in a few words; the ends that only keep absurd numbers out are not told."""
  if isinstance(key.allowed, tuple):
    return ", ".join(key.allowed)
  if key.allowed is None:
    return _PLAIN[type(key.default)]
  allowed = key.allowed.beginning if key.allowed.high in (MANY, HUGE) else str(key.allowed)
  return f"{'whole number, ' if isinstance(key.default, int) else ''}{allowed}"
