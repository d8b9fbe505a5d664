"""What the page says of every number of a diagnosis: its title, how to read it, and what to try when it looks bad."""

from typing import NamedTuple


class Words(NamedTuple):
  """What is said of a number.

  Attributes:
    title: its name.
    read: how to read it.
    mend: what to try when it looks bad; empty where there is nothing.
    form: how it is written.
    beside: (name of the number that it is compared with, what that one is of), or None.
  """

  title: str
  read: str
  mend: str = ""
  form: str = ".3f"
  beside: tuple[str, str] | None = None


# name in history.json's "diagnostics" -> words; the page shows them in this order.
SAMPLES = {
  "confidence": Words(
    "Teacher's confidence",
    "How sure the teacher is of the samples' class; of real images it is about as sure as it is right.",
    "Low: raise loss.generator.ce, or train longer.",
  ),
  "class_balance": Words(
    "Class balance",
    "1 if the teacher finds all classes equally often among the samples, 0 if only one.",
    "Low: set generator.conditional or generator.labels='balanced', or raise loss.generator.balance where there is"
    " one.",
  ),
  "student_mistakes": Words(
    "Student's mistakes",
    "The share of samples to which the student gives another class than the teacher. Near 0 the generator teaches"
    " nothing new; near 1 the student does not follow.",
    "Near 0: raise loss.generator.adversarial; near 1: lower it, or raise student.steps.",
  ),
  "distance_within": Words(
    "Distance within classes",
    "Mean distance of two samples of one class in the teacher's features; compare it with the one between classes.",
    "Much smaller: raise loss.generator.scl or generator.latent_dim, or lower loss.generator.ce.",
  ),
  "distance_between": Words(
    "Distance between classes",
    "Mean distance of samples of two classes in the teacher's features.",
    "No larger than within classes: the label has no effect; raise loss.generator.ce.",
  ),
  "distance": Words(
    "Distance of samples",
    "Mean distance of any two samples in the teacher's features.",
    "Near 0: the generator draws one image; lower its learning rate.",
  ),
  "vendi_score": Words(
    "Vendi score",
    "How many different samples there effectively are, by the teacher's features; compare it with real images'.",
    "Far below: more latents (generator.latent_dim), more loss.generator.scl, or a pool (pool.replay_share).",
    ".2f",
    ("real_vendi_score", "real images"),
  ),
  "effective_rank": Words(
    "Effective rank",
    "How many directions of the teacher's feature space the samples fill; compare it with real images'.",
    "Far below: as for the Vendi score.",
    ".1f",
    ("real_effective_rank", "real images"),
  ),
  "frechet_distance": Words(
    "Fréchet distance",
    "Between samples and real images in the teacher's features; 0 if alike. Only figures of one teacher and equally"
    " many samples compare.",
    "Rising: raise loss.generator.bn; that samples differ from real images does no harm by itself.",
  ),
  "precision": Words(
    "Precision",
    "The share of samples that lie among real images.",
    "Low: raise loss.generator.bn and ce. Adversarial samples are meant to lie outside to some extent.",
  ),
  "recall": Words(
    "Recall", "The share of real images that lie among samples.", "Low: more diversity, as for the Vendi score."
  ),
  "density": Words(
    "Density", "How closely samples are surrounded by real images; about 1 for real images.", "Low: as for precision."
  ),
  "coverage": Words(
    "Coverage",
    "The share of real images that have a sample close by: what the student is never asked about is missing here.",
    "Low: as for recall.",
  ),
  "samples": Words("Samples", "How many samples these figures are of.", form=",.0f"),
}
STUDENT = {
  "calibration_error": Words(
    "Calibration error",
    "Mean gap between the student's confidence and its accuracy, over bins of confidence; 0 is calibrated.",
    "High: a higher loss.kd_temperature, or a lower loss.student.ce.",
    beside=("teacher_calibration_error", "the teacher"),
  ),
  "student_confidence": Words("Student's confidence", "How sure it is of its class on real images."),
  "agreement_on_noise": Words(
    "Agreement on noise",
    "The share of uniform noise images to which student and teacher give one class: how alike they are far from data.",
    "Low is common; a student that is much like its teacher also agrees here.",
  ),
  "agreement_on_grain": Words(
    "Agreement on grain", "The same on real images with Gaussian noise.", "Low: more student.crop_pad, longer training."
  ),
  "agreement_on_blur": Words("Agreement on blur", "The same on blurred real images.", "Low: as on grain."),
  "agreement_on_contrast": Words("Agreement on low contrast", "The same at half the contrast.", "Low: as on grain."),
  "student_learning_rate": Words("Student's learning rate", "Of the last update of the epoch.", form="g"),
  "generator_learning_rate": Words("Generator's learning rate", "Of the last update of the epoch.", form="g"),
}
