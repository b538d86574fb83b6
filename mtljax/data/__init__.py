"""Data sets with several tasks, and two ways to feed them to a step.

- :func:`load` builds a data set by name, see :func:`available`. ``multidigits`` needs
  no files. The other sets read files or tensorflow-datasets. :func:`register` adds your
  own data set.
- :func:`read_npz`, :func:`read_csv`, :func:`read_idx` and :func:`read_png` read files
  and compare them with a table of expected contents.
- A data set that fits on the device is stored there. Pass its arrays to
  :func:`mtljax.training.fit`, which gathers batches inside the compiled program.
- :func:`stream` reads larger data sets through Grain.

The arrays are NumPy arrays. scikit-learn, tensorflow-datasets and Grain are imported by
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
    # data sets
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
    # structure of a data set
    "Dataset",
    "Task",
    "MISSING",
    "SPLITS",
    "DataError",
    "MissingDataError",
    "checksum",
    "to_float",
    # batches for a step
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
