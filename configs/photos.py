"""cpsc-jax --config photos --config.dataset.name=NAME --config.dataset.data_dir=D --workdir runs/NAME

Your own photographs of 32 to 64 pixels, prepared as NAME (docs/data.md), on two CPU cores: trains a WRN-16-2 on them
and distils it into a WRN-16-1, of a quarter of the parameters, which starts with every second channel of it. The
settings are those of cifar10:cpu. From 1,000 pictures of each of ten classes, in 23 minutes, seed 0: teacher 0.8021,
student 0.7652 (docs/results.md).

On a GPU use larger nets: --config.teacher.net=wrn_40_2 --config.student.net=wrn_16_2, or resnet34 and resnet18. With a
teacher of your own (docs/teachers.md) add --config.teacher.checkpoint=FOLDER; name a student of its family.
"""

from cpsc_jax.configs import default


def get_config(variant=""):
  c = default.get_config()
  with c.unlocked():
    c.loss.ikd_form = "log"
    default.cpu(c)
    default.cpsc_on_cpu(c)
    c.name = c.dataset.name = "photos"
    c.teacher.net, c.student.net = "wrn_16_2", "wrn_16_1"
    c.teacher.update({"epochs": 20, "batch_size": 128, "lr": 0.1, "warmup_epochs": 1, "optimiser": "nesterov"})
    default.apply_variant(c, variant)
  return c
