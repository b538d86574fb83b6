"""The MultiMNIST family, from made-up files, the mock catalogue and the real ones."""

import numpy as np
import pytest

from mtljax.data import (
    DataError,
    MissingDataError,
    checksum,
    load,
    multi_mnist,
    read_images,
)
from mtljax.data.catalogue import read_tfds_images

NAMES = ("multi_mnist", "multi_fashion", "multi_fashion_mnist")
SOURCES = {
    "multi_mnist": ("mnist", "mnist"),
    "multi_fashion": ("fashion_mnist", "fashion_mnist"),
    "multi_fashion_mnist": ("mnist", "fashion_mnist"),
}
SPLITS = ("train", "val", "test")


def check_dataset(dataset, data_dir, examples=40):
    """Repaints canvases one by one from the files and the origin."""
    parts = [read_images(data_dir, name) for name in SOURCES[dataset.name]]
    for split in SPLITS:
        arrays, origin = getattr(dataset, split), dataset.origin[split]
        where = "test" if split == "test" else "train"
        images = [getattr(part, f"{where}_images") for part in parts]
        labels = [getattr(part, f"{where}_labels") for part in parts]
        assert arrays["image"].dtype == np.uint8
        assert arrays["image"].shape[1:] == dataset.input_shape == (36, 36, 1)
        for side, task in enumerate(dataset.tasks):
            expected = labels[side][origin["source"][:, side]]
            np.testing.assert_array_equal(arrays[task.name], expected)
            assert arrays[task.name].dtype == np.int32
            low, high = 4 * side, 4 * side + 4
            corners = origin["corner"][:, side]
            assert (corners.min(), corners.max()) == (low, high)
        for i in range(examples):
            canvas = np.zeros((36, 36), np.uint8)
            for side in range(2):
                row, col = origin["corner"][i, side]
                item = images[side][origin["source"][i, side]]
                window = canvas[row : row + 28, col : col + 28]
                window[:] = np.maximum(window, item)
            np.testing.assert_array_equal(arrays["image"][i, :, :, 0], canvas)


def used(dataset, split, side):
    return set(dataset.origin[split]["source"][:, side])


@pytest.mark.parametrize("name", NAMES)
def test_canvases_and_labels_follow_from_the_files(fake_data_dir, name):
    dataset = load(name, data_dir=fake_data_dir)
    assert [len(getattr(dataset, split)["image"]) for split in SPLITS] == [480, 40, 100]
    check_dataset(dataset, fake_data_dir)


@pytest.mark.parametrize("name", NAMES)
def test_validation_images_never_train(fake_data_dir, name):
    dataset = load(name, data_dir=fake_data_dir)
    assert "220 / 20 / 50" in dataset.notes
    sides = [{0}, {1}] if name == "multi_fashion_mnist" else [{0, 1}]
    for group in sides:  # sides that draw from the same images
        train = set.union(*(used(dataset, "train", side) for side in group))
        val = set.union(*(used(dataset, "val", side) for side in group))
        assert not train & val
        assert all(len(used(dataset, "train", side)) <= 220 for side in group)
        other = load(name, data_dir=fake_data_dir, seed=1)
        assert not train & set.union(*(used(other, "val", side) for side in group))
    assert len(used(dataset, "train", 0)) == 220
    everything = load(name, data_dir=fake_data_dir, val_size=0)
    assert len(used(everything, "train", 0)) == 240


@pytest.mark.parametrize("name", ["multi_mnist", "multi_fashion"])
def test_partner_is_of_another_class(fake_data_dir, name):
    dataset = load(name, data_dir=fake_data_dir)
    for split in SPLITS:
        arrays = getattr(dataset, split)
        assert (arrays["left"] != arrays["right"]).all()


def test_sizes_and_seed(fake_data_dir):
    make = lambda **options: multi_mnist(data_dir=fake_data_dir, **options)
    full, small = make(), make(train_size=7, val_size=3, test_size=5)
    for split, size in zip(SPLITS, (7, 3, 5), strict=True):
        for key, array in getattr(small, split).items():
            np.testing.assert_array_equal(array, getattr(full, split)[key][:size])
    assert checksum(make()) == checksum(full)
    assert checksum(make(seed=1)) != checksum(full)


def test_missing_files_say_what_to_pass(tmp_path):
    with pytest.raises(MissingDataError, match=r"--data-dir DIR with DIR/mnist/train-"):
        load("multi_mnist")
    with pytest.raises(
        FileNotFoundError, match=r"No mnist files below .*--source tfds"
    ):
        load("multi_mnist", data_dir=tmp_path)
    with pytest.raises(MissingDataError, match=r"--download .*DIR/fashion_mnist/"):
        load("multi_fashion", data_dir=tmp_path, source="tfds")


def test_wrong_arguments(fake_data_dir):
    with pytest.raises(DataError, match="works with source='tfds' only"):
        load("multi_mnist", data_dir=fake_data_dir, download=True)


def test_too_few_images_to_hold_any_out(tmp_path):
    (tmp_path / "mnist").mkdir()
    images, labels = np.ones((4, 28, 28), np.uint8), np.array([0, 0, 1, 1])
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "mnist" / "mnist.npz", **arrays)
    assert len(load("multi_mnist", data_dir=tmp_path).train["image"]) == 8
    with pytest.raises(DataError, match="no source images"):
        load("multi_mnist", data_dir=tmp_path, val_size=3)
    arrays["y_train"] = np.zeros(4, int)
    np.savez(tmp_path / "mnist" / "mnist.npz", **arrays)
    with pytest.raises(DataError, match="at least two classes"):
        load("multi_mnist", data_dir=tmp_path)


def test_images_of_another_size(tmp_path):
    (tmp_path / "mnist").mkdir()
    images, labels = np.ones((4, 8, 8), np.uint8), np.array([0, 0, 1, 1])
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "mnist" / "mnist.npz", **arrays)
    with pytest.raises(DataError, match="those of mnist are 8x8"):
        load("multi_mnist", data_dir=tmp_path)


def test_from_the_mock_catalogue(mock_catalogue):
    dataset = load("multi_mnist", source="tfds", train_size=20, test_size=4)
    parts = read_tfds_images("mnist")
    assert dataset.train["image"].shape == (20, 36, 36, 1)
    source, corner = (dataset.origin["train"][key][0] for key in ("source", "corner"))
    assert dataset.train["left"][0] == parts.train_labels[source[0]]
    row = dataset.train["image"][
        0, corner[0, 0], :, 0
    ]  # above the second item or on it
    item = parts.train_images[source[0], 0]
    assert (row[corner[0, 1] : corner[0, 1] + 28] >= item).all()


@pytest.mark.data
@pytest.mark.parametrize("name", NAMES)
def test_real_files(real_data_dir, name):
    dataset = load(
        name, data_dir=real_data_dir, train_size=3000, val_size=500, test_size=500
    )
    check_dataset(dataset, real_data_dir)


@pytest.mark.data
def test_real_sizes_of_the_papers(real_data_dir):
    dataset = load("multi_mnist", data_dir=real_data_dir)
    sizes = [len(getattr(dataset, split)["image"]) for split in SPLITS]
    assert sizes == [120_000, 10_000, 20_000]
    assert "mnist 55000 / 5000 / 10000" in dataset.notes


@pytest.mark.data
def test_real_catalogue_holds_the_same_digits(real_data_dir):
    from mtljax.data import tfds_source

    if not (real_data_dir / "tfds" / "mnist").is_dir():
        pytest.skip("no tfds/mnist below the folder of real data sets")
    rows = tfds_source("mnist", "test[:1000]", data_dir=real_data_dir)
    ours = read_images(real_data_dir, "mnist")
    key = lambda image, label: (image.tobytes(), int(label))
    theirs = [
        key(row["image"], row["label"]) for row in rows.__getitems__(range(len(rows)))
    ]
    pairs = zip(ours.test_images, ours.test_labels, strict=True)
    assert len(rows) == 1000
    assert set(theirs) <= {key(*pair) for pair in pairs}
