"""How pairs are drawn: uniformly, and as a function of the seed alone."""

import numpy as np

from mtljax.data._overlay import Canvas, Items, draw_pairs, permutation, uniform

CANVAS = Canvas(size=6, shift=2, offset=2)


def make_items(pool):
    labels = np.array([2, 0, 1, 1, 2, 2, 0, 2])
    return Items(np.ones((8, 2, 2), np.uint8), labels, np.asarray(pool))


def test_partner_is_uniform_over_the_other_classes():
    items = make_items([7, 0, 1, 2, 3, 6])  # classes 2, 2, 0, 1, 1, 0
    source, _ = draw_pairs(items, items, CANVAS, 60_000, (0, 0))
    counts = np.zeros((8, 8))
    np.add.at(counts, tuple(source.T), 1)
    different = items.labels[:, None] != items.labels[None]
    in_pool = np.isin(np.arange(8), items.pool)
    allowed = different & in_pool[:, None] & in_pool[None]
    assert (counts[~allowed] == 0).all()
    np.testing.assert_allclose(counts[allowed], 2500, rtol=0.1)  # 10,000 / 4 others


def test_partner_from_other_images_is_uniform_over_all():
    first, second = make_items([0, 1]), make_items([4, 5, 6])
    source, _ = draw_pairs(first, second, CANVAS, 30_000, (0, 0))
    assert set(source[:, 0]) == {0, 1}
    values, counts = np.unique(source[:, 1], return_counts=True)
    assert values.tolist() == [4, 5, 6]
    np.testing.assert_allclose(counts, 10_000, rtol=0.1)


def test_corners_are_uniform():
    items = make_items(np.arange(8))
    _, corner = draw_pairs(items, items, CANVAS, 30_000, (0, 0))
    for side, offset in ((0, 0), (1, 2)):
        for axis in range(2):
            values, counts = np.unique(corner[:, side, axis], return_counts=True)
            assert values.tolist() == [offset, offset + 1, offset + 2]
            np.testing.assert_allclose(counts, 10_000, rtol=0.1)


def test_random_numbers_are_frozen():
    assert uniform(3, 1, size=(2,)).tolist() == [
        0.25325307785026463,
        0.40719719128199483,
    ]
    assert permutation(0, size=8).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert sorted(permutation(1, 2, size=100)) == list(range(100))
