"""Sets with missing labels, with several kinds of tasks, and census tables."""

import dataclasses

import numpy as np
import pytest
from data import made_up

from mtljax.data import MISSING, SPLITS, DataError, Dataset, Task, load, register


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for file, _, arrays in made_up.npz_sets().values():
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_bytes(made_up.npz_bytes(arrays))
    made_up.write_adult(root / "adult")
    made_up.write_frames(root / "nyuv2_frames")
    return root


def labels_of(found: Dataset) -> np.ndarray:
    """Every label of every split."""
    parts = [getattr(found, part) for part in SPLITS]
    return np.concatenate([p[task.name] for p in parts for task in found.tasks])


def test_missing_assays_are_missing(folder):
    """255 in the file; as an unsigned -1 it would be 255 again."""
    found = load("tox21", data_dir=folder)
    (_, _, arrays) = made_up.npz_sets()["tox21"]
    for part in SPLITS:
        rows = found.origin[part]["source"]
        for i, task in enumerate(found.tasks):
            label = getattr(found, part)[task.name]
            assert label.dtype == np.int32
            in_file = arrays["y"][rows, i].astype(int)
            np.testing.assert_array_equal(label, np.where(in_file == 255, -1, in_file))
    assert set(np.unique(labels_of(found))) == {-1, 0, 1}


@pytest.mark.data
def test_the_real_assays(real_data_dir):
    found = load("tox21", data_dir=real_data_dir)
    values, counts = np.unique(labels_of(found), return_counts=True)
    assert values.tolist() == [-1, 0, 1]
    assert counts[0] == 16_581  # a sixth of 8,006 x 12
    assert counts.sum() == 8006 * 12


def test_folded_bits_are_any_of_those_they_stand_for(folder):
    whole, folded = (load("tox21", data_dir=folder, bits=b) for b in (1024, 128))
    each = whole.train["image"][..., 0, 0].reshape(-1, 8, 128)
    np.testing.assert_array_equal(each.max(1), folded.train["image"][..., 0, 0])
    with pytest.raises(DataError, match="bits must divide 1024, not 100"):
        load("tox21", data_dir=folder, bits=100)


def test_a_void_column_is_refused(folder, tmp_path):
    file, _, arrays = made_up.npz_sets()["tox21"]
    labels = arrays["y"].copy()
    labels[:, 5] = 255
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_bytes(made_up.npz_bytes(arrays | {"y": labels}))
    with pytest.raises(DataError, match="no label in column 5: all 60 are missing"):
        load("tox21", data_dir=tmp_path)
    split = {"image": np.zeros((2, 1, 1, 1)), "a": np.array([MISSING, MISSING])}
    with pytest.raises(DataError, match="train split of 'void' has no label of 'a'"):
        Dataset("void", (Task("a", "classification", 2),), (1, 1, 1), *[split] * 3)


@pytest.mark.parametrize(
    ("kind", "target", "message"),
    [
        ("classification", np.array([0, 2]), "labels from 0 to 2 in 'a'"),
        ("classification", np.array([255, 0]), "labels from 0 to 255 in 'a'"),
        ("classification", np.array([-2, 0]), "-1 for a missing label"),
        ("classification", np.array([0.0, 1]), "as float64; a classification needs"),
        ("regression", np.array([0, 1]), "as int64; a regression needs floats"),
        ("regression", np.array([np.inf, 1]), "infinite targets in 'a'"),
    ],
)
def test_targets_that_are_none(kind, target, message):
    split = {"image": np.zeros((2, 1, 1, 1)), "a": target}
    with pytest.raises(DataError, match=message):
        Dataset("bad", (Task("a", kind, 2),), (1, 1, 1), *[split] * 3)


def test_every_pupil_is_of_one_school(folder):
    found = load("school", data_dir=folder)
    assert found.num_tasks == 139
    total = 0
    for part in SPLITS:
        split, at = getattr(found, part), found.origin[part]["task"]
        known = np.stack([~np.isnan(split[t.name]) for t in found.tasks])
        np.testing.assert_array_equal(known.sum(0), 1)
        np.testing.assert_array_equal(known.argmax(0), at)
        total += len(at)
    assert total == 139 * 8
    rounds, at = found.origin["train"]["rounds"], found.origin["train"]["task"]
    np.testing.assert_array_equal(at[rounds], np.tile(np.arange(139), (4, 1)))
    for column in rounds.T:
        assert len(set(column.tolist())) == len(column)  # each once before again
    y = np.nansum([found.train[t.name] for t in found.tasks], 0)
    np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-5)


@pytest.mark.parametrize("persons", ["apart", "mixed"])
def test_faces_are_judged_on_persons_who_are_not_in_training(folder, persons):
    found = load("cmu_faces", data_dir=folder, persons=persons)
    _, _, arrays = made_up.npz_sets()["cmu_faces"]
    owner = {x.tobytes(): p for x, p in zip(arrays["x"], arrays["person"], strict=True)}
    who = {
        part: np.array([owner[x.tobytes()] for x in getattr(found, part)["image"]])
        for part in SPLITS
    }
    known = set(who["train"].tolist())
    for part in ("val", "test"):
        strange = ~np.isin(who[part], list(known))
        assert (getattr(found, part)["pose"][~strange] == MISSING).all()
        assert (getattr(found, part)["pose"][strange] != MISSING).all()
        if persons == "apart":
            assert strange.all()
        else:
            assert ((getattr(found, part)["person"] == MISSING) == strange).all()
    if persons == "mixed":
        pairs = set(
            zip(who["train"].tolist(), found.train["person"].tolist(), strict=True)
        )
        assert len(pairs) == 13


def test_the_census(folder):
    found = load("adult", data_dir=folder, val_size=20)
    sizes = [len(getattr(found, part)["image"]) for part in SPLITS]
    assert sizes == [100, 20, 60]
    # The made-up rows: income and schooling alternate, so they are opposite.
    train = found.train
    np.testing.assert_array_equal(train["income"], 1 - train["college"])
    ages = train["image"][:, 0, 0, 0]
    np.testing.assert_allclose([ages.mean(), ages.std()], [0, 1], atol=1e-5)
    assert np.isfinite(train["image"]).all()
    smaller = load("adult", data_dir=folder, val_size=20, train_size=30, test_size=5)
    assert len(smaller.test["income"]) == 5
    with pytest.raises(DataError, match="120 records for training"):
        load("adult", data_dir=folder, val_size=120)


@pytest.mark.data
def test_real_sets_have_the_published_sizes(real_data_dir):
    adult = load("adult", data_dir=real_data_dir)
    assert len(adult.test["income"]) == 16_281
    assert abs(adult.train["income"].mean() - 0.241) < 5e-3
    assert abs(adult.train["never_married"].mean() - 0.328) < 5e-3
    labels = {"birds": 19, "emotions": 6, "scene": 6, "yeast": 14}
    for subset, count in labels.items():
        found = load("mulan_multilabel", data_dir=real_data_dir, subset=subset)
        assert found.num_tasks == count
    frames = load("nyuv2_frames", data_dir=real_data_dir)
    depths = [np.nanmax(split["depth"]) for split in (frames.train, frames.test)]
    np.testing.assert_allclose(depths, [5.93, 5.23], atol=5e-3)
    length = np.linalg.norm(frames.train["normal"], axis=-1)
    np.testing.assert_allclose(np.median(length), 1, atol=1e-3)
    scenes = load("camvid", data_dir=real_data_dir)
    assert [len(getattr(scenes, part)["image"]) for part in SPLITS] == [367, 101, 233]
    faces = load("cmu_faces", data_dir=real_data_dir)
    assert sum(len(getattr(faces, part)["image"]) for part in SPLITS) == 624


def test_pixels_without_a_class_are_missing(folder):
    found = load("camvid", data_dir=folder)
    _, _, arrays = made_up.npz_sets()["camvid"]
    missing = found.train["class"] == MISSING
    np.testing.assert_array_equal(missing, arrays["seg_train"] == 11)
    frames = load("nyuv2_frames", data_dir=folder)
    assert (frames.train["class"][:, :5] == MISSING).all()
    assert np.isnan(frames.train["depth"][:, :, :9]).all()
    assert np.isnan(frames.test["normal"]).all()


def test_sets_of_ones_own():
    made = load("multidigits", train_size=4, val_size=2, test_size=2)
    register("of my own", lambda *, seed=0: dataclasses.replace(made, notes=str(seed)))
    assert load("of my own", seed=3, data_dir="nowhere").notes == "3"
    with pytest.raises(DataError, match="cannot be registered as 'tox21'"):
        register("tox21", lambda: made)
    with pytest.raises(DataError, match="No module named 'no_such'"):
        load("no_such:function")
    with pytest.raises(DataError, match="has no attribute 'lod'"):
        load("mtljax.data:lod")
    with pytest.raises(DataError, match="is not a function"):
        load("mtljax.data:SPLITS")
    with pytest.raises(DataError, match="returned a tuple, not a Dataset"):
        load("mtljax.data:available")
