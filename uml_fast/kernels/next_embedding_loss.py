"""Next-embedding loss of paper 1.2: decoder and mean squared error in one op (linear_loss.py).

    predicted = hidden @ weight^T + bias
    loss = mean over rows i with predicts[i] of mean over F of (predicted[i] - target[i + shift])^2

Legend: C rows, D columns of hidden, F features. hidden in the working dtype, target fp32 or
working, weight and bias of any floating dtype (fp32 masters); products in the working dtype, bias,
error and sums in fp32, the loss fp32. The error pass reads product and target once and writes the
gradient once: (2 w + t) C F bytes with w, t bytes of the working and the target's dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Backend
from uml_fast.kernels.checks import check_floating, check_shape
from uml_fast.kernels.linear_loss import check_arguments, counted, linear_loss, prediction
from uml_fast.kernels.spec import KernelSpec, Shape

NAME = "next_embedding_loss"


def next_embedding_loss_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, shift: int = 1
) -> Tensor:
    """Plain torch definition; differentiable, any floating dtype."""
    counts = counted(predicts, shift)
    predicted = prediction(hidden, weight, bias, len(counts))
    # masked before it is squared: a NaN that does not count must not reach a gradient
    error = torch.where(counts.unsqueeze(1), predicted - target[shift:], 0.0)
    return error.square().mean(1).sum() / counts.sum().clamp(min=1)


def _gradient(predicted: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    error = torch.where(counts.unsqueeze(1), predicted - target, 0.0)
    return error * (2 / max(target.shape[1], 1))


_loss = linear_loss(NAME, next_embedding_loss_reference, _gradient)


def next_embedding_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, predicts: Tensor, *,
    shift: int = 1, backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Mean squared error of a linear prediction of row ``i + shift`` from row i.

    Args:
        hidden: (C, D) contiguous, fp32 or bf16 (CUDA also fp16).
        weight, bias: (F, D) and (F,), any floating dtype; their gradients have it too.
        target: (C, F) contiguous, fp32 or the dtype of ``hidden``; has no gradient.
        predicts: bool (C,) rows that count; the last ``shift`` rows never do.
        shift: 1 predicts the next row, 0 the row itself.
        backend: for tests.

    Returns:
        The loss, () fp32; 0 where no row counts. Rows that do not count are not read, so whatever
        their targets hold has no effect.

    Raises:
        TypeError, ValueError: shapes, dtypes or strides that do not fit.
    """
    check_arguments(NAME, hidden, weight, bias, target, predicts, shift)
    check_floating(NAME, target=target)
    check_shape(NAME, "target", target, (len(hidden), len(weight)))
    return _loss(backend, hidden, weight, bias, target, predicts, shift)


def _inputs(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Any]:
    C, D, features = shape["C"], shape["D"], shape["F"]
    return {
        "hidden": torch.randn(C, D, generator=generator).to(dtype),
        "weight": torch.randn(features, D, generator=generator) * D**-0.5,
        "bias": torch.randn(features, generator=generator),
        "target": torch.randn(C, features, generator=generator).to(
            shape.get("target", torch.float32)
        ),
        "predicts": torch.rand(C, generator=generator) < shape.get("predicts", 0.9),
        "shift": shape.get("shift", 1),
    }


def _flops(shape: Shape) -> tuple[float, float]:
    """One product for the loss alone, two more for its gradients."""
    product = 2.0 * shape["C"] * shape["D"] * shape["F"]
    return product, 2 * product


def _bytes(shape: Shape, size: int) -> tuple[float, float]:
    """Hidden and target in; gradients of hidden and weight out. The prediction stays in cache."""
    C, D, features = shape["C"], shape["D"], shape["F"]
    read = size * C * D + 4.0 * C * features + 4.0 * features * D
    return read, size * C * D + 4.0 * features * D


SPEC = KernelSpec(
    name=NAME,
    function=next_embedding_loss,
    inputs=_inputs,
    gradients=("hidden", "weight", "bias"),
    tests={
        "no rows": {"C": 0, "D": 8, "F": 4},
        "one row, which has no next": {"C": 1, "D": 8, "F": 4, "predicts": 1.0},
        "one row, which predicts itself": {"C": 1, "D": 8, "F": 4, "predicts": 1.0, "shift": 0},
        "no row counts": {"C": 5, "D": 8, "F": 4, "predicts": 0.0},
        "one column": {"C": 7, "D": 1, "F": 1},
        "primes": {"C": 37, "D": 13, "F": 17},
        "exactly one block of features, bf16 target": {
            "C": 33, "D": 16, "F": 64, "target": torch.bfloat16,
        },
        "one more feature than a block, more rows than a task": {"C": 130, "D": 40, "F": 65},
    },
    benches={
        "multibench d 150": {"C": 4864, "D": 150, "F": 300},
        "multibench d 40": {"C": 4864, "D": 40, "F": 20},
        "ViT-S": {"C": 65536, "D": 384, "F": 768},
        "ViT-L": {"C": 65536, "D": 1024, "F": 768},
    },
    aot={
        "multibench d 150": {"C": 64, "D": 150, "F": 300},
        "multibench d 40": {"C": 64, "D": 40, "F": 20},
        "ViT-S": {"C": 64, "D": 384, "F": 768},
        "vectors": {"C": 64, "D": 384, "F": 768, "shift": 0, "target": torch.bfloat16},
    },
    flops=_flops,
    bytes=_bytes,
)  # fmt: skip
