"""A linear layer and a loss of its output, never holding more than a chunk of that output.

    prediction = hidden @ weight^T + bias;  loss = scale * sum over rows that count of error(row)

Legend: C rows, D columns of hidden, F of the prediction, R rows of a chunk. Row i is scored against
row i + shift of the target; scale is 1 / (rows that count) times what the op adds.

Each chunk is multiplied into one scratch buffer, an *error pass* adds its errors and turns the
prediction into its gradient in place, and both gradients are multiplied from it at once: three
products in the forward pass, none in the backward pass, which multiplies what is there by the
incoming gradient and scale. Gradients are kept without scale until then, so nothing waits for the
count and half precision does not underflow. An op brings its reference and, per backend, ``fwd``
with the error pass; all else is here.

FLOPs 6 C D F. Memory beyond inputs and gradients: in the forward pass the scratch (about
``SCRATCH_BYTES``, or the size of the fp32 weight gradient where that is more), the weight and one
chunk's gradient of it; in the backward pass the gradient of hidden once more, C D elements. Plain
torch holds up to six (C, F) buffers. C 65,536, D 384, F 768 in bf16: 49 MiB, 65 on CUDA, against
911 of plain torch (mean squared error, live tensors, tests/kernels/live_bytes.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.backend import Backend, Choice, choose, implementation
from uml_fast.kernels.checks import check_contiguous, check_floating, check_same, check_shape
from uml_fast.kernels.op import differentiable

SCRATCH_BYTES = {"cpu": 8 << 20, "cuda": 64 << 20}
"""Prediction of a chunk. CPU: a few second-level caches, since oneDNN packs the weight again for
each chunk (16,384 rows, D 384, F 768 in bf16 on one thread: 43 ms with 1 MiB, 38 with 4 to 16, 43
with 64). CUDA: several waves of tiles of the products; not measured."""

ErrorPass = Callable[[Tensor, int], None]
"""``error_pass(product_RF, first_row)``: adds errors, turns the product into its gradient."""

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss, scale (both fp32 scalars), gradients of hidden, weight and bias without scale; the latter
empty where they are not needed."""


def prediction(hidden: Tensor, weight: Tensor, bias: Tensor, rows: int) -> Tensor:
    """Plain linear layer of the first rows in the dtype of hidden, its result in at least fp32."""
    if rows < len(hidden):
        hidden = hidden[:rows]
    out = F.linear(hidden, weight.to(hidden.dtype), bias.to(hidden.dtype))
    return out if out.dtype == torch.float64 else out.float()


def counted(predicts: Tensor, shift: int) -> Tensor:
    """bool (C - shift,) rows that count; the last ``shift`` rows have no target."""
    return predicts[: max(len(predicts) - shift, 0)]


def chunk_rows(rows: int, features: int, width: int, element_bytes: int, device: str) -> int:
    """Rows of a chunk.

    As many as the scratch holds. A wide layer gets more: the gradient of its weight is read and
    written once a chunk, and a scratch of the same size keeps that below the traffic of the chunk.
    Chunks are of even size, a multiple of 64 rows (a tile of any product).
    """
    budget = max(SCRATCH_BYTES.get(device, SCRATCH_BYTES["cuda"]), 4 * features * width)
    most = max(budget // max(features * element_bytes, 1), 64)
    chunks = -(-rows // most)
    return -(-rows // max(chunks, 1) // 64) * 64


def _weight_gradient(grad_RF: Tensor, hidden_RD: Tensor) -> Tensor:
    """grad^T hidden (F, D), fp32 or the working dtype.

    oneDNN multiplies bf16 more slowly when the long dimension is the strided one of the first
    operand. A transposed copy of hidden makes up for it in wide layers alone: R, D, F of 1536, 384,
    8192 from 22.1 to 17.3 ms, 4096, 384, 768 from 3.5 to 4.6 ms (one thread, AMX).
    """
    if grad_RF.is_cuda and grad_RF.dtype != torch.float32:
        return torch.mm(grad_RF.t(), hidden_RD, out_dtype=torch.float32)
    if grad_RF.dtype == torch.bfloat16 and grad_RF.shape[1] >= 4 * hidden_RD.shape[1]:
        return torch.mm(hidden_RD.t().contiguous(), grad_RF).t()
    return torch.mm(grad_RF.t(), hidden_RD)


def multiply_chunks(
    error_pass: ErrorPass, hidden: Tensor, weight: Tensor, shift: int, needs_hidden: bool,
    needs_weight: bool, row_align: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the error pass over all rows that have a target, chunk by chunk.

    ``row_align``: the rows of the scratch start at multiples of so many elements.

    Returns:
        Gradients of hidden (C, D) and of weight (F, D) without scale, empty where not needed.
    """
    (C, D), features = hidden.shape, len(weight)
    rows = max(C - shift, 0)
    narrow = weight.to(hidden.dtype)
    step = chunk_rows(rows, features, D, hidden.element_size(), hidden.device.type)
    stride = -(-features // row_align) * row_align
    scratch = hidden.new_empty(min(step, rows), stride)
    if stride > features:
        # oneDNN's bf16 products multiply what lies there by zero, so it must be finite
        scratch[:, features:] = 0
        scratch = scratch[:, :features]
    grad_hidden = hidden.new_empty((C, D) if needs_hidden else (0,))
    grad_weight = hidden.new_zeros((0,), dtype=torch.float32)
    for first in range(0, rows, max(step, 1)):
        chunk = hidden[first : min(first + step, rows)]
        product = scratch[: len(chunk)]
        torch.mm(chunk, narrow.t(), out=product)
        error_pass(product, first)
        if needs_hidden:
            torch.mm(product, narrow, out=grad_hidden[first : first + len(chunk)])
        if needs_weight:
            part = _weight_gradient(product, chunk)
            if first == 0:
                grad_weight = part.to(torch.float32, memory_format=torch.contiguous_format)
            else:
                grad_weight += part
    if needs_hidden and rows < C:
        grad_hidden[rows:] = 0
    if needs_weight and rows == 0:
        grad_weight = weight.new_zeros(weight.shape)
    return grad_hidden, grad_weight.to(weight.dtype)


def check_arguments(
    name: str, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor,
    shift: int,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError unless the arguments fit; the op checks the target's shape."""
    check_floating(name, hidden=hidden, weight=weight, bias=bias)
    if hidden.ndim != 2 or weight.ndim != 2:
        raise ValueError(
            f"{name}: hidden is {list(hidden.shape)} and weight {list(weight.shape)}; "
            "both must have two dimensions"
        )
    check_shape(name, "weight", weight, (len(weight), hidden.shape[1]))
    check_shape(name, "bias", bias, (len(weight),))
    if predicts.dtype != torch.bool:
        raise TypeError(f"{name}: predicts is {predicts.dtype}; it must be torch.bool")
    check_shape(name, "predicts", predicts, (len(hidden),))
    check_same(
        name, "device", hidden=hidden, weight=weight, bias=bias, target=target, predicts=predicts
    )
    check_contiguous(
        name, hidden=hidden, weight=weight, bias=bias, target=target, predicts=predicts
    )
    if shift < 0:
        raise ValueError(f"{name}: shift is {shift}; it must be 0 or more")


def linear_loss(
    name: str,
    reference: Callable[..., Tensor],
    gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[..., Tensor]:
    """Register the operator ``name``; returns the function behind its public one.

    Args:
        name: of the op, whose modules in native/ and triton/ have
            ``fwd(hidden, weight, bias, target, predicts, shift, needs_hidden, needs_weight)``.
        reference: ``reference(hidden, weight, bias, target, predicts, shift)``.
        gradient: of the sum of errors, by formula, ``gradient(prediction, target, counts)`` of the
            rows that have a target; for compiled graphs where there is no kernel.

    Returns:
        ``loss(backend, hidden, weight, bias, target, predicts, shift)`` of checked arguments.
    """

    def plain(
        hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
        needs_hidden: bool, needs_weight: bool,
    ) -> Outputs:  # fmt: skip
        # inside an operator autograd does not record
        counts = counted(predicts, shift)
        predicted = prediction(hidden, weight, bias, len(counts))
        grad = gradient(predicted, target[shift:], counts) / counts.sum().clamp(min=1)
        narrow = grad.to(hidden.dtype)
        rest = (0, 0, 0, len(hidden) - len(counts))
        loss = reference(hidden, weight, bias, target, predicts, shift)
        grad_hidden = F.pad(narrow @ weight.to(hidden.dtype), rest)
        grad_weight = narrow.t() @ hidden[: len(counts)]
        return (
            loss,
            torch.ones_like(loss),
            grad_hidden if needs_hidden else hidden.new_empty(0),
            grad_weight.to(weight.dtype) if needs_weight else weight.new_empty(0),
            grad.sum(0).to(bias.dtype) if needs_weight else bias.new_empty(0),
        )

    def fwd(
        choice: Choice, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor,
        predicts: Tensor, shift: int, needs_hidden: bool, needs_weight: bool,
    ) -> Outputs:  # fmt: skip
        if choice == "reference":
            return plain(hidden, weight, bias, target, predicts, shift, needs_hidden, needs_weight)
        outputs: Outputs = implementation(name, choice).fwd(
            hidden, weight, bias, target, predicts, shift, needs_hidden, needs_weight
        )
        return outputs

    @torch.library.custom_op(f"uml_fast::{name}_fwd", mutates_args=())
    def fwd_op(
        hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int,
        needs_hidden: bool, needs_weight: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        choice = choose(name, "auto", *floating(hidden, target))
        return fwd(
            choice, hidden, weight, bias, target, predicts, shift, needs_hidden, needs_weight
        )

    @fwd_op.register_fake
    def _(hidden, weight, bias, target, predicts, shift, needs_hidden, needs_weight):
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return (
            hidden.new_empty((), dtype=wide),
            hidden.new_empty((), dtype=wide),
            hidden.new_empty(hidden.shape if needs_hidden else (0,)),
            weight.new_empty(weight.shape if needs_weight else (0,)),
            bias.new_empty(bias.shape if needs_weight else (0,)),
        )

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        ctx.needs = inputs[-2:]
        ctx.save_for_backward(*output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        scale, grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs
        factor = grad * scale
        return (
            grad_hidden * factor if needs_hidden else None,
            *((g * factor if needs_weight else None) for g in (grad_weight, grad_bias)),
            *[None] * 5,
        )

    apply = differentiable(name, fwd, fwd_op, setup, backward)

    def loss(
        backend: Backend, hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor,
        predicts: Tensor, shift: int,
    ) -> Tensor:  # fmt: skip
        arguments = (hidden, weight, bias, target, predicts, shift)
        is_recorded = torch.is_grad_enabled()
        needs = (
            is_recorded and hidden.requires_grad,
            is_recorded and (weight.requires_grad or bias.requires_grad),
        )
        if torch.compiler.is_compiling():
            out: Tensor = fwd_op(*arguments, *needs)[0]
        elif (choice := choose(name, backend, *floating(hidden, target))) == "reference":
            out = reference(*arguments)
        elif any(needs):
            out = apply(choice, *arguments, *needs)[0]
        else:
            out = fwd(choice, *arguments, *needs)[0]
        return out

    return loss


def floating(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Those that are floating."""
    return tuple(t for t in tensors if t.is_floating_point())
