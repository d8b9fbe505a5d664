"""cpsc-jax --config tiny_imagenet

Tiny-ImageNet (200 classes, 64x64), ResNet-34 -> ResNet-18. The authors' settings for this data set were not published:
this is their CIFAR-100 schedule with half the batch, to save memory. SpaceshipNet reports 64.04 %. Accuracy of this
code: not measured.
"""

from cpsc_jax.configs import default


def get_config(variant=""):
  c = default.get_config()
  with c.unlocked():
    c.name = "tiny_imagenet"
    c.dataset.name = "tiny_imagenet"
    c.teacher.batch_size = 128
    c.schedule.batch_size = 256
    default.apply_variant(c, variant)
  return c
