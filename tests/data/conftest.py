"""Where the real files are, and a small made-up set in the same layout."""

import os
import pathlib

import numpy as np
import pytest

from mtljax.data import write_idx

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def real_data_dir() -> pathlib.Path:
    """The folder of real data sets, or a skip that says how to name one."""
    default = ROOT.parent / "shared" / "data"
    path = pathlib.Path(os.environ.get("MTLJAX_DATA_DIR", default))
    if not path.is_dir():
        pytest.skip("no real data sets: set MTLJAX_DATA_DIR to the folder of mnist/")
    return path


@pytest.fixture(scope="session")
def fake_data_dir(tmp_path_factory) -> pathlib.Path:
    """``mnist/`` as IDX files and ``fashion_mnist/`` as npz, filled with noise."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("mnist", "fashion_mnist"):
        (root / name).mkdir()
        for part, count in (("train", 240), ("test", 50)):
            shape = (count, 28, 28)
            arrays[name, "x", part] = rng.integers(1, 256, shape, dtype=np.uint8)
            labels = np.arange(count, dtype=np.uint8) % 10
            arrays[name, "y", part] = rng.permutation(labels)
    for part, prefix, suffix in (("train", "train", ".gz"), ("test", "t10k", "")):
        folder = root / "mnist"
        images, labels = arrays["mnist", "x", part], arrays["mnist", "y", part]
        write_idx(folder / f"{prefix}-images-idx3-ubyte{suffix}", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{suffix}", labels)
    np.savez(
        root / "fashion_mnist" / "fashion_mnist_subset.npz",
        **{
            f"{kind}_{part}": arrays["fashion_mnist", kind, part]
            for kind in "xy"
            for part in ("train", "test")
        },
    )
    return root


@pytest.fixture
def mock_catalogue(monkeypatch):
    """The catalogue of tensorflow-datasets with 60 random rows per split."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.data_sources import base

    # The mock of 4.9.10 forgets to bind its batched read: read row by row.
    monkeypatch.setattr(
        base.BaseDataSource, "__getitems__", lambda self, keys: [self[k] for k in keys]
    )
    with tfds.testing.mock_data(num_examples=60):
        yield
