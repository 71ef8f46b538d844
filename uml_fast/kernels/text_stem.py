"""Text tokens: embedding of each id plus its position, written into the pack in one pass.

    out[c] = weight[ids[c]] + position[clamp(position_index[c], 0, P - 1)]

Legend: C rows, V vocabulary, P positions, D width. The tables are fp32 masters, the sum is taken in
fp32 and rounded once to the dtype of the tokens. Traffic: two reads and one write of C * D elements
forward; backward reads the gradient of the tokens once for each table and writes both fp32 tables
whole. Nothing but ids and positions is saved. The gradients are sums of the rows of each id in the
order of the rows, in fp32: the same bits on every run and for any number of threads.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import (
    FLOATING,
    check_contiguous,
    check_floating,
    check_same,
    check_shape,
)
from uml_fast.kernels.index_sum import check_index, index_sum
from uml_fast.kernels.op import differentiable
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "text_stem"


def text_stem_reference(
    ids: Tensor, weight: Tensor, position: Tensor | None, position_index: Tensor | None, *,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Plain torch definition; differentiable, any floating dtypes. Rows of bad ids are NaN."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    inside_C = (ids >= 0) & (ids < len(weight))
    known = ids.clamp(0, max(len(weight) - 1, 0)).long()
    # a vocabulary of none has no row to clamp to
    table = weight if len(weight) else torch.cat((weight, weight.new_zeros(1, weight.shape[1])))
    out_CD = torch.where(inside_C[:, None], F.embedding(known, table).to(wide), float("nan"))
    if position is not None and position_index is not None and len(ids):
        row = position_index.clamp(0, len(position) - 1).long()
        out_CD = out_CD + F.embedding(row, position).to(wide)
    return out_CD.to(_result_dtype(weight, dtype))


def _result_dtype(weight: Tensor, dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else dtype


def _choose(
    backend: Backend, weight: Tensor, position: Tensor | None, dtype: torch.dtype
) -> Choice:
    tables = (weight,) if position is None else (weight, position)
    return choose(NAME, backend, *tables, weight.new_empty(0, dtype=dtype))


def _check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise IndexError for the first id outside 0..vocabulary - 1 of a CPU tensor."""
    if not len(ids):
        return
    low, high = torch.aminmax(ids)
    if low >= 0 and high < vocabulary:
        return
    row = int(((ids < 0) | (ids >= vocabulary)).int().argmax())
    raise IndexError(
        f"{NAME}: ids[{row}] is {int(ids[row])}; the vocabulary has {vocabulary} ids, from 0"
    )


def _fwd(
    choice: Choice, ids: Tensor, weight: Tensor, position: Tensor | None,
    position_index: Tensor | None, dtype: torch.dtype, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Tokens (C, D), in ``out`` where it is given."""
    if choice != "triton" and ids.device.type == "cpu":
        _check_ids(ids, len(weight))
    if choice == "reference":
        tokens = text_stem_reference(ids, weight, position, position_index, dtype=dtype)
        return tokens if out is None else out.copy_(tokens)
    if out is None:
        out = weight.new_empty(len(ids), weight.shape[1], dtype=dtype)
    else:
        torch.autograd.graph.increment_version(out)
    implementation(NAME, choice).fwd(ids, weight, position, position_index, out)
    return out


def _bwd(
    choice: Choice, grad_out: Tensor, ids: Tensor, weight: Tensor, position: Tensor | None,
    position_index: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of weight and position (empty without one)."""
    nothing = weight.new_empty(0)
    if choice == "reference":
        reference = functools.partial(text_stem_reference, dtype=grad_out.dtype)
        if position is None:
            pull = torch.func.vjp(lambda w: reference(ids, w, None, None), weight)[1]
            return pull(grad_out)[0], nothing
        tables = (weight, position)
        pull = torch.func.vjp(lambda w, p: reference(ids, w, p, position_index), *tables)[1]
        grad_weight, grad_position = pull(grad_out)
        return grad_weight, grad_position
    grad_out = grad_out.contiguous()
    grad_weight = implementation(NAME, choice).bwd(grad_out, ids, len(weight)).to(weight.dtype)
    if position is None or position_index is None:
        return grad_weight, nothing
    grad_position = index_sum(grad_out, position_index, len(position), backend=choice)
    return grad_weight, grad_position.to(position.dtype)


@torch.library.custom_op("uml_fast::text_stem_fwd", mutates_args=())
def _fwd_op(
    ids: Tensor, weight: Tensor, position: Tensor | None, position_index: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    choice = _choose("auto", weight, position, dtype)
    return _fwd(choice, ids, weight, position, position_index, dtype)


@_fwd_op.register_fake
def _(ids, weight, position, position_index, dtype):
    return weight.new_empty(ids.shape[0], weight.shape[1], dtype=_result_dtype(weight, dtype))


@torch.library.custom_op("uml_fast::text_stem_bwd", mutates_args=())
def _bwd_op(
    grad_out: Tensor, ids: Tensor, weight: Tensor, position: Tensor | None,
    position_index: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    choice = _choose("auto", weight, position, grad_out.dtype)
    return _bwd(choice, grad_out, ids, weight, position, position_index)


@_bwd_op.register_fake
def _(grad_out, ids, weight, position, position_index):
    none = weight.new_empty(0)
    return weight.new_empty(weight.shape), none if position is None else torch.empty_like(position)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ids, weight, position, position_index, *rest = inputs
    ctx.save_for_backward(ids, weight, position, position_index)
    ctx.others = len(rest)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    bwd = functools.partial(_bwd, ctx.choice) if ctx.choice else _bwd_op
    grad_weight, grad_position = bwd(grad_out, *saved)
    has_position = saved[2] is not None
    return None, grad_weight, grad_position if has_position else None, None, *[None] * ctx.others


_apply = differentiable("TextStem", _fwd, _fwd_op, _setup, _backward)


def _check(
    ids: Tensor, weight: Tensor, position: Tensor | None, position_index: Tensor | None,
    dtype: torch.dtype, out: Tensor | None,
) -> None:  # fmt: skip
    if ids.dtype != torch.int32:
        raise TypeError(f"{NAME}: ids are {ids.dtype}; they must be int32")
    if ids.ndim != 1:
        raise ValueError(f"{NAME}: ids are {list(ids.shape)}; they must be [rows]")
    check_floating(NAME, weight=weight)
    if weight.ndim != 2:
        raise ValueError(f"{NAME}: weight is {list(weight.shape)}; it must be [vocabulary, width]")
    tensors = {"ids": ids, "weight": weight}
    if (position is None) != (position_index is None):
        raise ValueError(f"{NAME}: position and position_index must be given together")
    if position is not None and position_index is not None:
        check_floating(NAME, position=position)
        check_shape(NAME, "position", position, (*position.shape[:1], weight.shape[1]))
        if len(ids) and not len(position):
            raise ValueError(f"{NAME}: position is {list(position.shape)}; it needs a row")
        check_index(NAME, "position_index", position_index, len(ids))
        tensors |= {"position": position, "position_index": position_index}
    if dtype not in FLOATING:
        raise TypeError(f"{NAME}: dtype is {dtype}; it must be a floating one")
    if out is not None:
        if out.dtype != _result_dtype(weight, dtype):
            raise TypeError(f"{NAME}: out is {out.dtype}; it must be {dtype}")
        if out.requires_grad:
            raise ValueError(f"{NAME}: out requires a gradient; it must be a plain buffer")
        check_shape(NAME, "out", out, (len(ids), weight.shape[1]))
        tensors["out"] = out
    check_same(NAME, "device", **tensors)
    check_contiguous(NAME, **tensors)


def text_stem(
    ids: Tensor, weight: Tensor, position: Tensor | None = None,
    position_index: Tensor | None = None, *, dtype: torch.dtype, out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """``weight[ids] + position[position_index]`` as backbone tokens.

    Ids outside 0..V - 1 raise on the CPU. On CUDA nothing is read back, so such a row becomes NaN,
    which shows in the loss, and has no gradient.

    Args:
        ids: int32 (C,) contiguous.
        weight: (V, D) contiguous embedding table, any floating dtype.
        position: (P, D) contiguous table of positions, or None.
        position_index: int32 (C,) contiguous, given with ``position``; clamped to 0..P - 1, since
            rows of padding may lie beyond the table.
        dtype: of the tokens. Float64 tables give float64 tokens.
        out: (C, D) contiguous tensor of ``dtype``, such as the rows of this modality in the pack,
            that the tokens are written to; eager mode only. The tensor returned shares its memory
            and carries the gradient; ``out`` itself does not.
        backend: for tests.

    Returns:
        (C, D) tokens.

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit; ``out`` inside a compiled
            graph.
        IndexError: an id outside the vocabulary, on the CPU.
    """
    _check(ids, weight, position, position_index, dtype, out)
    if torch.compiler.is_compiling():
        if out is not None:
            raise ValueError(f"{NAME}: out must be None inside a compiled graph")
        tokens: Tensor = _fwd_op(ids, weight, position, position_index, dtype)
    else:
        choice = _choose(backend, weight, position, dtype)
        tokens = _apply(choice, ids, weight, position, position_index, dtype, out)
    return tokens


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    """Ids by Zipf's law, as words are: the first is far more frequent than the last."""
    C, V, D, P = shape["C"], shape["V"], shape["D"], shape["P"]
    uniform = torch.rand(C, generator=generator, dtype=torch.float64)
    ids = ((V + 1.0) ** uniform - 1).int() if "id" not in shape else torch.full((C,), shape["id"])
    tables = torch.randn(V + P, D, generator=generator) * 0.02
    return {
        "ids": ids.int(),
        "weight": tables[:V].clone(),
        "position": tables[V:].clone(),
        "position_index": (torch.arange(C) % (P + 2)).int(),
        "dtype": dtype,
    }


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Two fp32 rows read and one written forward; backward one read a table, both written whole."""
    C, V, D, P = shape["C"], shape["V"], shape["D"], shape["P"]
    return (8.0 + size) * C * D, 2.0 * size * C * D + 4.0 * (V + P) * D


SPEC = KernelSpec(
    name=NAME,
    function=text_stem,
    inputs=_inputs,
    gradients=("weight", "position"),
    tests={
        "no rows": {"C": 0, "V": 5, "D": 8, "P": 3},
        "one row, one column, one id": {"C": 1, "V": 1, "D": 1, "P": 1},
        "exactly one block of columns": {"C": 9, "V": 16, "D": 32, "P": 4},
        "one id alone, more rows than two chunks": {"C": 300, "V": 3, "D": 9, "P": 40, "id": 1},
        "primes, most ids without a row": {"C": 17, "V": 101, "D": 37, "P": 5},
    },
    benches={
        "characters": {"C": 4096, "V": 512, "D": 384, "P": 512},
        "multibench d 64": {"C": 4096, "V": 512, "D": 64, "P": 512},
        "BERT's vocabulary": {"C": 4096, "V": 30522, "D": 384, "P": 512},
        "BERT's vocabulary, d 64": {"C": 4096, "V": 30522, "D": 64, "P": 512},
        "a GPU's pack": {"C": 131072, "V": 30522, "D": 384, "P": 512},
    },
    aot={
        "ViT-S": {"C": 64, "V": 100, "D": 384, "P": 512},
        "multibench d 64": {"C": 64, "V": 100, "D": 64, "P": 512},
        "multibench d 150": {"C": 64, "V": 100, "D": 150, "P": 8},
    },
    flops=lambda s: (2.0 * s["C"] * s["D"], 2.0 * s["C"] * s["D"]),
    bytes=_bytes,
)  # fmt: skip
