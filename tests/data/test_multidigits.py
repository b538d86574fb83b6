"""multidigits: pinned bytes, disjoint sources, right labels, made in a moment."""

import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mtljax.data import DataError, checksum, load

PINNED = "9b0bdaeb23700b392287c7f5ab77d3f0e7b7b0fbb70f149cf528db9a6f9545f0"
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def digits():
    return load("multidigits")


def test_bytes_are_pinned(digits):
    assert checksum(digits) == PINNED


def test_built_in_a_moment(digits):  # the fixture has paid for importing sklearn
    begin = time.process_time()
    load("multidigits", seed=1)
    assert time.process_time() - begin < 2


def test_shapes_types_and_ranges(digits):
    assert [tuple(task) for task in digits.tasks] == [
        ("left", "classification", 10),
        ("right", "classification", 10),
        ("ink", "regression", 1),
    ]
    for split, size in zip(SPLITS, (6000, 1000, 2000), strict=True):
        arrays = getattr(digits, split)
        assert arrays["image"].shape == (size, 12, 12, 1)
        assert arrays["image"].dtype == np.uint8
        assert arrays["image"].max() == digits.image_max == 16
        for task in ("left", "right"):
            assert arrays[task].shape == (size,)
            assert arrays[task].dtype == np.int32
            assert set(arrays[task]) == set(range(10))
        assert arrays["ink"].shape == (size,)
        assert arrays["ink"].dtype == np.float32


def test_no_source_digit_is_in_two_splits(digits):
    used = {split: set(digits.origin[split]["source"].ravel()) for split in SPLITS}
    assert not used["train"] & used["val"]
    assert not used["train"] & used["test"]
    assert not used["val"] & used["test"]
    other_seed = load("multidigits", seed=5)
    again = {split: set(other_seed.origin[split]["source"].ravel()) for split in SPLITS}
    assert not used["train"] & (again["val"] | again["test"])
    assert not used["test"] & (again["train"] | again["val"])


@pytest.mark.parametrize("split", SPLITS)
def test_canvas_and_targets_follow_from_the_origin(digits, split):
    sources, labels = load_digits().images, load_digits().target
    arrays, origin = getattr(digits, split), digits.origin[split]
    left, right = origin["source"].T
    np.testing.assert_array_equal(arrays["left"], labels[left])
    np.testing.assert_array_equal(arrays["right"], labels[right])
    assert (arrays["left"] != arrays["right"]).all()
    ink = (sources[left].sum((1, 2)) - sources[right].sum((1, 2))) / 16
    np.testing.assert_array_equal(arrays["ink"], ink)
    assert origin["corner"][:, 0].min() == 0
    assert origin["corner"][:, 0].max() == 1
    assert origin["corner"][:, 1].min() == 3
    assert origin["corner"][:, 1].max() == 4
    for i in range(100):
        canvas = np.zeros((12, 12))
        for item, (row, col) in zip(
            origin["source"][i], origin["corner"][i], strict=True
        ):
            window = canvas[row : row + 8, col : col + 8]
            window[:] = np.maximum(window, sources[item])
        np.testing.assert_array_equal(arrays["image"][i, :, :, 0], canvas)


def test_seed_decides_and_a_smaller_set_is_a_prefix(digits):
    small = load("multidigits", train_size=50, val_size=0, test_size=20)
    for split, size in zip(SPLITS, (50, 0, 20), strict=True):
        for key, array in getattr(small, split).items():
            np.testing.assert_array_equal(array, getattr(digits, split)[key][:size])
    assert checksum(load("multidigits", seed=0)) == checksum(digits)
    assert checksum(load("multidigits", seed=1)) != checksum(digits)


def test_every_digit_is_on_the_left_equally_often(digits):
    left = digits.origin["train"]["source"][:, 0]
    assert (np.unique(left, return_counts=True)[1] == 5).all()  # 6000 of 1200


def test_scale_of_the_ink_task_differs_from_a_cross_entropy(digits):
    ink = digits.train["ink"]
    assert abs(ink.mean()) < 0.1
    assert 8 < ink.var() < 11


def test_both_digits_can_be_read_but_not_by_a_linear_model(digits):
    from sklearn.linear_model import RidgeClassifier

    flat = lambda split: split["image"].reshape(len(split["image"]), -1) / 16
    for task in ("left", "right"):
        model = RidgeClassifier().fit(flat(digits.train), digits.train[task])
        assert 0.55 < model.score(flat(digits.test), digits.test[task]) < 0.85


@pytest.mark.parametrize(
    "options", [{"train_size": -1}, {"test_size": -3}, {"seed": -1}]
)
def test_negative_numbers_are_refused(options):
    with pytest.raises(DataError, match=r">= 0, not -"):
        load("multidigits", **options)
