"""Data sets by name."""

import inspect
import os
from collections.abc import Callable
from typing import Any

from mtljax.data._digit_domains import digit_domains
from mtljax.data._domainnet import domainnet
from mtljax.data._mulan import mulan_mtr
from mtljax.data._multidigits import multidigits
from mtljax.data._multimnist import multi_fashion, multi_fashion_mnist, multi_mnist
from mtljax.data._qm9 import qm9, qm9_subset
from mtljax.data.types import DataError, Dataset

_BUILDERS: dict[str, Callable[..., Dataset]] = {
    "multidigits": multidigits,
    "multi_mnist": multi_mnist,
    "multi_fashion": multi_fashion,
    "multi_fashion_mnist": multi_fashion_mnist,
    "qm9_subset": qm9_subset,
    "qm9": qm9,
    "mulan_mtr": mulan_mtr,
    "digit_domains": digit_domains,
    "domainnet": domainnet,
}


def available() -> tuple[str, ...]:
    """Names that :func:`load` knows.

    Examples:
      >>> from mtljax.data import available
      >>> available()
      ('multidigits', 'multi_mnist', 'multi_fashion', 'multi_fashion_mnist',
      'qm9_subset', 'qm9', 'mulan_mtr', 'digit_domains',
      'domainnet')
    """
    return tuple(_BUILDERS)


def load(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Builds a data set by name.

    Args:
      name: One of :func:`available`.
      data_dir: Where the files are; ignored by a set that needs none
        (``multidigits``).
      **options: Keywords of the function of that name: ``seed``, ``train_size``,
        ``val_size``, ``test_size``; for the MultiMNIST family and ``qm9`` also
        ``source`` (``"files"`` or ``"tfds"``) and ``download``; for ``mulan_mtr``
        also ``subset``, for ``digit_domains`` ``domain`` and ``size``, for
        ``domainnet`` ``domain``, ``size`` and ``download``.

    Returns:
      The data set, in memory.

    Raises:
      MissingDataError: If files are missing; the message says how to provide them.
      DataError: If the name or an option is unknown, or a file is damaged.

    Examples:
      >>> from mtljax.data import load
      >>> load("multidigits", train_size=50).train["left"].shape
      (50,)
    """
    if name not in _BUILDERS:
        raise DataError(
            f"There is no data set {name!r}; there are {', '.join(_BUILDERS)}."
        )
    build = _BUILDERS[name]
    known = list(inspect.signature(build).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(
            f"Data set {name!r} has no option {unknown[0]!r}; it has "
            f"{', '.join(known)}."
        )
    if "data_dir" in known:
        options["data_dir"] = data_dir
    return build(**options)
