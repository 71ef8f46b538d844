"""Linear layer and softmax cross-entropy in one op, for discrete tokens (linear_loss.py).

    logits = hidden @ weight^T + bias
    loss = mean over rows i with predicts[i] of logsumexp(logits[i]) - logits[i, target[i + shift]]

Legend: C rows, D columns of hidden, V classes. hidden in the working dtype, weight and bias of any
floating dtype (fp32 masters); products in the working dtype, bias, softmax and sums in fp32, the
loss fp32. The error pass reads the chunk's logits twice (the second time from cache) and writes
their gradient once.

torch.nn.functional.linear_cross_entropy exists from PyTorch 2.13 on, without chunks inside a
compiled graph and for int64 targets alone; PyTorch 2.11 is supported here, hence this op.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uml_fast.kernels.backend import Backend
from uml_fast.kernels.checks import check_shape
from uml_fast.kernels.linear_loss import check_arguments, counted, linear_loss, prediction
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "linear_cross_entropy"


def check_classes(target: Tensor, predicts: Tensor, shift: int, classes: int) -> None:
    """Raise ValueError for the first row that counts and is scored against no class.

    On the CPU alone: elsewhere it would wait for the device, and the loss is NaN instead.
    """
    ids = target[shift:]
    wrong = counted(predicts, shift) & ((ids < 0) | (ids >= classes))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{NAME}: row {row} is scored against target[{row + shift}] = {int(ids[row])}; "
            f"classes are 0 to {classes - 1}"
        )


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int = 1
) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    counts = counted(predicts, shift)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        check_classes(target, predicts, shift, len(weight))
    ids = target[shift:].long()
    is_class = (ids >= 0) & (ids < len(weight))
    logits = prediction(hidden, weight, bias, len(counts))
    error = F.cross_entropy(logits, torch.where(is_class, ids, 0), reduction="none")
    error = error * torch.where(is_class | ~counts, 1.0, torch.nan).to(error.dtype)
    return torch.where(counts, error, 0.0).sum() / counts.sum().clamp(min=1)


def _gradient(logits: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    classes = logits.shape[1]
    is_class = (target >= 0) & (target < classes)
    hot = F.one_hot(torch.where(is_class, target.long(), 0), classes)
    grad = torch.where(is_class.unsqueeze(1), logits.softmax(1) - hot, torch.nan)
    return torch.where(counts.unsqueeze(1), grad, 0.0)


_loss = linear_loss(NAME, linear_cross_entropy_reference, _gradient)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, *,
    shift: int = 1, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Cross-entropy of a linear prediction of the class of row ``i + shift`` from row i.

    Args:
        hidden: (C, D) contiguous, fp32 or bf16 (CUDA also fp16).
        weight, bias: (V, D) and (V,), any floating dtype; their gradients have it too.
        target: int32 or int64 (C,) contiguous, classes.
        predicts: bool (C,) rows that count; the last ``shift`` rows never do.
        shift: 1 predicts the next row, 0 the row itself.
        backend: for tests.

    Returns:
        The loss, () fp32; 0 where no row counts. On CUDA NaN where a row that counts is scored
        against an id that is no class.

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit; on the CPU an id that is
            no class.
    """
    check_arguments(NAME, hidden, weight, bias, target, predicts, shift)
    if target.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{NAME}: target is {target.dtype}; it must be int32 or int64")
    check_shape(NAME, "target", target, (len(hidden),))
    return _loss(backend, hidden, weight, bias, target, predicts, shift)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    C, D, V = shape["C"], shape["D"], shape["V"]
    return {
        "hidden": torch.randn(C, D, generator=generator).to(dtype),
        "weight": torch.randn(V, D, generator=generator) * 2 * D**-0.5,
        "bias": torch.randn(V, generator=generator),
        "target": torch.randint(V, (C,), generator=generator, dtype=shape.get("ids", torch.int32)),
        "predicts": torch.rand(C, generator=generator) < shape.get("predicts", 0.9),
        "shift": shape.get("shift", 1),
    }


def _flops(shape: Shape) -> tuple[float, float]:
    """One product for the loss alone, two more for its gradients."""
    product = 2.0 * shape["C"] * shape["D"] * shape["V"]
    return product, 2 * product


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Hidden and weight in, their gradients out. The logits stay in cache."""
    C, D, V = shape["C"], shape["D"], shape["V"]
    once = size * C * D + 4.0 * V * D
    return once, once


SPEC = KernelSpec(
    name=NAME,
    function=linear_cross_entropy,
    inputs=_inputs,
    gradients=("hidden", "weight", "bias"),
    tests={
        "no rows": {"C": 0, "D": 8, "V": 4},
        "one row, which has no next": {"C": 1, "D": 8, "V": 4, "predicts": 1.0},
        "one row, which predicts itself": {"C": 1, "D": 8, "V": 4, "predicts": 1.0, "shift": 0},
        "no row counts": {"C": 5, "D": 8, "V": 4, "predicts": 0.0},
        "one class: gradient zero": {"C": 7, "D": 3, "V": 1},
        "primes, int64": {"C": 37, "D": 13, "V": 17, "ids": torch.int64},
        "exactly one block of classes": {"C": 9, "D": 8, "V": 16384},
        "one more class than a block": {"C": 9, "D": 8, "V": 16385},
        "bytes of text, more rows than a task": {"C": 130, "D": 40, "V": 256},
    },
    benches={
        "bytes of text, d 150": {"C": 4864, "D": 150, "V": 256},
        "GPT-2 tokens, ViT-S": {"C": 16384, "D": 384, "V": 50257},
    },
    aot={
        "bytes of text, d 150": {"C": 64, "D": 150, "V": 256},
        "few classes, int64": {"C": 64, "D": 40, "V": 10, "ids": torch.int64, "shift": 0},
        "GPT-2 tokens": {"C": 64, "D": 64, "V": 50257},
    },
    flops=_flops,
    bytes=_bytes,
)  # fmt: skip
