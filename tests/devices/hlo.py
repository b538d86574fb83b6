"""Collectives of a compiled program, and the bytes of their results."""

import re
from typing import NamedTuple

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
_LINE = re.compile(rf"= (\([^)]*\)|\S+) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("bf16", "f16", "s16", "u16"), 2),
    **dict.fromkeys(("f32", "s32", "u32"), 4),
    **dict.fromkeys(("f64", "s64", "u64"), 8),
}


class Collective(NamedTuple):
    """One array that a collective returns on every device."""

    kind: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes on one device."""
        count = 1
        for length in self.shape:
            count *= length
        return count * _BYTES[self.dtype]


def collectives(text: str) -> list[Collective]:
    """All collectives in the text of a compiled program; those of a loop count once."""
    found = []
    for line in text.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        arrays = _ARRAY.findall(match[1])
        if match[3]:  # the start of an asynchronous one also names its operands
            arrays = arrays[len(arrays) // 2 :]
        for dtype, shape in arrays:
            lengths = tuple(int(n) for n in shape.split(",") if n)
            found.append(Collective(match[2], dtype, lengths))
    return found


def total(text: str) -> dict[str, int]:
    """Bytes of results per kind of collective; a kind that is absent has 0."""
    sums = dict.fromkeys(KINDS, 0)
    for one in collectives(text):
        sums[one.kind] += one.size
    return sums
