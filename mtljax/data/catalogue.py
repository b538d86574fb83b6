"""Access to tensorflow-datasets without TensorFlow (array_record files)."""

import contextlib
import io
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtljax.data.files import ImageParts, check_parts
from mtljax.data.types import SPLITS, DataError, Dataset, MissingDataError, Split
from mtljax.extras import require

_BLOCK = 4096  # rows read at once


def tfds_source(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = False,
) -> Any:
    """Opens a prepared data set of tensorflow-datasets for random access.

    TensorFlow is not imported. Preparing an absent set (``download=True``) needs the
    network and, for most image sets, TensorFlow. The prepared files can be copied to a
    machine without network and TensorFlow.

    Args:
      name: Name in the catalogue, or of a set that :func:`save_tfds` wrote.
      split: Split such as ``"train"``, ``"train[:10%]"`` or ``"train+test"``.
      data_dir: Folder of tensorflow-datasets, or a folder that contains it as
        ``tfds/``. None is its default, ``~/tensorflow_datasets``.
      download: Whether to download and prepare the set if it is absent.

    Returns:
      A source with ``len``, ``[i]`` and ``__getitems__``, for
      :func:`mtljax.data.stream`.

    Raises:
      MissingDataError: If the set is not prepared as array_record in the folder.
      DataError: If the set could not be downloaded and prepared.

    Examples:
      >>> import tensorflow_datasets as tfds
      >>> from mtljax.data import tfds_source
      >>> with tfds.testing.mock_data(num_examples=7):
      ...     source = tfds_source("mnist", "train")
      >>> len(source), source[2]["image"].shape
      (7, (28, 28, 1))
    """
    require("mtljax.data.tfds_source", "train", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    if data_dir is not None and (pathlib.Path(data_dir) / "tfds").is_dir():
        data_dir = pathlib.Path(data_dir) / "tfds"
    where = "its default folder" if data_dir is None else repr(os.fspath(data_dir))
    prepare = {"file_format": "array_record"}
    try:
        return tfds.data_source(
            name,
            split=split,
            data_dir=None if data_dir is None else os.fspath(data_dir),
            download=download,
            builder_kwargs=prepare if download else None,
        )
    except (ImportError, OSError) as error:
        raise DataError(
            f"tensorflow-datasets could not prepare {name!r} in {where}: {error} "
            "(preparing needs the network and tensorflow-cpu)."
        ) from error
    except (NotImplementedError, KeyError, tfds.core.DatasetNotFoundError) as error:
        if isinstance(error, KeyError) and "is empty" not in str(error):
            raise  # an unknown split of an existing set
        # The message of tensorflow-datasets is misleading if no files exist.
        raise MissingDataError(
            f"tensorflow-datasets has no {name!r} prepared as array_record in {where}: "
            "pass --source tfds --download to fetch it, or --data-dir DIR with "
            f"DIR/{name}/VERSION/*.array_record*."
        ) from error


def read_tfds_images(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, download: bool = False
) -> ImageParts:
    """Reads ``image`` and ``label`` of the train and test splits into memory.

    Args:
      name: ``"mnist"``, ``"fashion_mnist"``, ``"kmnist"`` or a similar set.
      data_dir: See :func:`tfds_source`.
      download: See :func:`tfds_source`.

    Returns:
      The result of :func:`mtljax.data.read_images`, in the order of
      tensorflow-datasets.

    Raises:
      MissingDataError: If the set is absent.
      DataError: If it is not a set of grey images with labels.
    """
    arrays = []
    for split in ("train", "test"):
        rows = tfds_source(name, split, data_dir=data_dir, download=download)
        images, labels = [], []
        for begin in range(0, len(rows), _BLOCK):
            block = rows.__getitems__(range(begin, min(begin + _BLOCK, len(rows))))
            images.append(np.stack([row["image"] for row in block]))
            labels.append(np.array([row["label"] for row in block], np.int32))
        stacked = np.concatenate(images)
        arrays += [stacked[..., 0] if stacked.ndim == 4 else stacked]
        arrays += [np.concatenate(labels)]
    return check_parts(name, *arrays)


def save_tfds(
    dataset: Dataset, data_dir: str | os.PathLike[str], *, version: str = "1.0.0"
) -> pathlib.Path:
    """Writes a data set as array_record files that tensorflow-datasets opens by name.

    Args:
      dataset: The data set. A class label per image becomes a ``ClassLabel`` feature.
        Images, regression targets and label maps become ``Tensor`` features with their
        dtypes. Empty splits are omitted.
      data_dir: Folder of tensorflow-datasets.
      version: Version in the path. An existing set of this version is unchanged.

    Returns:
      The path of the folder, ``data_dir/name/version``.

    Raises:
      ModuleNotFoundError: If tensorflow-datasets is not installed.

    Examples:
      >>> import tempfile
      >>> from mtljax.data import multidigits, save_tfds, tfds_source
      >>> digits = multidigits(train_size=20, val_size=0, test_size=5)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = save_tfds(digits, folder)
      ...     row = tfds_source("multidigits", "train", data_dir=folder)[3]
      >>> bool((row["image"] == digits.train["image"][3]).all())
      True
    """
    require("mtljax.data.save_tfds", "train", "tensorflow_datasets")
    import tensorflow_datasets as tfds

    image_dtype = dataset.train["image"].dtype.type
    features: dict[str, Any] = {
        "image": tfds.features.Tensor(shape=dataset.input_shape, dtype=image_dtype)
    }
    for task in dataset.tasks:
        shape = dataset.train[task.name].shape[1:]
        if task.kind == "classification" and shape == ():
            features[task.name] = tfds.features.ClassLabel(num_classes=task.size)
        else:
            dtype = dataset.train[task.name].dtype.type
            features[task.name] = tfds.features.Tensor(shape=shape, dtype=dtype)

    def rows(split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in range(len(split["image"])):
            yield i, {key: array[i] for key, array in split.items()}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                description=dataset.notes,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            splits = {split: getattr(dataset, split) for split in SPLITS}
            return {key: rows(it) for key, it in splits.items() if len(it["image"])}

        def _generate_examples(self):
            raise NotImplementedError  # the splits above are generators already

    Builder.name = dataset.name
    builder = Builder(data_dir=os.fspath(data_dir), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # suppresses download messages
        builder.download_and_prepare()
    return pathlib.Path(builder.data_dir)
