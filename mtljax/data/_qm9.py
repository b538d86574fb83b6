"""QM9: eleven properties of small organic molecules."""

import os
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from mtljax.data import _tables, catalogue, files
from mtljax.data.types import DataError, Dataset, Task

TARGETS = ("mu", "alpha", "homo", "lumo", "r2", "zpve", "u0", "u", "h", "g", "cv")
"""Order of the tables of Nash-MTL, FAMO and IGB."""

UNITS = dict(
    mu="D", alpha="a0³", homo="eV", lumo="eV", r2="a0²", zpve="eV",
    u0="eV", u="eV", h="eV", g="eV", cv="cal/(mol K)",
)  # fmt: skip

ATOM_COLUMNS = ("z", "num_h", "charge", "hyb", "in_ring")
"""Columns of an atom before its bonds. The charge is stored plus 1."""

_TARGET_FIELDS = {
    "y": files.Field("real", ("molecules", "targets")),
    "y_names": files.Field("text", ("targets",)),
}
_HARTREE, _KCAL = 27.211386245988, 0.0433641153087705  # in eV
_BLOCK = 4096
_MAX_ATOMS = 29

# Key of a target in the file, and the factor that converts it to its unit.
_SUBSET_KEYS = {
    "mu": ("mu", 1.0),
    "alpha": ("alpha", 1.0),
    "homo": ("homo", _HARTREE),
    "lumo": ("lumo", _HARTREE),
    "r2": ("r2", 1.0),
    "zpve": ("zpve", _HARTREE),
    "u0": ("u0_atom", _KCAL),
    "u": ("u298_atom", _KCAL),
    "h": ("h298_atom", _KCAL),
    "g": ("g298_atom", _KCAL),
    "cv": ("cv", 1.0),
}
_CATALOGUE_KEYS = {
    **_SUBSET_KEYS,
    "u0": ("U0_atomization", _HARTREE),
    "u": ("U_atomization", _HARTREE),
    "h": ("H_atomization", _HARTREE),
    "g": ("G_atomization", _HARTREE),
    "cv": ("Cv", 1.0),
}


def qm9_subset(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int = 1500,
    test_size: int = 1500,
) -> Dataset:
    """Loads an 11 % sample of QM9 (14,712 molecules) as graphs of up to 9 heavy atoms.

    The file has no 3-D coordinates. Errors are therefore not comparable with those of
    networks that read coordinates. The conflict between the eleven tasks is the same.
    The targets are in the usual order: dipole moment (D), polarisability (a0³), HOMO
    and LUMO energies (eV), spatial extent (a0²), zero-point energy (eV), atomisation
    energies u0, u, h, g (eV) and heat capacity (cal/(mol K)). Each is standardised by
    the mean and deviation of the training split.

    Args:
      data_dir: Folder that contains ``qm9_subset/qm9_graphs.npz``.
      seed: Seed of the shuffle that divides the molecules: first test, then validation,
        then training.
      train_size: Number of training molecules. None takes all remaining molecules.
      val_size: Number of validation molecules, may be 0.
      test_size: Number of test molecules.

    Returns:
      A :class:`Dataset`. ``image`` ``[N, 9, 14, 1]`` uint8 is the table of a molecule,
      with one row per atom. The columns are atomic number (0 for padding), implicit
      hydrogens, charge + 1, hybridisation (sp, sp2, sp3, other), ring flag, and the
      bond to each atom (0 none, 1 single, 2 double, 3 triple, 4 aromatic).
      ``origin["targets"]`` has the ``mean`` and ``std`` ``[11]`` that convert a
      standardised target to its unit.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged, or a size is negative or too large.

    Examples:
      >>> from mtljax.data import load
      >>> load("qm9_subset", data_dir="nowhere")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: File ...qm9_graphs.npz...

    References:
      Ramakrishnan et al., `Quantum chemistry structures and properties of 134 kilo
      molecules <https://doi.org/10.1038/sdata.2014.22>`_, 2014 (CC0).
    """
    atom = files.Field("integer", ("molecules", "atoms"), -1, 255)
    fields: dict[str, files.Field] = dict.fromkeys(ATOM_COLUMNS, atom)
    fields["adj"] = files.Field("integer", ("molecules", "atoms", "atoms"), 0, 4)
    arrays = _tables.read_npz(
        data_dir, "qm9_subset", "qm9_graphs.npz", fields | _TARGET_FIELDS
    )
    atoms = arrays["z"] > 0
    table = [np.where(atoms, arrays[name] + (name == "charge"), 0)
             for name in ATOM_COLUMNS]  # fmt: skip
    packed = np.concatenate([np.stack(table, -1), arrays["adj"]], -1)
    images = packed.astype(np.uint8)[..., None]
    return _dataset(
        "qm9_subset",
        images,
        _targets(arrays, _SUBSET_KEYS, "qm9_graphs.npz"),
        seed=seed,
        sizes=(train_size, val_size, test_size),
        image_max=255,
        notes="11 % of QM9 (CC0): bonds of heavy atoms, no coordinates",
    )


def qm9(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    source: Literal["files", "tfds"] = "files",
    download: bool = False,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int = 10_000,
    test_size: int = 10_000,
) -> Dataset:
    """Loads all of QM9 with 3-D coordinates: about 130,831 molecules, up to 29 atoms.

    The split is that of the papers: after a shuffle by the seed, the first 10,000
    molecules are for test and the next 10,000 for validation. The targets and their
    order are those of :func:`qm9_subset`. The papers use complete graphs with bond
    types and distances as edge features. The catalogue has no bond types, so that only
    distances are available.

    Args:
      data_dir: Folder that contains ``qm9/qm9.npz`` with ``z`` ``[M, 29]``,
        ``positions`` ``[M, 29, 3]`` (Å), ``y`` ``[M, T]`` and ``y_names`` ``[T]``
        (columns and units of MoleculeNet's file), or the folder of tensorflow-datasets.
      source: ``"files"`` or ``"tfds"``, which reads ``qm9/original`` of the catalogue.
      download: Whether tensorflow-datasets may download the set (86 MB). This needs
        TensorFlow and pandas.
      seed: Seed of the shuffle.
      train_size: Number of training molecules. None takes all remaining molecules.
      val_size: Number of validation molecules.
      test_size: Number of test molecules.

    Returns:
      A :class:`Dataset`. ``image`` ``[N, 29, 4, 1]`` float32 has one row per atom with
      its atomic number (0 for padding) and its position in Å. The rest is as in
      :func:`qm9_subset`.

    Raises:
      MissingDataError: If the files do not exist.
      DataError: If the files are damaged, or a size is negative or too large.

    Examples:
      >>> from mtljax.data import load
      >>> load("qm9")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The qm9 files are needed: ...
    """
    if source == "tfds":
        charges, positions, targets = _from_catalogue(data_dir, download)
    elif source != "files":
        raise DataError(f"source must be 'files' or 'tfds', not {source!r}.")
    elif download:
        raise DataError(
            "download=True works with source='tfds' only (--source tfds --download)."
        )
    else:
        fields = {
            "z": files.Field("integer", ("molecules", "atoms"), 0, 127),
            "positions": files.Field("real", ("molecules", "atoms", 3)),
        }
        arrays = _tables.read_npz(data_dir, "qm9", "qm9.npz", fields | _TARGET_FIELDS)
        charges, positions = arrays["z"], arrays["positions"]
        targets = _targets(arrays, _SUBSET_KEYS, "qm9.npz")
    images = np.concatenate([charges[..., None], positions], -1)
    return _dataset(
        "qm9",
        images.astype(np.float32)[..., None],
        targets,
        seed=seed,
        sizes=(train_size, val_size, test_size),
        image_max=1,
        notes="QM9 (CC0): positions of all atoms, no bond types",
    )


def _targets(
    arrays: Mapping[str, np.ndarray], keys: Mapping[str, Any], file: str
) -> np.ndarray:
    """Returns the eleven targets ``[M, 11]`` in their units."""
    names = [str(name) for name in arrays["y_names"]]
    missing = [key for key, _ in keys.values() if key not in names]
    if missing:
        raise DataError(f"File {file!r} has targets {names}; it lacks {missing}.")
    columns = [arrays["y"][:, names.index(key)] * f for key, f in keys.values()]
    return np.stack(columns, -1)


def _from_catalogue(data_dir: Any, download: bool) -> tuple[np.ndarray, ...]:
    """Returns charges, positions and targets of the catalogue's rows."""
    rows = catalogue.tfds_source(
        "qm9/original", "train", data_dir=data_dir, download=download
    )
    charges = np.zeros((len(rows), _MAX_ATOMS), np.uint8)
    positions = np.zeros((len(rows), _MAX_ATOMS, 3), np.float32)
    targets = np.zeros((len(rows), len(TARGETS)))
    for begin in range(0, len(rows), _BLOCK):
        block = rows.__getitems__(range(begin, min(begin + _BLOCK, len(rows))))
        part = slice(begin, begin + len(block))
        charges[part] = [row["charges"] for row in block]
        positions[part] = [row["positions"] for row in block]
        for i, (key, factor) in enumerate(_CATALOGUE_KEYS.values()):
            targets[part, i] = [factor * row[key] for row in block]
    return charges, positions, targets


def _dataset(
    name: str,
    images: np.ndarray,
    targets: np.ndarray,
    *,
    seed: int,
    sizes: tuple[int | None, int, int],
    image_max: int,
    notes: str,
) -> Dataset:
    """Divides, standardises and names the targets."""
    order = _tables.split(name, len(images), sizes, seed)
    scaled, statistics = _tables.standardise(targets, order["train"])
    splits = {
        part: {"image": images[rows]}
        | {task: scaled[rows, i] for i, task in enumerate(TARGETS)}
        for part, rows in order.items()
    }
    return Dataset(
        name=name,
        tasks=tuple(Task(task, "regression", 1) for task in TARGETS),
        input_shape=images.shape[1:],
        image_max=image_max,
        origin={"targets": statistics},
        notes=notes,
        **splits,
    )
