"""Dropout from a counter: ``out = input * keep / (1 - p)``, keep a function of (rng_key, site, row, column)."""

from __future__ import annotations

from torch import Tensor

from uml_fast.kernels.rng import check_dropout, keep_mask_like, keep_scale


def dropout_reference(input: Tensor, p: float, rng_key: Tensor, site: int) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    return input * keep_mask_like(input, rng_key, site, p) * keep_scale(p)


def dropout(input: Tensor, p: float, rng_key: Tensor | None, site: int) -> Tensor:
    """Dropout of ``input`` (..., n); p = 0 returns ``input``."""
    check_dropout("dropout", p, rng_key)
    if p == 0:
        return input
    return dropout_reference(input, p, rng_key, site)
