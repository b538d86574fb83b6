"""Data sets by name, and registration of your own."""

import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any, cast

from mtljax.data._adult import adult
from mtljax.data._camvid import camvid
from mtljax.data._digit_domains import digit_domains
from mtljax.data._domainnet import domainnet
from mtljax.data._faces import cmu_faces
from mtljax.data._mulan import mulan_mtr
from mtljax.data._multidigits import multidigits
from mtljax.data._multilabel import mulan_multilabel
from mtljax.data._multimnist import multi_fashion, multi_fashion_mnist, multi_mnist
from mtljax.data._nyuv2 import nyuv2_frames
from mtljax.data._qm9 import qm9, qm9_subset
from mtljax.data._school import school
from mtljax.data._tox21 import tox21
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
    "cmu_faces": cmu_faces,
    "camvid": camvid,
    "tox21": tox21,
    "school": school,
    "adult": adult,
    "mulan_multilabel": mulan_multilabel,
    "nyuv2_frames": nyuv2_frames,
}


def register(name: str, loader: Callable[..., Dataset]) -> None:
    """Registers your own data set for :func:`load` in this process.

    Commands of the experiments load it as ``--data module:function`` without this call.

    Args:
      name: A new name without a colon.
      loader: Function that returns a :class:`Dataset`. Its keywords are the options of
        :func:`load`. ``data_dir`` is passed if it is one of them.

    Raises:
      DataError: If the name exists, or contains a colon.

    Examples:
      >>> import numpy as np
      >>> from mtljax.data import Dataset, Task, load, register
      >>> def parity(*, seed=0):
      ...     def split(n):
      ...         bits = np.random.default_rng([seed, n]).integers(0, 2, (n, 8, 1, 1))
      ...         even = (bits.sum((1, 2, 3)) % 2).astype(np.int32)
      ...         return {"image": bits.astype(np.uint8), "parity": even}
      ...     tasks = (Task("parity", "classification", 2),)
      ...     return Dataset("parity", tasks, (8, 1, 1), *map(split, (64, 16, 32)),
      ...                    image_max=1)
      >>> register("parity", parity)
      >>> load("parity", seed=3).num_tasks
      1
    """
    if ":" in name or name in _BUILDERS:
        raise DataError(f"A data set cannot be registered as {name!r}: it is taken.")
    _BUILDERS[name] = loader


def import_name(path: str) -> Any:
    """Returns the object of ``module:name``.

    Args:
      path: A module on the path of Python, a colon, and a name in this module.

    Raises:
      ImportError: If the module cannot be imported or does not have the name.

    Examples:
      >>> from mtljax.data.registry import import_name
      >>> import_name("math:sqrt")(4)
      2.0
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ImportError(str(error)) from error


def find_loader(name: str) -> Callable[..., Dataset]:
    """Returns the function of a registered name, or of ``module:function``.

    Raises:
      DataError: If the name is unknown, cannot be imported, or is not a function.
    """
    if ":" not in name:
        if name not in _BUILDERS:
            raise DataError(
                f"Unknown data set {name!r}. Choose from {', '.join(_BUILDERS)}, or "
                "pass your own as module:function."
            )
        return _BUILDERS[name]
    try:
        found = import_name(name)
    except ImportError as error:
        raise DataError(
            f"Data set {name!r} cannot be loaded: {error}. Give module:function, with "
            "the module on PYTHONPATH."
        ) from error
    if not callable(found):
        raise DataError(f"Data set {name!r} is not a function.")
    return cast(Callable[..., Dataset], found)


def available() -> tuple[str, ...]:
    """Returns the names that :func:`load` accepts.

    Examples:
      >>> from mtljax.data import available
      >>> available()
      ('multidigits', 'multi_mnist', 'multi_fashion', 'multi_fashion_mnist',
      'qm9_subset', 'qm9', 'mulan_mtr', 'digit_domains', 'domainnet', 'cmu_faces',
      'camvid', 'tox21', 'school', 'adult', 'mulan_multilabel', 'nyuv2_frames'...)
    """
    return tuple(_BUILDERS)


def load(
    name: str, *, data_dir: str | os.PathLike[str] | None = None, **options: Any
) -> Dataset:
    """Builds a data set by name.

    Args:
      name: A name of :func:`available`, or ``module:function`` for your own function
        that returns a :class:`Dataset`.
      data_dir: Folder of the files. It is ignored by sets without files
        (``multidigits``).
      **options: Keywords of the function of this name. Most sets have ``seed``,
        ``train_size``, ``val_size`` and ``test_size``. ``camvid`` and ``nyuv2_frames``
        have none of them, ``tox21`` and ``school`` have ``seed`` only, and
        ``mulan_multilabel`` has no ``test_size``. The MultiMNIST family and ``qm9``
        also accept ``source`` (``"files"`` or ``"tfds"``) and ``download``. Further
        keywords are ``subset`` of ``mulan_mtr`` and ``mulan_multilabel``, ``domain``
        and ``size`` of ``digit_domains``, ``domain``, ``size`` and ``download`` of
        ``domainnet``, ``bits`` of ``tox21``, and ``persons`` of ``cmu_faces``.

    Returns:
      The data set, in memory.

    Raises:
      MissingDataError: If files are missing. The message says how to provide them.
      DataError: If the name or an option is unknown, or a file is damaged.

    Examples:
      >>> from mtljax.data import load
      >>> load("multidigits", train_size=50).train["left"].shape
      (50,)
    """
    build = find_loader(name)
    known = list(inspect.signature(build).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise DataError(
            f"Data set {name!r} has no option {unknown[0]!r}; it has "
            f"{', '.join(known) or 'none'}."
        )
    if "data_dir" in known:
        options["data_dir"] = data_dir
    found = build(**options)
    if not isinstance(found, Dataset):
        raise DataError(
            f"Data set {name!r} returned a {type(found).__name__}, not a Dataset."
        )
    return found
