"""Every key of a run, with its meaning. The other configs override about ten of them.

Keys are locked: an unknown one on the command line is refused. `--config configs/NAME.py:smoke` is the same run cut
down to seconds. Accuracies quoted in configs are fractions of the whole test split at the last epoch unless they say
"best".
"""

import ml_collections


def get_config(variant=""):
  c = ml_collections.ConfigDict()
  c.name = "default"  # the run's name; the working directory is runs/NAME unless --workdir says otherwise
  c.seed = 0  # of initial weights, noise, labels and the teacher's training
  c.method = "cpsc"  # a row of cpsc_jax.methods.METHODS; configs/METHOD_cifar10.py sets what belongs to the others
  # What trains the student: "distill"; or a control, "untrained_generator" (the generator keeps its initial weights),
  # "real_kd" (the student's terms on the real training data) or "real_labels" (cross-entropy on the real labels).
  c.arm = "distill"
  # True: every quirk on, published weights and learning rates of CPSC-DFKD (cpsc_jax.settings.as_published)
  c.reference = False
  c.precision = "float32"  # of convolutions and the generator's linear layer: float32, bfloat16 or float16

  c.dataset = d = ml_collections.ConfigDict()
  d.name = "cifar10"  # a row of cpsc_jax.datasets.DATASETS, or what your own images were prepared as
  d.data_dir = ""  # where prepared data live; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets

  c.teacher = t = ml_collections.ConfigDict()
  # folder of a saved teacher (WORKDIR/teacher of another run); empty: train one on the training split
  t.checkpoint = ""
  t.net = "resnet34"  # a row of cpsc_jax.nets.NETS, or wrn_D_K; the rest of this section is for training one
  t.epochs = 100  # passes over the training split
  t.batch_size = 32  # over all devices together; what is left of an epoch is dropped
  t.lr = 0.1  # of SGD, at its highest; cosine to 0
  t.momentum = 0.9  # of SGD
  t.weight_decay = 5e-4  # on every parameter
  t.warmup_epochs = 0  # of linear warm-up
  t.label_smoothing = 0.0  # share of the uniform distribution in the targets
  t.crop_pad = 4  # random crops after padding by so many black pixels; 0: none
  t.flip = True  # random horizontal flips; refused for data sets whose classes do not survive them

  c.student = s = ml_collections.ConfigDict()
  s.net = "resnet18"  # as teacher.net; where feature widths differ it is given a feature head
  s.steps = 5  # student updates per iteration
  s.crop_pad = 0  # random crops of the synthetic images after padding by so many black pixels; 0: none, as published
  s.flip = False  # random horizontal flips of the synthetic images
  s.lr = 0.1  # of SGD, at its highest
  s.momentum = 0.9  # of SGD
  s.weight_decay = 5e-4  # on every parameter
  s.warmup_epochs = 10  # of linear warm-up, then cosine to 0 at the last step

  c.generator = g = ml_collections.ConfigDict()
  # "cifar" (image size divisible by 4) or "dcgan" (by 16); "pixels" has no parameters: its latent is the image itself
  g.net = "cifar"
  g.conditional = True  # whether the label enters its batch norms (CFE); False for methods whose generator has none
  g.latent_dim = 256  # nz, the width of the noise
  g.width = 64  # channels of the narrowest layer
  g.steps = 6  # generator updates per iteration
  g.lr = 1e-3  # of Adam
  g.b1 = 0.5  # decay of Adam's first moment
  g.b2 = 0.999  # decay of its second
  g.schedule = "steps"  # "steps": lr * decay at each milestone; "cosine": to 0 at the end
  g.milestones = (50, 150)  # epochs at which the learning rate falls
  g.decay = 0.1  # what it is multiplied by
  g.crop_pad = 0  # random crops of what both nets see in generator steps, after padding by so many black pixels
  g.flip = False  # random horizontal flips of the same

  # For methods that invert: an iteration starts a generator afresh, takes `generator.steps` with it and one batch of
  # latents, puts the best images into the pool, and takes `student.steps` on images of the pool. The learning rate
  # schedule of the generator then runs over these steps, its milestones never act.
  c.pool = o = ml_collections.ConfigDict()
  o.size = 51200  # images held; the newest replace the oldest
  o.batch_size = 256  # images made at a time, over all devices together
  o.bank = 40960  # samples whose features are remembered, for methods that have a bank

  c.schedule = e = ml_collections.ConfigDict()
  e.epochs = 600  # of the distillation, and of a control arm's student
  e.horizon = 0  # epochs over which learning rates fall, where that is longer than the run: its start alone; 0: epochs
  e.iterations = 50  # per epoch
  e.batch_size = 512  # of both players, over all devices together

  c.loss = w = ml_collections.ConfigDict()
  w.ikd_form = "mse"  # "mse" or "log" (the published code's CIFAR-10 branch), for generator and student
  w.temperature = 0.07  # of the supervised contrast
  # "dense" holds the similarities of all pairs, memory in the square of the batch; "blockwise" works them out block by
  # block and again for the gradient: the same to round-off, memory in proportion to the batch
  w.contrast = "dense"
  w.contrast_block = 1024  # columns at a time, blockwise
  # the generator's cross-entropy leaves alone the samples whose class the teacher gives this probability; 1: never
  w.confidence = 1.0
  w.kd_temperature = 1.0  # of the student's term `kd`, which is multiplied by its square
  w.triplet = ml_collections.ConfigDict()
  w.triplet.margin = 0.2  # of RGAL's triplets
  w.triplet.focal = True  # whether synthesis draws negatives from 0.5 < D < 1 only (focal weighted sampling)
  w.views = ml_collections.ConfigDict()
  w.views.temperature = 0.2  # of CMI's contrast of views
  w.views.negatives = 4096  # samples of the bank in it
  w.views.width = 256  # of the critic's output
  # Weights; a term of weight 0 is not computed, and a weight other than 0 for a term that the method lacks is refused.
  w.generator = ml_collections.ConfigDict()
  w.generator.adversarial = 1.0  # -KL(teacher || student), or what else the method calls a difference
  w.generator.ikd = 5.0  # alpha: inverse distillation, logits far apart
  w.generator.bn = 1.0  # beta: the teacher's batch norm statistics
  w.generator.scl = 0.7  # gamma: supervised contrast across teacher and student views
  w.generator.ce = 0.7  # eta: the teacher's prediction against the class asked for
  w.generator.triplet = 0.0  # RGAL's, for any method: equal classes apart, different ones together
  w.generator.one_hot = 0.0  # DAFL: the teacher's prediction against its own most likely class
  w.generator.activation = 0.0  # DAFL: strong features of the teacher
  w.generator.balance = 0.0  # DAFL: all classes alike over the batch
  w.generator.variation = 0.0  # DeepInversion: total variation
  w.generator.norm = 0.0  # DeepInversion: L2 norm of the batch
  w.generator.views = 0.0  # CMI: local against global views
  w.student = ml_collections.ConfigDict()
  w.student.kd = 1.0  # KL(teacher || student)
  w.student.l2 = 5.0  # alpha: logit regression
  w.student.ce = 0.7  # eta: the student's prediction against the class asked for
  w.student.head = 1.0  # trains the feature head alone (contrast on detached features); without a head there is none
  w.student.triplet = 0.0  # RGAL's, for any method: equal classes together, different ones apart
  w.student.channel = 0.0  # RGAL: spatial averages of the stages, projected
  w.student.l1 = 0.0  # DFAD: absolute difference of logits
  w.student.attention = 0.0  # ZSKT: attention transfer

  # The published code's behaviours that a reader of the paper would not expect; README.md has the table.
  c.quirks = q = ml_collections.ConfigDict()
  q.fresh_adam = False  # Adam is rebuilt at every generator step: no moments, and its schedule never acts
  q.latent_step = False  # the latent is moved once by that Adam and thrown away (changes no result)
  q.double_softmax = False  # both cross-entropies are given probabilities in place of logits
  q.student_trains_in_generator_step = False  # student in training mode there, its running statistics move
  q.generator_stats_in_student_step = False  # the generator's running statistics move in student steps
  q.untrained_head = False  # the feature head is never trained, its output not normalised again
  q.half_precision = False  # float16 without loss scaling
  q.hundred_labels = False  # labels are drawn from min(100, number of classes) whatever the data set
  q.stepped_schedule = False  # learning rates step per epoch; the student's warm-up is 10 epochs and its end not 0
  q.unswapped_triplets = False  # RGAL: synthesis does not exchange positives and negatives, as in its published code
  q.report_best = False  # the headline figure is the best epoch, selected on the test set

  c.evaluate = v = ml_collections.ConfigDict()
  v.every = 1  # epochs between evaluations; the last epoch is always evaluated
  v.batch_size = 500  # images at a time; any number, every image is counted once
  v.samples_per_class = 100  # fresh samples for label fidelity

  c.checkpoint = k = ml_collections.ConfigDict()
  k.every = 10  # epochs between checkpoints; the last epoch is always saved
  k.minutes = 10.0  # and at the end of an epoch if so many minutes have passed since the last one

  apply_variant(c, variant)
  return c.lock()


def apply_variant(c, variant):
  """Carries out the word behind the colon of --config FILE:VARIANT."""
  if variant == "smoke":
    smoke(c)
  elif variant:
    raise ValueError(f"no variant '{variant}' of a config; there is 'smoke'.")


def weigh(c, generator, student):
  """Sets the weights of the terms named, and all others to 0."""
  for section, weights in ((c.loss.generator, generator), (c.loss.student, student)):
    section.update({**dict.fromkeys(section, 0.0), **weights})


def smoke(c):
  """Cuts a config down to a run of seconds through the whole path, on the same data set."""
  c.name += "_smoke"
  c.teacher.net = "wrn_10_1"
  c.teacher.epochs = 1
  c.teacher.batch_size = 128
  c.student.net = "wrn_10_1"
  c.student.warmup_epochs = 1
  c.student.steps = 1
  c.generator.width = 8
  c.generator.latent_dim = 16
  c.generator.steps = 1
  c.schedule.epochs = 2
  c.schedule.iterations = 2
  c.schedule.batch_size = 32
  c.pool.size, c.pool.batch_size, c.pool.bank, c.loss.views.negatives = 64, 32, 64, 32
  c.evaluate.samples_per_class = 10
  c.checkpoint.every = 1
