"""digit_domains: the ten digits from five sources."""

import os
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from mtljax.data import _overlay, _tables, files
from mtljax.data.types import SPLITS, DataError, Dataset, MissingDataError, Split, Task


class _Domain(NamedTuple):
    """File and split sizes of a domain."""

    file: str
    official: bool  # whether it has an official test part
    peak: int  # value of full ink
    val: int  # default number of validation examples
    test: int  # default number of test examples, 0 for the whole official part


_DOMAINS = {
    "mnist": _Domain("", True, 255, 1000, 0),
    "usps": _Domain("usps.npz", True, 255, 500, 0),
    "mnist_m": _Domain("mnist_m_3k.npz", False, 255, 500, 1000),
    "optdigits": _Domain("optdigits.npz", True, 16, 500, 0),
    "semeion": _Domain("semeion.npz", False, 1, 200, 400),
}
DOMAINS = tuple(_DOMAINS)

_MNIST_M_DIGITS = 3000  # first test digits of MNIST, which mnist_m contains


def digit_domains(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    domain: str = "usps",
    size: int = 16,
    seed: int = 0,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
) -> Dataset:
    """Loads one of five sets of handwritten digits in a common shape.

    ========= ============ ====== ===== ==================================
    domain    pixels       train  test  description
    ========= ============ ====== ===== ==================================
    mnist     28 x 28      60000  7000  census forms and pupils, grey
    usps      16 x 16      7291   2007  envelopes, grey
    mnist_m   32 x 32 x 3  2000   1000  MNIST digits on photographs
    optdigits 8 x 8        3823   1797  forms, ink counted in 4 x 4 blocks
    semeion   16 x 16      1193   400   about 80 people, black and white
    ========= ============ ====== ===== ==================================

    Images are resized by integrating over the area of each new pixel, repeated to three
    channels, and scaled to 0..255. Official test parts are kept. The validation split
    is taken from the examples in the column train. Sets without an official test part
    (mnist_m, semeion) are divided by one shuffle.

    This copy of ``mnist_m`` contains the first 3000 digits of the MNIST test part. They
    are excluded from the test split of ``mnist``. No training digit of a domain is
    therefore a test digit of another domain.

    Args:
      data_dir: Folder that contains one folder per domain: ``mnist/`` with the MNIST
        files, ``usps/usps.npz``, ``mnist_m/mnist_m_3k.npz``,
        ``optdigits/optdigits.npz`` and ``semeion/semeion.npz``.
      domain: One of ``mnist``, ``usps``, ``mnist_m``, ``optdigits``, ``semeion``.
      size: Side of the images, in pixels.
      seed: Seed of the shuffle that divides the examples.
      train_size: Number of training examples. None takes all remaining examples. A
        smaller set is a prefix of a larger one.
      val_size: Number of validation examples. None is 1000, 500, 500, 500 or 200, in
        this order of domains.
      test_size: Number of test examples. None is the number in the table.

    Returns:
      A :class:`Dataset` with images ``[N, size, size, 3]`` uint8 and the int32 task
      ``digit`` of 10 classes. ``origin[split]["source"]`` ``[N]`` are positions in the
      file, counted over the official parts in sequence.

    Raises:
      MissingDataError: If files do not exist.
      DataError: If the domain is unknown, a file is damaged, or a size is too large.

    Examples:
      >>> from mtljax.data import load
      >>> load("digit_domains", domain="semeion")
      Traceback (most recent call last):
        ...
      mtljax.data.types.MissingDataError: The semeion files are needed: ...

    References:
      LeCun et al., `Gradient-Based Learning Applied to Document Recognition
      <https://doi.org/10.1109/5.726791>`_, 1998 (mnist); Hull, `A Database for
      Handwritten Text Recognition Research <https://doi.org/10.1109/34.291440>`_, 1994
      (usps); Ganin et al., `Domain-Adversarial Training of Neural Networks
      <https://arxiv.org/abs/1505.07818>`_, 2016 (mnist_m); `optdigits
      <https://doi.org/10.24432/C50P49>`_ and semeion, UCI, CC BY 4.0.
    """
    if domain not in _DOMAINS:
        raise DataError(
            f"digit_domains has no domain {domain!r}; it has {', '.join(DOMAINS)}."
        )
    if size < 1:
        raise DataError(f"size must be a positive number of pixels, not {size}.")
    spec = _DOMAINS[domain]
    images, labels, official = _read(data_dir, domain, spec)
    val = spec.val if val_size is None else val_size
    name = f"digit_domains/{domain}"
    if spec.official:
        train_count = len(labels) - official
        parts = _tables.split(name, train_count, (train_size, val, 0), seed)
        first = _MNIST_M_DIGITS if domain == "mnist" else 0
        pool = np.arange(train_count + min(first, official), len(labels))
        parts["test"] = _some(name, pool, test_size, seed)
    else:
        test = spec.test if test_size is None else test_size
        parts = _tables.split(name, len(labels), (train_size, val, test), seed)

    def arrays(rows: np.ndarray) -> Split:
        return {
            "image": to_canvas(images[rows], size, spec.peak),
            "digit": labels[rows],
        }

    return Dataset(
        name="digit_domains",
        tasks=(Task("digit", "classification", 10),),
        input_shape=(size, size, 3),
        origin={part: {"source": parts[part]} for part in SPLITS},
        notes=f"domain {domain}",
        train=arrays(parts["train"]),
        val=arrays(parts["val"]),
        test=arrays(parts["test"]),
    )


def _read(
    data_dir: str | os.PathLike[str] | None, domain: str, spec: _Domain
) -> tuple[np.ndarray, np.ndarray, int]:
    """Returns images, labels, and the length of the official test part at the end."""
    if domain == "mnist":
        if data_dir is None:
            raise MissingDataError(
                "The mnist files are needed: pass --data-dir DIR with DIR/mnist/"
                "train-images-idx3-ubyte.gz and the 3 other IDX files."
            )
        parts = files.read_images(data_dir, domain)
        pairs = [parts[:2], parts[2:]]
    else:
        axes = ("height", "width", *([3] if domain == "mnist_m" else []))
        fields = files.image_fields(*axes, official=spec.official)
        found = list(_tables.read_npz(data_dir, domain, spec.file, fields).values())
        pairs = [(found[i], found[i + 1]) for i in range(0, len(found), 2)]
    images = np.concatenate([pair[0] for pair in pairs])
    labels = np.concatenate([pair[1] for pair in pairs]).astype(np.int32)
    return images, labels, len(pairs[1][1]) if spec.official else 0


def _some(name: str, pool: np.ndarray, size: int | None, seed: int) -> np.ndarray:
    """Returns a whole official part in order, or a shuffled subset of it."""
    if size is None:
        return pool
    if not 0 <= size <= len(pool):
        raise DataError(
            f"{name} has {len(pool)} examples for test; test_size={size} does not fit."
        )
    return np.sort(pool[_overlay.permutation(seed, 1, size=len(pool))[:size]])


def to_canvas(
    images: np.ndarray, size: int, peak: int
) -> UInt8[np.ndarray, "n size size 3"]:
    """Converts images ``[N, H, W]`` or ``[N, H, W, 3]`` to ``[N, size, size, 3]``."""
    if images.ndim == 3:
        images = images[..., None]
    rows, columns = (_area(n, size) for n in images.shape[1:3])
    scaled = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for start in range(0, len(images), 4096):  # limits the memory for float64
        block = images[start : start + 4096] * (255.0 / peak)
        block = np.einsum("ih,jw,nhwc->nijc", rows, columns, block, optimize=True)
        scaled[start : start + 4096] = np.rint(block)
    return np.broadcast_to(scaled, (*scaled.shape[:3], 3)).copy()


def _area(old: int, new: int) -> np.ndarray:
    """Returns ``[new, old]``, the share of each old pixel in each new one."""
    edges_old = np.arange(old + 1) / old
    edges_new = np.arange(new + 1) / new
    low = np.maximum(edges_new[:-1, None], edges_old[None, :-1])
    high = np.minimum(edges_new[1:, None], edges_old[None, 1:])
    return np.maximum(high - low, 0) * new
