"""What devices send to each other, in bytes."""

import pytest
from devices import exchanged, hlo
from devices.harness import make_tests

# Programs are compiled as users compile them: fewer optimisations exchange more.

NORMAL = (
    "gramian-auto-none-model-none",
    "gramian-explicit-none-data-model",
    "gramian-vma",
    "scatter-vma",
    "stacked-tp-auto",
)

test_exchanged = make_tests(exchanged, normal=NORMAL, optimise=True)

PROGRAM = """
  %a = f32[4,256]{1,0} all-reduce(f32[4,256]{1,0} %x), channel_id=1
  %b = (f32[3]{0}, bf16[2,8]{1,0}) all-gather(f32[1]{0} %y, bf16[2,1]{1,0} %z)
  %c = (f32[8]{0}, f32[64]{0}) all-gather-start(f32[8]{0} %w), channel_id=3
  %d = f32[64]{0} all-gather-done((f32[8]{0}, f32[64]{0}) %c)
  %e = f32[] all-reduce(f32[] %s), to_apply=%add
  ROOT %f = f32[2]{0} add(f32[2]{0} %p, f32[2]{0} %q)
"""


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("all-reduce", 4 * 4 * 256 + 4),
        ("all-gather", 4 * 3 + 2 * 16 + 4 * 64),
        ("reduce-scatter", 0),
    ],
)
def test_bytes_of_a_program_by_hand(kind, size):
    assert hlo.total(PROGRAM)[kind] == size
