"""CIFAR-100 on one GPU: the rows of gpu_cifar.py, `benchmarks/gpu_campaign.sh OUT --data D --plan gpu_cifar100`.

Needs --config.dataset.data_dir=DIR, with CIFAR-100 prepared there.
"""

from benchmarks.plans.gpu_cifar import campaign

PAIR = "CIFAR-100 on one GPU"
ROWS = campaign("cifar100")
PUBLISHED = (("neighbouring methods, ResNet-34 -> ResNet-18 (best epoch)", "0.770 to 0.775", "0.7805"),)
