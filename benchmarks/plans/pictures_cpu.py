"""What `photos` makes of a folder of one's own images on two CPU cores, without a flag: the commands of the README.

Needs --config.dataset.data_dir=DIR and --config.dataset.name=NAME, 32-pixel images prepared as a folder of one's own
(docs/data.md): 1,000 training and 1,000 test images of each of CIFAR-10's ten classes, as PNG files.
"""

from benchmarks.plan import Row

PAIR = "1,000 pictures of each of 10 classes, WRN-16-2 -> WRN-16-1, of half its width"
ROWS = (
  Row("cpsc", "photos"),
  Row("cpsc, untrained generator", "photos", ("--config.arm=untrained_generator",), teacher="cpsc"),
  Row("real_kd", "photos", ("--config.arm=real_kd",), teacher="cpsc"),
)
