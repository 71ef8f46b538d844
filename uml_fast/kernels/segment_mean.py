"""Mean of the rows of each segment: ``out[s] = mean(input[offsets[s] : offsets[s + 1]])``.

Legend: T rows, S segments, K columns. Input and output in the working dtype, sums in fp32; empty
segments give zeros. One read of the input forward, one write of it backward; nothing but the
offsets is saved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import check_contiguous, check_floating, check_offsets, check_same
from uml_fast.kernels.op import differentiable
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "segment_mean"


def segment_mean_reference(input: Tensor, offsets: Tensor) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    offsets = offsets.long()
    length = offsets[1:] - offsets[:-1]
    rows = torch.arange(input.shape[0], device=input.device)
    segment = torch.searchsorted(offsets[1:], rows, right=True)
    zeros = input.new_zeros(length.shape[0], input.shape[1], dtype=wide)
    total = zeros.index_add(0, segment, input.to(wide))
    return (total / length.clamp(min=1).unsqueeze(1)).to(input.dtype)


def _fwd(choice: Choice, input: Tensor, offsets: Tensor) -> Tensor:
    """Means (S, K)."""
    if choice == "reference":
        return segment_mean_reference(input, offsets)
    out: Tensor = implementation(NAME, choice).fwd(input, offsets)
    return out


def _bwd(choice: Choice, grad_out: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """Gradient of the input (T, K)."""
    if choice != "reference":
        grad: Tensor = implementation(NAME, choice).bwd(grad_out.contiguous(), offsets, rows)
        return grad
    length = (offsets[1:] - offsets[:-1]).long()
    each = grad_out / length.clamp(min=1).unsqueeze(1)
    return each.repeat_interleave(length, 0, output_size=rows)


@torch.library.custom_op("uml_fast::segment_mean_fwd", mutates_args=())
def _fwd_op(input: Tensor, offsets: Tensor) -> Tensor:
    check_offsets(NAME, offsets, len(input))
    return _fwd(choose(NAME, "auto", input), input, offsets)


@_fwd_op.register_fake
def _(input, offsets):
    return input.new_empty(offsets.shape[0] - 1, input.shape[1])


@torch.library.custom_op("uml_fast::segment_mean_bwd", mutates_args=())
def _bwd_op(grad_out: Tensor, offsets: Tensor, rows: int) -> Tensor:
    return _bwd(choose(NAME, "auto", grad_out), grad_out, offsets, rows)


@_bwd_op.register_fake
def _(grad_out, offsets, rows):
    return grad_out.new_empty(rows, grad_out.shape[1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    input, offsets = inputs
    ctx.save_for_backward(offsets)
    ctx.rows = input.shape[0]


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None]:
    arguments: tuple[Any, ...] = (grad_out, ctx.saved_tensors[0], ctx.rows)
    return _bwd(ctx.choice, *arguments) if ctx.choice else _bwd_op(*arguments), None


_apply = differentiable("SegmentMean", _fwd, _fwd_op, _setup, _backward)


def segment_mean(input: Tensor, offsets: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Mean of the rows of each segment.

    Args:
        input: (T, K) contiguous, fp32 or bf16.
        offsets: int32 (S + 1,), first row of each segment, then T; empty segments give zeros.
        backend: for tests.

    Returns:
        (S, K) of the dtype of ``input``.

    Raises:
        TypeError, ValueError: shapes, dtypes, strides or offsets that do not fit.
    """
    check_floating(NAME, input=input)
    if input.ndim != 2:
        raise ValueError(f"{NAME}: input is {list(input.shape)}; it must be [rows, columns]")
    check_contiguous(NAME, input=input)
    check_same(NAME, "device", input=input, offsets=offsets)
    check_offsets(NAME, offsets, len(input))
    if torch.compiler.is_compiling():
        out: Tensor = _fwd_op(input, offsets)
    elif (choice := choose(NAME, backend, input)) != "reference":
        out = _apply(choice, input, offsets)
    else:
        out = segment_mean_reference(input, offsets)
    return out


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    lengths = torch.tensor([0, *shape["lengths"]])
    input = torch.randn(int(lengths.sum()), shape["K"], generator=generator)
    return {"input": input.to(dtype), "offsets": lengths.cumsum(0).int()}


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Both ways all rows once and one row a segment."""
    moved = float(size * shape["K"] * (sum(shape["lengths"]) + len(shape["lengths"])))
    return moved, moved


def _flops(shape: Shape) -> tuple[float, float]:
    return float(sum(shape["lengths"]) * shape["K"]), float(len(shape["lengths"]) * shape["K"])


SPEC = KernelSpec(
    name=NAME,
    function=segment_mean,
    inputs=_inputs,
    gradients=("input",),
    tests={
        "no segments": {"lengths": [], "K": 8},
        "empty segments alone": {"lengths": [0, 0], "K": 8},
        "one row, one column": {"lengths": [1], "K": 1},
        "empty ones at both ends and between, odd columns": {
            "lengths": [0, 3, 0, 7, 1, 0],
            "K": 37,
        },
        "a piece exactly, one row more, two pieces": {"lengths": [64, 65, 1, 128], "K": 16},
        "one block of columns and one more column": {"lengths": [5, 9], "K": 129},
        "many pieces among short ones": {"lengths": [2, 700, 0, 5, 300], "K": 20},
    },
    benches={
        "multibench d 150": {"lengths": [19] * 256, "K": 150},
        "ViT-S": {"lengths": [197] * 332, "K": 384},
        "ragged, to 2048": {"lengths": [1, 30, 77, 197, 512, 2048] * 23, "K": 768},
    },
    aot={
        "short": {"lengths": [30, 34], "K": 384},
        "cut": {"lengths": [30, 98], "K": 150},
    },
    flops=_flops,
    bytes=_bytes,
)
