"""RMS norm of a residual sum: what is its own; test_add_norm.py has the rest."""

from __future__ import annotations

import pytest
import torch

from uml_fast.kernels.add_rms_norm import add_rms_norm


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("native", marks=pytest.mark.native),
        pytest.param("triton", marks=pytest.mark.triton),
        "reference",
    ],
)
def test_values(backend: str) -> None:
    """The mean is not taken off: 3 and 4 have the mean square 12.5; eps makes it 16."""
    normed, summed = add_rms_norm(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([1.0, 10.0]), 3.5,
        return_sum=True, backend=backend,
    )  # fmt: skip
    assert summed.tolist() == [[3.0, 4.0]]
    torch.testing.assert_close(normed, torch.tensor([[0.75, 10.0]]))
