"""Dropout masks: rate, independence, and a definition that no refactoring may change."""

from __future__ import annotations

import pytest
import torch

from uml_fast.kernels.rng import check_dropout, keep_mask_like, keep_scale, site_key


def mask(key: int, site: int, p: float, shape: tuple[int, ...] = (512, 512)) -> torch.Tensor:
    return keep_mask_like(torch.empty(shape), torch.tensor([key]), site, p)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_keep_rate(p: float) -> None:
    kept = mask(1, 0, p, (1000, 1001)).double()
    # Five standard deviations, over all, over columns of one parity, over one row.
    for part in (kept, kept[:, ::2], kept[:, 1::2], kept[3]):
        assert abs(part.mean().item() - (1 - p)) < 5 * (p * (1 - p) / part.numel()) ** 0.5


def test_scale_keeps_the_expectation() -> None:
    assert keep_scale(0.25) == pytest.approx(4 / 3, rel=1e-12)
    assert keep_scale(0.1) == pytest.approx(1 / 0.9, rel=1e-4)


@pytest.mark.parametrize(
    ("one", "other"),
    [((1, 0), (1, 1)), ((1, 0), (2, 0)), ((1, 0), (1 + 2**32, 0)), ((1, 0), (-1, 0))],
    ids=["site", "step", "high half", "sign"],
)
def test_masks_of_other_keys_are_independent(one: tuple[int, int], other: tuple[int, int]) -> None:
    a, b = mask(*one, 0.5).double() - 0.5, mask(*other, 0.5).double() - 0.5
    correlation = (a * b).mean().item() * 4
    assert abs(correlation) < 5 / a.numel() ** 0.5


def test_neighbours_are_independent() -> None:
    a = mask(9, 4, 0.5).double() - 0.5
    for x, y in [(a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a[:, 2:], a[:, :-2])]:
        assert abs((x * y).mean().item() * 4) < 5 / x.numel() ** 0.5


def test_masks_are_frozen() -> None:
    """A resumed run draws the masks of the run it continues, also with a later version."""
    assert site_key(torch.tensor([5]), 3).item() == 1832488697174800709
    assert mask(5, 3, 0.5, (2, 7)).int().tolist() == [[1, 1, 1, 0, 0, 1, 0], [0, 1, 0, 1, 0, 0, 1]]


def test_rows_far_behind_differ() -> None:
    """Rows whose pair numbers agree in their low 32 bits have other masks."""
    from uml_fast.kernels.rng import keep_mask

    col = torch.arange(256)
    key = torch.tensor([3])
    near, far = (keep_mask(key, 0, torch.tensor(r), col, 256, 0.5) for r in (0, 2**25))
    assert 64 < (near ^ far).sum().item() < 192


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_probability_is_checked(p: float) -> None:
    with pytest.raises(ValueError, match=r"must be in \[0, 1\)"):
        check_dropout("op", p, torch.tensor([1]))


@pytest.mark.parametrize("key", [None, torch.tensor(1), torch.tensor([1], dtype=torch.int32)])
def test_key_is_checked(key: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="needs rng_key"):
        check_dropout("op", 0.1, key)
