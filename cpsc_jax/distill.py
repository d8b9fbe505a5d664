"""A whole run, top to bottom: teacher, game, loop, figures."""

import functools
import json
import os
import pathlib
import platform
import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np

from cpsc_jax import algorithm, checkpoint, datasets, evaluate, methods, nets, optim, report, settings, teach
from cpsc_jax.errors import Refusal
from cpsc_jax.loop import Plan, train
from cpsc_jax.mesh import batch_sharding, is_primary, make_mesh, place, primary_first, replicate, replicated
from cpsc_jax.progress import say

PACKAGES = ("cpsc_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "numpy")


def run(config, workdir, started=None):
  """Carries out `config` in `workdir` and returns its results, also written there as results.json and pictures.

  `started` is the time.monotonic() at which the whole run began. A finished workdir is left alone; an interrupted one
  is resumed.

  Raises:
    Refusal: bad config, missing data, a teacher that does not fit, or a workdir that belongs to another config.
  """
  started = time.monotonic() if started is None else started
  mesh = make_mesh()
  config = settings.resolve(config, mesh)
  given = teach.check_teacher(config)["net"] if config.teacher.checkpoint else config.teacher.net
  settings.check_stages(config, given)
  workdir = pathlib.Path(workdir)
  results = earlier_results(workdir, config)
  if results:
    say(f"{workdir} is finished already; delete it or choose another --workdir to run again.")
    return results
  primary_first(lambda: datasets.require(config.dataset.name, config.dataset.data_dir))
  primary_first(lambda: claim(workdir, config))

  test = datasets.load_test(config.dataset.name, config.dataset.data_dir).put(replicated(mesh))
  teacher_net, teacher, card = teach.obtain_teacher(config, test, workdir, mesh)
  game = build_game(config, mesh, teacher_net, card)
  classify = functools.partial(
    evaluate.compile_classifier, mean=card["mean"], std=card["std"], batch_size=config.evaluate.batch_size, mesh=mesh
  )
  teacher_says = classify(teacher_net)(teacher, test.images)
  teacher_accuracy = float(evaluate.share_equal(teacher_says, test.labels))
  student_net = nets.without_head(game.student, {})[0]
  student_says = classify(student_net)
  sampler = evaluate.compile_sampler(game, config.evaluate.samples_per_class)
  sample_key = replicate(jax.random.fold_in(jax.random.key(config.seed), 2), mesh)
  data_free = config.arm not in settings.REAL_ARMS
  if data_free:
    epoch, state = data_free_arm(config, game, teacher)
    trained = lambda state: state.student
  else:
    epoch, state = teach.real_arm(config, game, teacher, card)
    trained = lambda state: state.net
  student_of = lambda state: nets.without_head(game.student, trained(state).variables)[1]
  say(
    f"{config.arm}: {card['net']} ({nets.count_parameters(teacher['params']):,} parameters,"
    f" accuracy {teacher_accuracy:.4f}) -> {config.student.net}"
    f" ({nets.count_parameters(student_of(state)['params']):,} parameters)"
  )

  def measure(state):
    predictions = student_says(student_of(state), test.images)
    scores = {
      "accuracy": evaluate.share_equal(predictions, test.labels),
      "agreement": evaluate.share_equal(predictions, teacher_says),
    }
    if data_free and game.labelled:
      _, fidelity = sampler(state, teacher, sample_key)
      scores["label_fidelity"] = jnp.mean(fidelity)
    return scores

  outcome = train(
    Plan(
      title=config.arm,
      epoch=epoch,
      measure=measure,
      variables=student_of,
      epochs=config.schedule.epochs,
      measure_every=config.evaluate.every,
      save_every=config.checkpoint.every,
      save_minutes=config.checkpoint.minutes,
      workdir=workdir,
    ),
    state,
  )

  shape = {k: card[k] for k in ("num_classes", "image_size", "channels", "mean", "std")}
  shape["class_names"] = datasets.class_names(config.dataset.name, config.dataset.data_dir)
  student_card = {**shape, "net": config.student.net, "dataset": config.dataset.name, "teacher_digest": card["digest"]}
  checkpoint.save_net(workdir / "student", student_of(outcome.state), student_card)
  checkpoint.save_net(workdir / "student_best", outcome.best_variables, student_card)
  generator = None
  if data_free:
    images, fidelity = jax.device_get(sampler(outcome.state, teacher, sample_key))
    images = datasets.denormalise(images[:, : report.COLUMNS], card["mean"], card["std"])
    variables = outcome.state.generator.variables
    generator = {
      "net": config.generator.net,
      "parameters": nets.count_parameters(variables["params"]),
      "label_fidelity": float(np.mean(fidelity)) if game.labelled else None,
      "label_fidelity_per_class": [float(f) for f in fidelity] if game.labelled else None,
    }
    if game.method.inverts:
      held = held_images(outcome.state.memory["pool"], card, mesh)
      generator["pool"] = len(held["labels"])
    else:
      generator_card = {
        **shape,
        **{key: config.generator[key] for key in ("net", "latent_dim", "width", "conditional")},
      }
      checkpoint.save_net(workdir / "generator", variables, generator_card)
  scored = {entry["epoch"]: entry for entry in outcome.history if "accuracy" in entry}
  figures = lambda e: {k: scored[e][k] for k in ("epoch", "accuracy", "agreement")}
  last, best = figures(config.schedule.epochs), figures(outcome.best_epoch)
  headline = "best" if config.quirks.report_best else "last"
  iterations = config.schedule.epochs * config.schedule.iterations
  generator_batch = game.pool_batch if game.method.inverts else config.schedule.batch_size
  results = {
    "name": config.name,
    "arm": config.arm,
    "method": config.method,
    "reference": config.reference,
    "seed": config.seed,
    "headline": headline,
    "teacher": {
      "net": card["net"],
      "parameters": nets.count_parameters(teacher["params"]),
      "accuracy": teacher_accuracy,
      "digest": card["digest"],
      "checkpoint": config.teacher.checkpoint or "trained in this run",
    },
    "student": {
      "net": config.student.net,
      "parameters": nets.count_parameters(student_of(outcome.state)["params"]),
      "last": last,
      "best": best,
    },
    "generator": generator,
    "agreement": {"last": last, "best": best}[headline]["agreement"],
    "test_images": len(test),
    "samples": {
      "generator": iterations * generator_batch * game.generator_steps * data_free,
      "student": iterations * config.schedule.batch_size * game.student_steps,
    },
    "seconds": time.monotonic() - started,
    "seconds_by_part": {"teacher": card.get("seconds", 0.0), "student": outcome.seconds},
    "versions": {**{name: metadata.version(name) for name in PACKAGES}, "python": platform.python_version()},
    "hardware": hardware(),
    "config": json.loads(settings.dump(config)),
  }
  if is_primary():
    if data_free:
      np.savez(workdir / "samples.npz", images=images)
      if game.method.inverts:
        np.savez(workdir / "pool.npz", **held)
    history = {"teacher": card.get("history", []), "student": outcome.history}
    (workdir / "history.json").write_text(json.dumps(history) + "\n")
    report.draw(workdir, results)
    results["seconds"] = time.monotonic() - started
    write_whole(workdir / "results.json", json.dumps(results, indent=2) + "\n")
  return results


def build_game(config, mesh, teacher_net, card):
  """The `Game` of a config for one teacher: nets, terms and optimisers."""
  spec = datasets.describe(config.dataset.name, config.dataset.data_dir)
  dtype = None if config.precision == "float32" else jnp.dtype(config.precision)
  student = nets.classifier(config.student.net, spec.num_classes, dtype)
  width = lambda net: nets.feature_width(net, spec.image_shape)
  has_head = width(student) != width(teacher_net)
  if has_head:
    student = nets.FeatureHead(student, width(teacher_net), normalise=not config.quirks.untrained_head)
  if config.loss.student.channel:
    stages = nets.output_shapes(teacher_net, spec.image_shape).stages
    student = nets.StageProjections(student, tuple(stage.shape[-1] for stage in stages))
  generator = nets.generator(
    config.generator.net,
    spec.num_classes if config.generator.conditional else 1,
    spec.image_size,
    spec.channels,
    config.generator.width,
    dtype,
  )
  if config.loss.generator.bn and not nets.has_batch_norm(teacher_net, spec.image_shape):
    say("the teacher has no batch norm: config.loss.generator.bn has nothing to act on and is off")
    config = settings.override(config, "loss.generator.bn", 0.0)
  generator_steps = 0 if config.arm == "untrained_generator" else config.generator.steps
  steps = config.schedule.iterations
  method = methods.method(
    config, has_head and not config.quirks.untrained_head, split=batch_sharding(mesh), whole=replicated(mesh)
  )
  every = (config.generator.steps, 1) if method.inverts else (steps * config.generator.steps, None)
  return algorithm.Game(
    generator=generator,
    teacher=nets.classifier(card["net"], card["num_classes"], dtype),
    student=student,
    method=method,
    generator_tx=optim.generator_optimiser(config, *every),
    student_tx=optim.student_optimiser(config, steps * config.student.steps),
    latent_dim=getattr(generator, "latent_dim", config.generator.latent_dim),
    num_labels=min(100, spec.num_classes) if config.quirks.hundred_labels else spec.num_classes,
    batch_size=config.schedule.batch_size,
    generator_steps=generator_steps,
    student_steps=config.student.steps,
    augment=augmentation(config.student, card),
    vary=augmentation(config.generator, card),
    labelled=method.inverts or config.generator.conditional,
    pool_slots=config.pool.size // config.pool.batch_size,
    pool_batch=config.pool.batch_size,
    bank_slots=config.pool.bank // config.pool.batch_size,
    quirks=config.quirks,
    mesh=mesh,
  )


def augmentation(c, card):
  """(key, normalised images) -> images by the config's section `c`, or None where it asks for none."""
  if not (c.crop_pad or c.flip):
    return None
  black = -np.asarray(card["mean"]) / np.asarray(card["std"])
  return lambda key, x: datasets.augment(key, x, c.crop_pad, c.flip, fill=black)


def data_free_arm(config, game, teacher):
  """(epoch program, initial state) of a distillation; the epoch is a function of the state."""
  spec = datasets.describe(config.dataset.name, config.dataset.data_dir)
  epoch = algorithm.compile_epoch(game, config.schedule.iterations)
  state = algorithm.initial_state(game, config.seed, spec.image_shape)
  return lambda state: epoch(state, teacher), place(state, algorithm.shardings(game))


def held_images(pool, card, mesh):
  """What an image pool holds at the end, as it would be shown: {"images": (N, H, W, K) uint8, "labels": (N,)}."""
  whole = jax.device_get(jax.jit(lambda tree: tree, out_shardings=replicated(mesh))(pool))
  there = min(int(whole["count"]), len(whole["labels"]))
  flat = lambda array: array[:there].reshape(-1, *array.shape[2:])
  images = datasets.denormalise(flat(whole["images"]), card["mean"], card["std"])
  return {"images": np.round(255 * images).astype(np.uint8), "labels": flat(whole["labels"])}


def earlier_results(workdir, config):
  """The results of a finished run of `config` in `workdir`, or None; nothing is written.

  Raises:
    Refusal: the folder belongs to another config, or cannot be read.
  """
  config_path, results_path = workdir / "config.json", workdir / "results.json"
  try:
    saved = json.loads(config_path.read_text()) if config_path.exists() else None
    results = json.loads(results_path.read_text()) if results_path.exists() else None
  except (OSError, ValueError) as error:
    raise Refusal(f"cannot read what is in {workdir} ({error}); choose another --workdir.") from error
  changed = settings.differences(config, saved) if saved else []
  if changed:
    raise Refusal(
      f"{workdir} belongs to another config (it differs in {', '.join(changed)}); choose another --workdir."
    )
  return results


def claim(workdir, config):
  """Makes `workdir` this config's; a Refusal if it cannot be written, or is not the folder that process 0 sees."""
  if not is_primary() and not (workdir / "config.json").exists():
    raise Refusal(f"process {jax.process_index()} does not see {workdir} of process 0; name a folder that all share.")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not (workdir / "config.json").exists():
      write_whole(workdir / "config.json", settings.dump(config))
    (workdir / ".writable").touch()
    (workdir / ".writable").unlink()
  except OSError as error:
    raise Refusal(f"cannot write to {workdir} ({error.strerror}); choose another --workdir.") from error


def write_whole(path, text):
  """Writes a file so that it is never seen half written."""
  scratch = path.with_name(path.name + ".partial")
  scratch.write_text(text)
  os.replace(scratch, path)


def hardware():
  device = jax.devices()[0]
  return {
    "platform": device.platform,
    "device": device.device_kind,
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "cpu": cpu_model(),
    "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
  }


def cpu_model():
  try:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  except OSError:
    return platform.processor() or platform.machine()
  return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
