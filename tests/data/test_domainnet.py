"""DomainNet through tensorflow-datasets, on a generated miniature of its files."""

import contextlib
import io

import numpy as np
import pytest

from mtljax.data import DataError, MissingDataError
from mtljax.data._domainnet import DOMAINS, domainnet, square

RNG = np.random.default_rng(0)


def picture(label, height, width):
    """Its left third tells the label, its upper third the size."""
    image = RNG.integers(0, 8, (height, width, 3)).astype(np.uint8)
    image[:, :, 0] += np.uint8(label % 200)
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two domains of images of several sizes, laid out like the catalogue's."""
    import tensorflow_datasets as tfds
    from PIL import Image

    root = tmp_path_factory.mktemp("tfds")

    def rows(count, first):
        for i in range(count):
            label = (first + 7 * i) % 345
            image = Image.fromarray(picture(label, 20 + i % 5, 30 - i % 9))
            yield i, {"image": image, "label": label}

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = tuple(
            tfds.core.BuilderConfig(name=name) for name in ("real", "sketch")
        )

        def _info(self):
            features = {
                "image": tfds.features.Image(encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=345),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": rows(40, 0), "test": rows(12, 3)}

        def _generate_examples(self):
            raise NotImplementedError  # the splits above are generators already

    Builder.name = "domainnet"
    for config in ("real", "sketch"):
        builder = Builder(config=config, data_dir=str(root), file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    return root


def test_images_become_squares_and_keep_their_labels(folder):
    found = domainnet(data_dir=folder, domain="sketch", size=8, val_size=10)
    sizes = {"train": 30, "val": 10, "test": 12}
    for part, count in sizes.items():
        split, source = getattr(found, part), found.origin[part]["source"]
        assert split["image"].shape == (count, 8, 8, 3)
        assert split["image"].dtype == np.uint8
        assert split["label"].dtype == np.int32
        first = 3 if part == "test" else 0
        np.testing.assert_array_equal(split["label"], (first + 7 * source) % 345)
        red = split["image"][..., 0].mean((1, 2))
        np.testing.assert_allclose(red, split["label"] % 200 + 3.5, atol=2)
    both = np.concatenate([found.origin[part]["source"] for part in ("train", "val")])
    np.testing.assert_array_equal(np.sort(both), np.arange(40))
    assert found.input_shape == (8, 8, 3)
    assert found.tasks[0].size == 345


def test_a_smaller_set_is_a_prefix_and_test_a_subset(folder):
    options = {"data_dir": folder, "size": 4, "val_size": 5}
    large = domainnet(**options)
    small = domainnet(**options, train_size=6, test_size=4)
    np.testing.assert_array_equal(small.train["image"], large.train["image"][:6])
    np.testing.assert_array_equal(small.val["label"], large.val["label"])
    rows = small.origin["test"]["source"]
    assert len(rows) == 4
    np.testing.assert_array_equal(small.test["label"], large.test["label"][rows])
    other = domainnet(**options, seed=1)
    assert (other.train["label"] != large.train["label"]).any()


def test_the_middle_is_kept_and_shrinking_averages():
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 200  # the middle third
    np.testing.assert_array_equal(square(image, 8), np.full((8, 8, 3), 200))
    np.testing.assert_array_equal(square(image, 2), np.full((2, 2, 3), 200))
    tall = np.swapaxes(image, 0, 1)
    np.testing.assert_array_equal(square(tall, 4), np.full((4, 4, 3), 200))
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    np.testing.assert_allclose(square(stripes, 4), 100, atol=10)


@pytest.mark.usefixtures("as_users")
def test_errors(folder, tmp_path):
    with pytest.raises(DataError, match="no domain 'photo'; it has clipart"):
        domainnet(domain="photo")
    with pytest.raises(DataError, match="positive number of pixels, not 0"):
        domainnet(data_dir=folder, size=0)
    with pytest.raises(MissingDataError, match=r"no domainnet/clipart.*--data-dir DIR"):
        domainnet(data_dir=folder, domain="clipart")
    with pytest.raises(MissingDataError, match="pass --data-dir DIR"):
        domainnet(data_dir=tmp_path)
    with pytest.raises(DataError, match="12 examples for test; test_size=13"):
        domainnet(data_dir=folder, val_size=0, test_size=13)
    with pytest.raises(DataError, match="has 40 examples"):
        domainnet(data_dir=folder, val_size=30, train_size=11)


def test_the_catalogue_knows_the_domains():
    import tensorflow_datasets as tfds

    configs = tfds.builder_cls("domainnet").BUILDER_CONFIGS
    assert sorted(config.name for config in configs) == list(DOMAINS)
