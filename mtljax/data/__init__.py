"""Data sets with several tasks, and the two ways of feeding them to a step.

- :func:`load` builds a set by name: ``multidigits`` needs no files, the
  MultiMNIST family reads MNIST and Fashion-MNIST from IDX or ``.npz`` files or from
  tensorflow-datasets.
- A set that fits on the device stays there: pass its arrays to
  :func:`mtljax.training.fit`, which gathers batches inside the compiled program.
- A set that does not fit goes through grain: :func:`stream`.

Arrays are numpy arrays; scikit-learn, tensorflow-datasets and grain are imported by
the functions that need them.
"""

from mtljax.data._digit_domains import DOMAINS as DIGIT_DOMAINS
from mtljax.data._digit_domains import digit_domains
from mtljax.data._domainnet import DOMAINS as DOMAINNET_DOMAINS
from mtljax.data._domainnet import domainnet
from mtljax.data._multidigits import multidigits
from mtljax.data._multimnist import multi_fashion, multi_fashion_mnist, multi_mnist
from mtljax.data._stream import stream
from mtljax.data.catalogue import save_tfds, tfds_source
from mtljax.data.files import read_idx, read_images, write_idx
from mtljax.data.registry import available, load
from mtljax.data.types import (
    DataError,
    Dataset,
    MissingDataError,
    Task,
    checksum,
    to_float,
)

__all__ = [
    # sets
    "load",
    "available",
    "multidigits",
    "multi_mnist",
    "multi_fashion",
    "multi_fashion_mnist",
    "digit_domains",
    "DIGIT_DOMAINS",
    "domainnet",
    "DOMAINNET_DOMAINS",
    # what a set is
    "Dataset",
    "Task",
    "DataError",
    "MissingDataError",
    "checksum",
    "to_float",
    # feeding a step
    "stream",
    # files and the catalogue
    "read_idx",
    "write_idx",
    "read_images",
    "tfds_source",
    "save_tfds",
]
