"""Feature rows to tokens: ``tokens = standardise(rows) weight^T + bias + position``.

Legend: C rows, F features, D width, P positions. fp32 rows are standardised per feature, rows that
are not valid give zeros whatever they hold, and features are rounded once to the working dtype;
sums, bias and position are fp32. A feature of a valid row that is not finite makes its tokens so.
Bytes forward 4 C F + C D size + D F size, FLOPs 2 C F D; backward reads the rows and the gradient.
Saved: the rows and parameters, nothing new.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend
from uml_fast.kernels.checks import check_contiguous, check_same, check_shape
from uml_fast.kernels.linear_stem import (
    check_parameters,
    check_statistics,
    linear_stem,
    tokens_reference,
    wide_dtype,
)
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "feature_stem"


def feature_stem_reference(
    rows: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor | None, deviation: Tensor | None,
    valid: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Plain torch definition; differentiable, any floating dtypes."""
    features = rows.to(wide_dtype(dtype))
    if mean is not None and deviation is not None:
        features = (features - mean) / deviation
    if valid is not None:
        features = torch.where(valid.unsqueeze(1), features, 0.0)
    return tokens_reference(features, weight, bias, position, position_index, dtype)


_stem = linear_stem(
    NAME, "feature", "Tensor? valid", feature_stem_reference, lambda rows, _: rows.shape[0]
)


def feature_stem(
    rows: Tensor, weight: Tensor, bias: Tensor, position: Tensor | None,
    position_index: Tensor | None, mean: Tensor | None, deviation: Tensor | None,
    valid: Tensor | None, *, dtype: torch.dtype, out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Tokens of feature rows.

    Args:
        rows: fp32 (C, F) contiguous.
        weight, bias: (D, F) and (D,), any floating dtype.
        position: (P, D), any floating dtype, or None.
        position_index: int32 (C,) with ``position``, clamped to the table (rows of padding).
        mean, deviation: (F,), used in fp32, or both None: rows are used as they are.
        valid: bool (C,), False where a row's features count as zeros whatever it holds, or None.
        dtype: of the product and tokens, fp32 or bf16 (fp16 on CUDA).
        out: contiguous (C, D) of ``dtype``, such as rows of a pack's tokens: written instead of
            a new tensor. The tensor returned shares its memory and carries the gradient; ``out``
            itself does not. Eager mode only.
        backend: for tests.

    Returns:
        (C, D) of ``dtype``. Weight, bias and position have gradients, in their dtypes.

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit; on the CPU, a deviation
            of zero.
    """
    if rows.dtype not in (torch.float32, wide_dtype(dtype)):
        raise TypeError(f"{NAME}: rows are {rows.dtype}; they must be torch.float32")
    if rows.ndim != 2:
        raise ValueError(f"{NAME}: rows are {list(rows.shape)}; they must be [rows, features]")
    check_contiguous(NAME, rows=rows)
    count, features = rows.shape
    check_parameters(
        NAME, count, features, rows, weight, bias, position, position_index, dtype, out
    )
    if position is not None and position_index is None:
        raise ValueError(f"{NAME}: position is given, but position_index is None")
    if (mean is None) != (deviation is None):
        raise ValueError(f"{NAME}: mean and deviation must both be given, or both None")
    if mean is not None and deviation is not None:
        check_statistics(NAME, rows, mean, deviation, features)
    if valid is not None:
        if valid.dtype != torch.bool:
            raise TypeError(f"{NAME}: valid is {valid.dtype}; it must be bool")
        check_shape(NAME, "valid", valid, (count,))
        check_contiguous(NAME, valid=valid)
        check_same(NAME, "device", rows=rows, valid=valid)
    return _stem(
        backend, rows, weight, bias, position, position_index, mean, deviation, valid, dtype, out
    )


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    C, F, D, P = (shape[k] for k in ("C", "F", "D", "P"))

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    standardise = shape.get("standardise", True)
    rows = normal(C, F) * 3 + 1
    valid = torch.rand(C, generator=generator) < 0.9
    rows[~valid] = float("nan")
    return {
        "rows": rows,
        "weight": normal(D, F) * F**-0.5,
        "bias": normal(D),
        "position": normal(P, D),
        "position_index": torch.randint(P + 1, (C,), generator=generator, dtype=torch.int32),
        "mean": normal(F) if standardise else None,
        "deviation": normal(F).abs() + 0.5 if standardise else None,
        "valid": valid,
        "dtype": dtype,
    }


def _flops(shape: Shape) -> tuple[float, float]:
    product = 2.0 * shape["C"] * shape["F"] * shape["D"]
    return product, product


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Rows and tokens (or their gradient) cross once, the fp32 weight or its gradient once."""
    C, F, D = shape["C"], shape["F"], shape["D"]
    each = 4.0 * C * F + 4.0 * D * F + size * C * D
    return each, each


SPEC = KernelSpec(
    name=NAME,
    function=feature_stem,
    inputs=_inputs,
    gradients=("weight", "bias", "position"),
    tests={
        "no rows": {"C": 0, "F": 5, "D": 8, "P": 2},
        "one row, one position": {"C": 1, "F": 24, "D": 40, "P": 1},
        "primes, as they are": {"C": 31, "F": 37, "D": 13, "P": 7, "standardise": False},
        "one row more than a block, exactly a block of features": {
            "C": 65, "F": 64, "D": 20, "P": 3},
        "many blocks": {"C": 150, "F": 150, "D": 70, "P": 50},
    },
    benches={
        "MOSI vision, d 150": {"C": 4864, "F": 371, "D": 150, "P": 50},
        "MOSI audio, d 150": {"C": 4864, "F": 20, "D": 150, "P": 50},
        "MOSI text, d 150": {"C": 4864, "F": 300, "D": 150, "P": 50},
        "MOSI text, d 40": {"C": 4864, "F": 300, "D": 40, "P": 50},
        "encoder features, d 768": {"C": 65536, "F": 1024, "D": 768, "P": 256},
    },
    aot={
        "MOSI vision, d 150": {"C": 4864, "F": 371, "D": 150, "P": 50},
        "MOSI audio, d 40": {"C": 4864, "F": 20, "D": 40, "P": 50, "standardise": False},
        "encoder features, d 768": {"C": 4096, "F": 1024, "D": 768, "P": 256},
    },
    flops=_flops,
    bytes=_bytes,
)  # fmt: skip
