"""digit_domains: shapes, sizes, splits without overlap, on made-up and real files."""

import numpy as np
import pytest

from mtljax.data import DataError, MissingDataError, load, write_idx
from mtljax.data._digit_domains import DOMAINS, to_canvas

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small files in the layout of the real ones; a pixel tells images apart."""
    root = tmp_path_factory.mktemp("data")
    for name in DOMAINS:
        (root / name).mkdir()
    digits = lambda n: (np.arange(n) % 10).astype(np.uint8)
    images = lambda n, *shape, high=256: RNG.integers(0, high, (n, *shape), np.uint8)
    for part, count in (("train", 1100), ("t10k", 3040)):
        write_idx(root / f"mnist/{part}-images-idx3-ubyte", images(count, 28, 28))
        write_idx(root / f"mnist/{part}-labels-idx1-ubyte", digits(count))
    for name, side, high in (("usps", 16, 256), ("optdigits", 8, 17)):
        np.savez(
            root / name / f"{name}.npz",
            x_train=images(600, side, side, high=high),
            y_train=digits(600),
            x_test=images(70, side, side, high=high),
            y_test=digits(70),
        )
    np.savez(root / "mnist_m/mnist_m_3k.npz", x=images(1600, 32, 32, 3), y=digits(1600))
    np.savez(root / "semeion/semeion.npz", x=images(700, 16, 16, high=2), y=digits(700))
    return root


@pytest.mark.parametrize(
    ("domain", "sizes"),
    [
        ("mnist", (100, 1000, 40)),
        ("usps", (100, 500, 70)),
        ("mnist_m", (100, 500, 1000)),
        ("optdigits", (100, 500, 70)),
        ("semeion", (100, 200, 400)),
    ],
)
def test_one_shape_for_all(folder, domain, sizes):
    found = load("digit_domains", data_dir=folder, domain=domain)
    assert found.input_shape == (16, 16, 3)
    assert [task.name for task in found.tasks] == ["digit"]
    sources = []
    for part, size in zip(("train", "val", "test"), sizes, strict=True):
        split = getattr(found, part)
        assert split["image"].shape == (size, 16, 16, 3)
        assert split["image"].dtype == np.uint8
        assert split["digit"].dtype == np.int32
        sources.append(found.origin[part]["source"])
        # Labels follow their images: they were 0, 1, 2, ... in each part.
        start = {"mnist": 1100, "usps": 600, "optdigits": 600}.get(domain, 10)
        expected = np.where(
            sources[-1] >= start, (sources[-1] - start) % 10, sources[-1] % 10
        )
        np.testing.assert_array_equal(split["digit"], expected)
    every = np.concatenate(sources)
    assert len(np.unique(every)) == len(every)
    if domain == "mnist":  # without the digits that mnist_m shows again
        assert sources[2].min() == 1100 + 3000
    elif domain in ("usps", "optdigits"):
        assert sources[2].min() == 600
        assert max(s.max() for s in sources[:2]) < 600


def test_sizes_and_seeds(folder):
    options = {"data_dir": folder, "domain": "usps"}
    small = load("digit_domains", **options, train_size=10, val_size=5, test_size=20)
    large = load("digit_domains", **options, train_size=30, val_size=5)
    np.testing.assert_array_equal(small.train["image"], large.train["image"][:10])
    assert len(small.val["digit"]) == 5
    assert set(small.origin["test"]["source"]) < set(large.origin["test"]["source"])
    other = load("digit_domains", **options, train_size=10, seed=1)
    assert (other.origin["train"]["source"] != small.origin["train"]["source"]).any()
    tiny = load("digit_domains", **options, size=8)
    assert tiny.train["image"].shape[1:] == (8, 8, 3)


def test_pixels_are_integrated():
    checks = np.array([[0, 16], [8, 0]], np.uint8)[None]
    doubled = to_canvas(checks, 4, peak=16)[0, ..., 0]
    expected = np.kron(np.array([[0, 255], [127.5, 0]]), np.ones((2, 2)))
    np.testing.assert_array_equal(doubled, np.rint(expected))
    np.testing.assert_array_equal(to_canvas(checks, 1, peak=16)[0, 0, 0], [96] * 3)
    # 28 to 16 pixels: the mean ink is the same.
    image = RNG.integers(0, 256, (3, 28, 28), np.uint8)
    found = to_canvas(image, 16, 255)
    np.testing.assert_allclose(found[..., 0].mean((1, 2)), image.mean((1, 2)), atol=0.5)
    rows = np.zeros((1, 4, 4), np.uint8)
    rows[0, 1] = 255
    # Four rows on three: the second reaches from 0.25 to 0.5.
    np.testing.assert_array_equal(to_canvas(rows, 3, 255)[0, :, 0, 0], [64, 128, 0])
    # Colours stay.
    colour = RNG.integers(0, 256, (2, 32, 32, 3), np.uint8)
    halves = colour.reshape(2, 16, 2, 16, 2, 3).mean((2, 4))
    np.testing.assert_allclose(to_canvas(colour, 16, 255), halves, atol=0.5)


def test_errors(folder, tmp_path):
    with pytest.raises(DataError, match=r"no domain 'svhn'; it has mnist, usps, "):
        load("digit_domains", data_dir=folder, domain="svhn")
    for domain, file in (("mnist", "train-images"), ("semeion", r"semeion\.npz")):
        with pytest.raises(MissingDataError, match=f"DIR/{domain}/{file}"):
            load("digit_domains", domain=domain)
        with pytest.raises(MissingDataError, match=f"DIR/{domain}/{file}"):
            load("digit_domains", data_dir=tmp_path, domain=domain)
    with pytest.raises(DataError, match=r"digit_domains/usps has 600 examples"):
        load("digit_domains", data_dir=folder, domain="usps", train_size=200)
    with pytest.raises(DataError, match="70 examples for test; test_size=71"):
        load("digit_domains", data_dir=folder, domain="usps", test_size=71)
    with pytest.raises(DataError, match="size must be a positive number"):
        load("digit_domains", data_dir=folder, domain="usps", size=0)
    (tmp_path / "semeion").mkdir()
    wrong = tmp_path / "semeion" / "semeion.npz"
    np.savez(wrong, x=np.zeros((3, 16, 16), np.uint8), y=np.array([1, 2]))
    with pytest.raises(DataError, match=r"array 'y' has shape \[2\], not \[3\]"):
        load("digit_domains", data_dir=tmp_path, domain="semeion")


@pytest.mark.data
@pytest.mark.parametrize("domain", DOMAINS)
def test_real_files(real_data_dir, domain):
    found = load("digit_domains", data_dir=real_data_dir, domain=domain)
    train = len(found.train["digit"]) + len(found.val["digit"])
    total = {"mnist": 60000, "usps": 7291, "mnist_m": 2000}
    total |= {"optdigits": 3823, "semeion": 1193}
    assert train == total[domain]
    tests = {"mnist": 7000, "usps": 2007, "mnist_m": 1000}
    assert (
        len(found.test["digit"])
        == (tests | {"optdigits": 1797, "semeion": 400})[domain]
    )
    # Ink is bright, the ground dark (mnist_m has any colour); classes are even.
    image = found.train["image"][:1000]
    if domain != "mnist_m":
        assert np.median(image) < 64
        np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert image.max() > 240
    assert np.bincount(found.test["digit"], minlength=10).min() > 20
