"""The tolerance rule of the kernels: measured against plain torch in the same dtype, not chosen.

A result passes if its largest error against the float64 reference is at most twice that of the
reference in the working dtype, plus one unit in the last place of the result's scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

Op = Callable[..., Any]
FEW = 16
"""Elements below which the largest error of plain torch is no bound."""
Results = list[tuple[str, Tensor]]


def forward_backward(
    op: Op, inputs: dict[str, Any], gradients: Collection[str] | None = None, seed: int = 7
) -> Results:
    """Outputs and gradients of the inputs named (None: of all floating ones).

    ``seed`` draws the gradients of the outputs.
    """
    if gradients is None:
        gradients = {
            name for name, t in inputs.items() if isinstance(t, Tensor) and t.is_floating_point()
        }
    leaves = {
        name: t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        if name in gradients
        else t
        for name, t in inputs.items()
    }
    out = op(**leaves)
    outputs: Sequence[Tensor] = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    grads = [g.bfloat16().to(o) for g, o in zip(grads, outputs, strict=True)]
    wanted = {n: t for n, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    found = torch.autograd.grad(outputs, list(wanted.values()), grads) if wanted else ()
    named = [(f"output {i}", o.detach()) for i, o in enumerate(outputs)]
    return named + [(f"gradient of {n}", g) for n, g in zip(wanted, found, strict=True)]


def to_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs with floating tensors, and the dtype asked for, in float64."""
    return {
        n: t.double()
        if isinstance(t, Tensor) and t.is_floating_point()
        else torch.float64
        if isinstance(t, torch.dtype)
        else t
        for n, t in inputs.items()
    }


def _eps(result: Tensor, inputs: dict[str, Any]) -> float:
    """Unit in the last place relative to the result.

    The error of plain torch is chance where there are few elements, such as the one of a loss; they
    get the unit of the coarsest input.
    """
    measured = [result]
    if result.numel() < FEW:
        measured += [t for t in inputs.values() if isinstance(t, Tensor) and t.is_floating_point()]
    return max(torch.finfo(t.dtype).eps for t in measured)


def assert_matches(
    op: Op, reference: Op, inputs: dict[str, Any], gradients: Collection[str] | None = None
) -> None:
    """Check every output and gradient of ``op`` by the rule above; a NaN fails."""
    oracle = forward_backward(reference, to_float64(inputs), gradients)
    baseline = forward_backward(reference, inputs, gradients)
    got = forward_backward(op, inputs, gradients)
    for (name, want), (_, plain), (_, have) in zip(oracle, baseline, got, strict=True):
        assert have.dtype == plain.dtype, f"{name}: {have.dtype}, the reference has {plain.dtype}"
        assert have.shape == plain.shape, f"{name}: {list(have.shape)}, not {list(plain.shape)}"
        if want.numel() == 0:
            continue
        error = (have.double() - want).abs()
        ulp = _eps(have, inputs) * want.abs().max().item()
        limit = 2 * (plain.double() - want).abs().max().item() + ulp
        worst = error.nan_to_num(float("inf")).argmax().item()
        assert error.max().item() <= limit, (
            f"{name}: off by {error.max().item():.3g} (limit {limit:.3g}) at {worst} of "
            f"{list(want.shape)}: {have.flatten()[worst].item()} for {want.flatten()[worst].item()}"
        )


def assert_equal(a: Results, b: Results) -> None:
    """Check that two results are the same bits."""
    for (name, x), (_, y) in zip(a, b, strict=True):
        assert torch.equal(x, y), f"{name} differs"
