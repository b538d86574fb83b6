"""Overlays pairs of images on canvases: pairs, positions and pixels.

All random numbers are uniform doubles of PCG64. Permutations use sorting, and integers
use scaling. The other methods of NumPy generators may change between versions. The
checksum of a data set therefore depends on its seed only. There is no loop per image.
"""

import dataclasses

import numpy as np
from jaxtyping import Int32, Integer, UInt8

from mtljax.data.types import SPLITS, DataError

_BLOCK = 8192  # canvases painted at once


@dataclasses.dataclass(frozen=True)
class Items:
    """Source images of one side of the pair.

    Attributes:
      images: Images ``[N, H, W]``, uint8.
      labels: Labels ``[N]``.
      pool: Indices of the images that this split may use.
    """

    images: UInt8[np.ndarray, "n h w"]
    labels: Integer[np.ndarray, " n"]
    pool: Integer[np.ndarray, " m"]


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Positions of the items.

    Attributes:
      size: Side of the square canvas, in pixels.
      shift: Range of each position, in pixels. The corner of the first item is sampled
        from ``{0..shift}^2``, that of the second from ``{offset..offset+shift}^2``.
      offset: See ``shift``.
    """

    size: int
    shift: int
    offset: int


def uniform(*entropy: int, size: tuple[int, ...]) -> np.ndarray:
    """Returns doubles in [0, 1) that depend on the integers ``entropy`` only."""
    if min(entropy) < 0:
        raise DataError(f"A seed must be an integer >= 0, not {min(entropy)}.")
    bits = np.random.PCG64(np.random.SeedSequence(entropy))
    return np.random.Generator(bits).random(size)


def permutation(*entropy: int, size: int) -> np.ndarray:
    """Returns a permutation of ``range(size)`` that depends on ``entropy`` only."""
    return np.argsort(uniform(*entropy, size=(size,)), kind="stable")


def draw_pairs(
    first: Items, second: Items, canvas: Canvas, size: int, entropy: tuple[int, ...]
) -> tuple[Int32[np.ndarray, "n 2"], Int32[np.ndarray, "n 2 2"]]:
    """Samples the pairs and the positions of both items.

    The first items are whole passes over their pool, each in a new order. The second
    item is uniform over its pool. If both sides use the same images, it is uniform over
    those of another class. The pairs of a smaller ``size`` are the first pairs of a
    larger one.

    Returns:
      Source indices ``[size, 2]`` and corners (row, column) ``[size, 2, 2]``.
    """
    if size and not (len(first.pool) and len(second.pool)):
        raise DataError(f"There are no source images to make {size} examples from.")
    passes = -(-size // max(len(first.pool), 1))
    order = [
        permutation(*entropy, 1 + number, size=len(first.pool))
        for number in range(passes)
    ]
    left = first.pool[np.concatenate([*order, np.zeros(0, int)])[:size]]
    draws = uniform(*entropy, 0, size=(size, 5))

    labels = second.labels[second.pool]
    by_class = second.pool[np.argsort(labels, kind="stable")]
    if first.images is second.images:
        counts = np.bincount(labels, minlength=int(first.labels.max()) + 1)
    else:
        counts = np.zeros(int(first.labels.max()) + 1, int)  # no class to avoid
    own, start = counts[first.labels[left]], (np.cumsum(counts) - counts)
    others = len(second.pool) - own
    if size and others.min() < 1:
        raise DataError("A split needs source images of at least two classes.")
    rank = np.floor(draws[:, 0] * others).astype(int)
    rank += own * (rank >= start[first.labels[left]])  # skip the own class
    source = np.stack([left, by_class[rank]], axis=1).astype(np.int32)

    moves = np.floor(draws[:, 1:] * (canvas.shift + 1)).astype(np.int32)
    corner = moves.reshape(size, 2, 2)
    corner[:, 1] += canvas.offset
    return source, corner


def paint(
    first: Items,
    second: Items,
    canvas: Canvas,
    source: Int32[np.ndarray, "n 2"],
    corner: Int32[np.ndarray, "n 2 2"],
) -> UInt8[np.ndarray, "n size size 1"]:
    """Overlays the pairs by pixel-wise maximum on black canvases."""
    out = np.zeros((len(source), canvas.size, canvas.size, 1), np.uint8)
    sides = (first.images, second.images)
    for begin in range(0, len(source), _BLOCK):
        rows = slice(begin, begin + _BLOCK)
        for side, images in enumerate(sides):
            windows = np.lib.stride_tricks.sliding_window_view(
                out[rows, :, :, 0], images.shape[1:], axis=(1, 2), writeable=True
            )
            where = (
                np.arange(len(windows)),
                corner[rows, side, 0],
                corner[rows, side, 1],
            )
            items = images[source[rows, side]]
            windows[where] = np.maximum(windows[where], items)
    return out


def build_splits(
    pairs: dict[str, tuple[Items, Items]],
    canvas: Canvas,
    sizes: dict[str, int],
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, np.ndarray]]]:
    """Samples and paints each split. Returns images and origins by split."""
    images, origin = {}, {}
    for number, split in enumerate(SPLITS):
        if sizes[split] < 0:
            raise DataError(
                f"{split}_size must be a number of examples >= 0, not {sizes[split]}."
            )
        first, second = pairs[split]
        source, corner = draw_pairs(first, second, canvas, sizes[split], (seed, number))
        images[split] = paint(first, second, canvas, source, corner)
        origin[split] = {"source": source, "corner": corner}
    return images, origin
