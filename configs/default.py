"""Every key of a run, with its meaning. The other configs override about ten of them.

Keys are locked: an unknown one is refused. `--config NAME:smoke` is the same run cut down to seconds. What was measured
with these configs is in docs/results.md; at their heads stands what others have published.
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
  # True: CPSC-DFKD as its published code runs it, with its weights and learning rates (cpsc_jax.config.as_published;
  # docs/reference.md lists the options that it sets)
  c.reference = False
  # Of convolutions and the generator's linear layer: float32, bfloat16 or float16. Parameters, batch statistics and
  # losses are float32 in any case, and so is the student that is reported, saved and exported.
  c.precision = "float32"
  c.loss_scaling = True  # dynamic loss scaling under float16; the other precisions need none
  # True: keep the outputs of convolutions only and compute everything else again in the backward pass. Saves memory
  # where the compiler does not undo it (docs/scaling.md); none on a CPU.
  c.rematerialise = False

  c.dataset = d = ml_collections.ConfigDict()
  d.name = "cifar10"  # a row of cpsc_jax.datasets.DATASETS, or what your own images were prepared as
  d.data_dir = ""  # where prepared data live; empty: $TFDS_DATA_DIR, else ~/tensorflow_datasets

  c.teacher = t = ml_collections.ConfigDict()
  # folder of a saved teacher (WORKDIR/teacher of another run); empty: train one on the training split
  t.checkpoint = ""
  t.net = "resnet34"  # a row of cpsc_jax.nets.NETS, or wrn_D_K; the rest of this section is for training one
  t.epochs = 100  # passes over the training split
  t.batch_size = 32  # over all devices together; what is left of an epoch is dropped
  t.micro_batches = 1  # parts into which a batch is divided, to save memory; batch norm sees one part at a time
  t.optimiser = "sgd"  # or "adam" or "adamw"
  t.lr = 0.1  # at its highest
  t.momentum = 0.9  # of SGD; decay of Adam's and AdamW's first moment
  t.weight_decay = 5e-4  # of SGD and Adam added to the gradient, of AdamW apart from it
  t.decay_norms = True  # weight decay on biases and on the scales of norms too
  # "cosine": per step to 0; "cosine_per_epoch": the same in steps, as in the published code; "steps": lr * decay at
  # each milestone
  t.schedule = "cosine"
  t.lr_end = 0.0  # where "cosine" ends
  t.milestones = ()  # epochs at which the learning rate falls
  t.decay = 0.1  # what it is multiplied by
  t.clip = 0.0  # largest norm of all gradients together; 0: any
  t.warmup_epochs = 0  # of linear warm-up
  t.label_smoothing = 0.0  # share of the uniform distribution in the targets
  t.crop_pad = 4  # random crops after padding by so many black pixels; 0: none
  t.flip = True  # random horizontal flips; refused for data sets whose classes do not survive them

  c.student = s = ml_collections.ConfigDict()
  s.net = "resnet18"  # as teacher.net; where feature widths differ it is given a feature head
  s.steps = 5  # student updates per iteration
  # Random crops of what the student learns from, after padding by so many black pixels; 0: none, as published.
  s.crop_pad = 0
  s.flip = False  # random horizontal flips of the same
  s.head = "trained"  # by a contrast on detached features; "frozen": never, as in the published code
  s.micro_batches = 1  # as teacher.micro_batches
  s.init = "kaiming"  # of convolutions (He et al., fan out); "torch": PyTorch's default, uniform
  s.inherit = False  # whether layers start as the teacher's of the same name and shape, if there are any
  # "own"; or "teacher": the teacher's last linear layer, which is not trained (SimKD, CVPR 2022; loss.student.features)
  s.classifier = "own"
  s.optimiser = "sgd"  # or "adam" or "adamw"
  s.lr = 0.1  # at its highest
  s.momentum = 0.9  # of SGD; decay of Adam's and AdamW's first moment
  s.weight_decay = 5e-4  # of SGD and Adam added to the gradient, of AdamW apart from it
  s.decay_norms = True  # weight decay on biases and on the scales of norms too
  # "cosine": per step to 0 at the last; "published_steps": per epoch, with 10 epochs of warm-up and an end above 0;
  # "steps": lr * decay at each milestone
  s.schedule = "cosine"
  s.lr_end = 0.0  # where "cosine" ends
  s.milestones = ()  # epochs at which the learning rate falls
  s.decay = 0.1  # what it is multiplied by
  s.clip = 0.0  # largest norm of all gradients together; 0: any
  s.warmup_epochs = 10  # of linear warm-up

  c.generator = g = ml_collections.ConfigDict()
  # "cifar" (image size divisible by 4) or "dcgan" (by 16); "pixels" has no parameters: its latent is the image itself
  g.net = "cifar"
  g.conditional = True  # whether the label enters its batch norms (CFE); False for methods whose generator has none
  g.latent_dim = 256  # nz, the width of the noise
  # NAYER: an embedding of the classes and layers drawn at random take the place of noise. "classifier": the rows of the
  # teacher's classifier, standardised; "one_hot"; "learned"; or a .npy file with a row for each class; empty: noise
  g.embedding = ""
  g.width = 64  # channels of the narrowest layer
  g.output = "tanh"  # as in the published code of CPSC-DFKD; "sigmoid": pixels in [0, 1], normalised afterwards
  g.init = "torch"  # PyTorch's defaults; "normal": kernels from N(0, 0.02), scales of norms from N(1, 0.02)
  g.epsilon = 0.0  # of its batch norms; 0: the net's own, 1e-3 (of dcgan 0.8)
  g.steps = 6  # generator updates per iteration
  g.ema = 0.0  # of an average of its parameters, which forgets 1 - ema in each iteration (MAD, NeurIPS 2022); 0: none
  g.ema_share = 0.5  # share of the student's fresh samples that this average draws
  g.label_limit = 0  # labels are drawn from the first so many classes; 0: all. The published code draws from 100
  g.labels = "uniform"  # drawn one by one; "balanced": every batch has all classes equally often
  g.between_share = 0.0  # share of the student's fresh samples that lie between classes (Qimera, NeurIPS 2021)
  g.between = 2  # so many classes each
  g.student_mode = "eval"  # of the student in generator steps; "train": its running statistics move there
  g.stats_in_student_steps = False  # whether the generator's running statistics move in student steps
  g.micro_batches = 1  # as teacher.micro_batches
  g.optimiser = "adam"  # "restarted_adam": rebuilt at every step, without moments; its schedule never acts
  g.lr = 1e-3  # of Adam
  g.b1 = 0.5  # decay of Adam's first moment
  g.b2 = 0.999  # decay of its second
  g.schedule = "steps"  # "steps": lr * decay at each milestone; "cosine": to 0 at the end
  g.milestones = (50, 150)  # epochs at which the learning rate falls
  g.decay = 0.1  # what it is multiplied by
  g.clip = 0.0  # largest norm of all gradients together; 0: any
  g.crop_pad = 0  # random crops of what both nets see in generator steps, after padding by so many black pixels
  g.flip = False  # random horizontal flips of the same
  # of each image by itself; "rolls": the batch moves as one, by up to crop_pad pixels that enter on the other side
  g.jitter = "crops"
  g.clip_pixels = False  # whether `pixels` stay within black and white

  # For methods that invert: an iteration starts a new generator, takes `generator.steps` with it and one batch of
  # latents, puts the best images into the pool, and takes `student.steps` on images of the pool. The learning rate
  # schedule of the generator then runs over these steps, and its milestones never act.
  c.pool = o = ml_collections.ConfigDict()
  o.size = 51200  # images held; the newest replace the oldest
  o.batch_size = 256  # images made at a time, over all devices together
  # Methods with fresh samples: share of the student's batch that is drawn from earlier batches, of which a pool of
  # `size` holds the newest.
  o.replay_share = 0.0
  o.fresh_share = 0.0  # share of the student's batch that the current generator draws; the rest comes from the pool
  o.dtype = "float32"  # of the images held; "uint8": as pictures of 8 bits, a quarter of the memory
  # Whether the teacher's logits are kept beside each image, for one crop and flip that is drawn once: the teacher is
  # asked once for an image and not at every student step.
  o.logits = False
  o.views = 1  # crops and flips of each image of the pool in a student's batch

  c.schedule = e = ml_collections.ConfigDict()
  e.epochs = 600  # of the distillation, and of a control arm's student
  e.horizon = 0  # epochs over which learning rates fall, where that is longer than the run: its start alone; 0: epochs
  e.iterations = 50  # per epoch
  e.batch_size = 512  # of both players, over all devices together

  c.loss = w = ml_collections.ConfigDict()
  w.ikd_form = "mse"  # "mse" or "log" (the published code's CIFAR-10 branch), for generator and student
  w.scl_temperature = 0.07  # of the supervised contrast
  # "dense" holds the similarities of all pairs, memory in the square of the batch; "blockwise" computes them block by
  # block and again for the gradient: the same to round-off, memory in proportion to the batch
  w.scl_form = "dense"
  w.scl_block = 1024  # columns at a time, blockwise
  # the generator's cross-entropy leaves alone the samples whose class the teacher gives this probability; 1: never
  w.confidence = 1.0
  w.double_softmax = False  # both cross-entropies of CPSC-DFKD are given probabilities in place of logits
  w.kd_temperature = 1.0  # of the student's term `kd`, which is multiplied by its square
  w.kd_standardise = False  # whether `kd` first gives both nets' logits mean 0 and deviation 1, sample by sample
  w.kl_classes = "sum"  # over which KL sums in `kd` and ZSKT's `adversarial`; "mean": is averaged, as in ZSKT's code
  # DeepInversion's `adversarial`: "exact", the Jensen-Shannon divergence of its eq. 8, or "clamped", as its code has it
  w.js_form = "exact"
  w.triplet = ml_collections.ConfigDict()
  w.triplet.margin = 0.2  # of RGAL's triplets
  w.triplet.synthesis_of = "teacher"  # whose stages synthesis compares, or "student", as in the published command
  w.triplet.synthesis_from = 0  # the first stage it compares, counted from 0
  w.triplet.student_features = "stages"  # what the student's triplets compare, or "pooled", its last feature alone
  w.triplet.focal = True  # whether synthesis draws negatives from 0.5 < D < 1 only (focal weighted sampling)
  w.triplet.swapped = True  # whether synthesis exchanges positives and negatives, as in the paper; its code does not
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
  w.student = ml_collections.ConfigDict()
  w.student.kd = 1.0  # KL(teacher || student)
  w.student.l2 = 5.0  # alpha: logit regression
  w.student.ce = 0.7  # eta: the student's prediction against the class asked for
  w.student.head = 1.0  # trains the feature head alone (contrast on detached features); without a head there is none
  w.student.triplet = 0.0  # RGAL's, for any method: equal classes together, different ones apart
  w.student.channel = 0.0  # RGAL: spatial averages of the stages, projected
  w.student.l1 = 0.0  # DFAD: absolute difference of logits
  w.student.attention = 0.0  # ZSKT: attention transfer
  w.student.features = 0.0  # SimKD: squared difference of the last features, for any method

  c.evaluate = v = ml_collections.ConfigDict()
  # "test", or "validation": a part held out of the training split, on which settings are to be chosen
  v.split = "test"
  v.headline = "last"  # which epoch the headline figure is of; "best" is selected on the same images
  v.every = 1  # epochs between evaluations; the last epoch is always evaluated
  v.batch_size = 500  # images at a time; any number, every image is counted once
  v.samples_per_class = 100  # fresh samples for label fidelity

  c.checkpoint = k = ml_collections.ConfigDict()
  k.every = 10  # epochs between checkpoints; the last epoch is always saved
  k.minutes = 10.0  # and at the end of an epoch if so many minutes have passed since the last one

  apply_variant(c, variant)
  return c.lock()


def apply_variant(c, variant, on_cpu=None):
  """Carries out the word behind the colon of --config FILE:VARIANT; `on_cpu` sets a method's own part of "cpu"."""
  if variant == "smoke":
    smoke(c)
  elif variant == "cpu" and on_cpu:
    cpu(c)
    on_cpu(c)
  elif variant:
    raise ValueError(f"no variant '{variant}' of a config; there is 'smoke'.")


def cpu(c):
  """What methods have in common on two CPU cores: WRN-16-1 -> WRN-10-1, which starts with layers of its teacher.

  The teacher is one of others, converted (docs/teachers.md): name its folder in teacher.checkpoint. How long the run
  is, which is meant to be about 20 minutes, belongs to the method.
  """
  c.name += "_cpu"
  c.teacher.net, c.student.net = "wrn_16_1", "wrn_10_1"
  c.student.update({"inherit": True, "crop_pad": 4, "flip": True, "init": "kaiming"})
  c.student.update({"optimiser": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "clip": 0.0})
  c.student.update({"schedule": "cosine", "lr_end": 2e-4, "milestones": (), "warmup_epochs": 0})
  c.schedule.batch_size = c.pool.batch_size = 128
  c.generator.width = 32
  c.evaluate.every = 5


def set_weights(c, generator, student):
  """Sets the weights of the named terms, and all others to 0."""
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
  c.pool.size, c.pool.batch_size = 64, 32
  c.evaluate.every = 1
  c.evaluate.samples_per_class = 10
  c.checkpoint.every = 1
