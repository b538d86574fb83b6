"""mulan_mtr: splits, scales and names, on a made-up table."""

import numpy as np
import pytest

from mtljax.data import DataError, MissingDataError, load
from mtljax.data._mulan import SUBSETS, task_names

RNG = np.random.default_rng(0)
X = (5 + 3 * RNG.normal(size=(50, 4))).astype(np.float32)
X[:, 2] = 7.0
Y = (100 * RNG.normal(size=(50, 3))).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    (root / "mulan_mtr").mkdir()
    names = np.array(["SLUMP(cm)", "FLOW (cm)", "FLOW [cm]"])
    np.savez(root / "mulan_mtr" / "slump.npz", x=X, y=Y, y_names=names)
    return root


def test_splits_scales_and_names(folder):
    found = load("mulan_mtr", data_dir=folder, subset="slump")
    names = ["slump_cm", "flow_cm_1", "flow_cm_2"]
    assert [task.name for task in found.tasks] == names
    sizes = {
        part: len(getattr(found, part)["image"]) for part in ("train", "val", "test")
    }
    assert sizes == {"train": 30, "val": 10, "test": 10}
    image = found.train["image"]
    assert image.shape == (30, 4, 1, 1)
    np.testing.assert_allclose(image.mean(0).ravel(), 0, atol=1e-6)
    np.testing.assert_allclose(image.std(0).ravel(), [1, 1, 0, 1], atol=1e-5)
    statistics = found.origin["targets"]
    for i, name in enumerate(names):
        parts = [getattr(found, part)[name] for part in ("train", "val", "test")]
        values = np.concatenate(parts) * statistics["std"][i] + statistics["mean"][i]
        np.testing.assert_allclose(np.sort(values), np.sort(Y[:, i]), rtol=1e-4)
        np.testing.assert_allclose(parts[0].std(), 1, rtol=1e-5)


def test_names_are_keys():
    assert task_names(np.array(["???", "A b", "a-b"])) == ["y", "a_b_1", "a_b_2"]


def test_errors(folder):
    with pytest.raises(DataError, match=r"no subset 'osales'; it has andro"):
        load("mulan_mtr", data_dir=folder, subset="osales")
    with pytest.raises(MissingDataError, match=r"DIR/mulan_mtr/jura\.npz"):
        load("mulan_mtr", data_dir=folder, subset="jura")
    with pytest.raises(DataError, match="mulan_mtr/slump has 50 examples"):
        load("mulan_mtr", data_dir=folder, subset="slump", test_size=45)


@pytest.mark.data
@pytest.mark.parametrize("subset", SUBSETS)
def test_real_tables(real_data_dir, subset):
    found = load("mulan_mtr", data_dir=real_data_dir, subset=subset)
    assert 2 <= found.num_tasks <= 16
    for part in ("train", "val", "test"):
        for array in getattr(found, part).values():
            assert np.isfinite(array).all()
