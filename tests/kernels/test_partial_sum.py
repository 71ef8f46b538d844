"""Partial sums of programs: every part counts once, whatever the number of parts and columns."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.triton

# One part, which is the sum; fewer than a tile's least; exactly a tile of parts and one more, two
# tiles and one more; columns: none, one, exactly the columns of a tile and one more, several tiles.
PARTS = [1, 2, 3, 17, 256, 257, 513]
SHAPES = [(0,), (1,), (16,), (17,), (3, 171), (1, 1025)]


@pytest.mark.parametrize("parts", PARTS)
def test_adds_all_parts(parts: int) -> None:
    from uml_fast.kernels.triton.partial_sum import partial_sum

    for shape in SHAPES:
        partial = torch.randint(-999, 999, (parts, *shape)).float()  # sums are exact
        assert torch.equal(partial_sum(partial), partial.sum(0))


def test_no_parts_are_zeros() -> None:
    from uml_fast.kernels.triton.partial_sum import partial_sum

    assert partial_sum(torch.empty(0, 5)).eq(0).all()


@pytest.mark.parametrize(
    ("tiles", "blocks", "parts"), [(1, 1, 1), (1, 1000, 264), (7, 1000, 37), (300, 1000, 1)]
)
def test_splits_fill_the_chip_without_a_rest(tiles: int, blocks: int, parts: int) -> None:
    from uml_fast.kernels.triton.launch import launching
    from uml_fast.kernels.triton.partial_sum import split_count

    with launching(lambda *_: None, 90, 132):
        assert split_count(tiles, blocks) == parts
