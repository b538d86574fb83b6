"""Data sets with several tasks, and the two ways of feeding them to a step.

- :func:`load` builds a set by name (:func:`available`): ``multidigits`` needs no files,
  the others read files or tensorflow-datasets. :func:`register` adds a set of yours.
- :func:`read_npz`, :func:`read_csv`, :func:`read_idx` and :func:`read_png` read files,
  and compare them with a table of what they must hold.
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
from mtljax.data.files import (
    Field,
    read_csv,
    read_idx,
    read_images,
    read_npz,
    read_png,
    write_idx,
)
from mtljax.data.registry import available, load, register
from mtljax.data.types import (
    MISSING,
    SPLITS,
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
    "register",
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
    "MISSING",
    "SPLITS",
    "DataError",
    "MissingDataError",
    "checksum",
    "to_float",
    # feeding a step
    "stream",
    # files and the catalogue
    "Field",
    "read_npz",
    "read_csv",
    "read_png",
    "read_idx",
    "write_idx",
    "read_images",
    "tfds_source",
    "save_tfds",
]
