"""tox21: twelve toxicity assays, a sixth of the labels missing."""

import os

import numpy as np

from mtljax.data import _tables
from mtljax.data._mulan import task_names
from mtljax.data.files import Field
from mtljax.data.types import MISSING, SPLITS, DataError, Dataset, Task

BITS = 1024
_UNKNOWN = 255  # missing label in the file


def tox21(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    bits: int = BITS,
    seed: int = 0,
) -> Dataset:
    """Loads 8,006 molecules as substructure fingerprints with results of twelve assays.

    All records of a molecule are in one split. 20 % are for test, and 15 % for
    validation.

    Args:
      data_dir: Folder that contains ``tox21/tox21_ecfp1024.npz``.
      bits: Length of a fingerprint: 1024, or a divisor of it. The bits are folded to
        this length.
      seed: Seed of the order of the molecules.

    Returns:
      A :class:`Dataset` with ``image`` ``[N, bits, 1, 1]`` uint8 of zeros and ones
      (``image_max=1``), and one int32 label per assay: 0, 1, or -1 if missing (17 %).

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged, an assay has no label, or an option is out of
        range.

    Examples:
      >>> from mtljax.data import load
      >>> load("tox21")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The tox21 files are needed: ...

    References:
      Wu et al., `MoleculeNet: A Benchmark for Molecular Machine Learning
      <https://arxiv.org/abs/1703.00564>`_, 2018; labels of the Tox21 challenge, 2014.
    """
    if bits < 1 or BITS % bits:
        raise DataError(f"tox21: bits must divide {BITS}, not {bits}.")
    if seed < 0:
        raise DataError(f"tox21: seed must be >= 0, not {seed}.")
    fields = {
        "fp_bits": Field("uint8", ("n", BITS // 8)),
        "y": Field("uint8", ("n", 12), 0, 1, missing=_UNKNOWN),
        "group": Field("integer", ("n",), 0, 2**31 - 1),
        "y_names": Field("text", (12,)),
    }
    found = _tables.read_npz(data_dir, "tox21", "tox21_ecfp1024.npz", fields)
    whole = np.unpackbits(found["fp_bits"], axis=1)
    images = whole.reshape(len(whole), BITS // bits, bits).max(1)[..., None, None]
    # Converted first, because -1 does not fit into the unsigned type of the file.
    labels = found["y"].astype(np.int32)
    labels[labels == _UNKNOWN] = MISSING
    names = task_names(found["y_names"])
    # Groups are numbered from 0. A number without a molecule has no effect.
    groups = int(found["group"].max()) + 1
    if groups > len(whole):
        raise DataError(
            f"tox21: groups are numbered to {groups - 1}, beyond the {len(whole)} "
            "molecules."
        )
    drawn = np.random.default_rng(seed).permutation(groups)
    part = drawn[found["group"]] / len(drawn)
    rows = {"test": part < 0.2, "val": (part >= 0.2) & (part < 0.35)}
    rows["train"] = part >= 0.35
    splits = {
        split: {"image": images[rows[split]]}
        | {name: labels[rows[split], i] for i, name in enumerate(names)}
        for split in SPLITS
    }
    return Dataset(
        name="tox21",
        tasks=tuple(Task(name, "classification", 2) for name in names),
        input_shape=(bits, 1, 1),
        image_max=1,
        origin={split: {"source": np.flatnonzero(rows[split])} for split in SPLITS},
        notes="Tox21 of MoleculeNet (public domain), ECFP fingerprints",
        **splits,
    )
