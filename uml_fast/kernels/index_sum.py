"""Sums of the rows that share an index: ``out[p] = sum of input[i] where index[i] = p``.

The gradient of a table whose rows were gathered by ``index``; called by the backward passes of the
stems, so it has no gradient of its own. Legend: C rows, K columns, P entries of the table. Input in
the working dtype, sums in fp32 in an order that depends on shapes alone, so the same bits every
time. Indices outside the table are clamped, as the stems do for rows of padding. One read of the
input, one write of the table; on CUDA the input is read once per 64 entries (128 in bf16), so for
vocabularies sort the rows first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, choose, implementation
from uml_fast.kernels.checks import check_contiguous, check_floating, check_same

NAME = "index_sum"


def index_sum_reference(input: Tensor, index: Tensor, size: int) -> Tensor:
    """Plain torch definition; any floating dtype."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    zeros = input.new_zeros(size, input.shape[1], dtype=wide)
    return zeros.index_add_(0, index.clamp(0, size - 1).long(), input.to(wide)) if size else zeros


def check_index(op: str, name: str, index: Tensor, rows: int) -> None:
    """Raise unless ``index`` is contiguous int32 (rows,)."""
    if index.dtype != torch.int32:
        raise TypeError(f"{op}: {name} is {index.dtype}; it must be int32")
    if tuple(index.shape) != (rows,):
        raise ValueError(f"{op}: {name} is {list(index.shape)}; it must be [{rows}], one per row")
    check_contiguous(op, **{name: index})


def index_sum(input: Tensor, index: Tensor, size: int, *, backend: Backend = "auto") -> Tensor:
    """Sum of the rows of each index.

    Args:
        input: (C, K) contiguous, fp32 or bf16.
        index: int32 (C,), clamped to 0 .. size - 1.
        size: entries P of the table.
        backend: which implementation; for tests, and for ops that have chosen theirs.

    Returns:
        fp32 (P, K); zeros where no row has the index.

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit.
    """
    check_floating(NAME, input=input)
    if input.ndim != 2:
        raise ValueError(f"{NAME}: input is {list(input.shape)}; it must be [rows, columns]")
    check_index(NAME, "index", index, len(input))
    check_same(NAME, "device", input=input, index=index)
    check_contiguous(NAME, input=input)
    if size < 0:
        raise ValueError(f"{NAME}: size is {size}; it must be >= 0")
    if size == 0 and len(input):
        raise ValueError(f"{NAME}: {len(input)} rows for a table of size 0; it must be >= 1")
    choice = choose(NAME, backend, input)
    if choice == "reference":
        return index_sum_reference(input, index, size)
    out: Tensor = implementation(NAME, choice).fwd(input, index, size)
    return out
