"""cmu_faces: person, pose, expression and sunglasses in face images."""

import os
from typing import Literal

import numpy as np

from mtljax.data import _tables
from mtljax.data.files import Field
from mtljax.data.types import MISSING, SPLITS, DataError, Dataset, Split, Task

PERSONS = 20
SIZES = {"person": PERSONS, "pose": 4, "expression": 4, "sunglasses": 2}
_PARTS = {"train": range(12), "val": range(12, 16), "test": range(16, 20)}


def cmu_faces(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    persons: Literal["apart", "mixed"] = "apart",
    seed: int = 0,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Loads 624 pictures of 20 persons with four labels each.

    The nearest neighbours of a picture are pictures of the same person with other
    expressions. Pose, expression and sunglasses are therefore evaluated on persons that
    are not in the training split.

    - ``persons="apart"``: No person is in two splits. They have 12, 4 and 4 persons.
      The task ``person`` is omitted, because a model cannot identify an unseen person.
    - ``persons="mixed"``: Four persons are reserved for test and three for validation.
      Each of these splits also contains 60 pictures of the other 13 persons. The label
      ``person`` is missing for the reserved persons, and the three other labels are
      missing for these 60 pictures.

    Args:
      data_dir: Folder that contains ``cmu_faces/cmu_faces_q.npz``.
      persons: How persons are divided, see above.
      seed: Seed of the order of the pictures, and of mixed persons.
      train_size: Maximum number of training pictures with persons apart. None is all.
      val_size: Maximum number of validation pictures.
      test_size: Maximum number of test pictures.

    Returns:
      A :class:`Dataset` with images ``[N, 30, 32, 1]`` uint8 and int32 labels. A
      missing label is -1. With mixed persons, the 13 known persons have the classes 0
      to 12.

    Raises:
      MissingDataError: If the file does not exist.
      DataError: If the file is damaged, or an option is out of range.

    Examples:
      >>> from mtljax.data import load
      >>> load("cmu_faces")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The cmu_faces files are needed: ...

    References:
      Mitchell, `CMU Face Images <https://doi.org/10.24432/C5JC79>`_, UCI, 1999
      (CC BY 4.0).
    """
    sizes = dict(zip(SPLITS, (train_size, val_size, test_size), strict=True))
    for part, size in sizes.items():
        if size is not None and (persons == "mixed" or size < 1):
            raise DataError(
                f"cmu_faces: {part}_size={size} does not fit. It must be positive, "
                "and mixed persons have splits of fixed sizes."
            )
    if persons not in ("apart", "mixed") or seed < 0:
        raise DataError(
            "cmu_faces: persons must be 'apart' or 'mixed' and seed must be >= 0, not "
            f"{persons!r} and {seed}."
        )
    fields = {"x": Field("uint8", ("n", 30, 32))}
    fields |= {k: Field("integer", ("n",), 0, size - 1) for k, size in SIZES.items()}
    found = _tables.read_npz(data_dir, "cmu_faces", "cmu_faces_q.npz", fields)
    labels = {k: found[k].astype(np.int32) for k in SIZES}
    divide = _apart if persons == "apart" else _mixed
    splits = divide(found["x"][..., None], labels, np.random.default_rng(seed))
    splits = {p: {k: v[: sizes[p]] for k, v in s.items()} for p, s in splits.items()}
    named = [k for k in SIZES if k in splits["train"]]
    classes = {**SIZES, "person": 13}
    return Dataset(
        name="cmu_faces",
        tasks=tuple(Task(k, "classification", classes[k]) for k in named),
        input_shape=(30, 32, 1),
        train=splits["train"],
        val=splits["val"],
        test=splits["test"],
        notes=f"CMU Face Images (CC BY 4.0), persons {persons}",
    )


def _apart(images: np.ndarray, labels: Split, rng: np.random.Generator):
    order = rng.permutation(len(images))
    splits = {}
    for part, members in _PARTS.items():
        mine = order[np.isin(labels["person"][order], list(members))]
        splits[part] = {"image": images[mine]}
        splits[part] |= {k: v[mine] for k, v in labels.items() if k != "person"}
    return splits


def _mixed(images: np.ndarray, labels: Split, rng: np.random.Generator):
    people = rng.permutation(PERSONS)
    strange = {
        part: np.isin(labels["person"], people[who])
        for part, who in (("test", slice(4)), ("val", slice(4, 7)))
    }
    known = np.flatnonzero(~(strange["test"] | strange["val"]))
    known = rng.permutation(known)
    held = {"test": known[:60], "val": known[60:120], "train": known[120:]}
    number = np.full(PERSONS, MISSING, np.int32)
    number[np.sort(people[7:])] = np.arange(13)
    splits = {}
    for part in SPLITS:
        new = np.flatnonzero(strange[part]) if part in strange else held[part][:0]
        rows = np.concatenate([new, held[part]])
        taken = {k: v[rows] for k, v in labels.items()}
        taken["person"] = number[taken["person"]]
        if part in strange:
            for k in ("pose", "expression", "sunglasses"):
                taken[k][len(new) :] = MISSING
        splits[part] = {"image": images[rows], **taken}
    return splits
