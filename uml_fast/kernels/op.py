"""One forward, one backward, two ways to call them: eagerly and under ``torch.compile``.

Eager calls skip the operator boundary of ``torch.library``, which costs microseconds a call; a
compiled graph needs it. Both share the same setup and backward functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uml_fast.kernels.backend import Choice

Setup = Callable[[Any, tuple[Any, ...], Any], None]
Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable(
    name: str, fwd: Callable[..., Any], op: Any, setup: Setup, backward: Backward
) -> Callable[..., Any]:
    """Register the gradient of the compiled operator; returns the eager function.

    Args:
        name: of the op.
        fwd: ``fwd(choice, *inputs)``, the outputs; differentiable ones first.
        op: ``torch.library.custom_op`` of the same inputs and outputs.
        setup: ``setup(ctx, inputs, outputs)`` saves what backward needs.
        backward: ``backward(ctx, *grads)``, the gradients of the inputs. ``ctx.choice`` is the
            implementation that ran, or None inside a compiled graph, where the backward operator
            must be called.

    Returns:
        ``apply(choice, *inputs)``.
    """

    def compiled_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.choice = None
        setup(ctx, inputs, output)

    op.register_autograd(backward, setup_context=compiled_setup)

    def forward(ctx: Any, choice: Choice, *inputs: Any) -> Any:
        ctx.choice = choice
        output = fwd(choice, *inputs)
        setup(ctx, inputs, output)
        return output

    @torch.autograd.function.once_differentiable
    def eager_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *backward(ctx, *grads)

    members = {"forward": staticmethod(forward), "backward": staticmethod(eager_backward)}
    function: Any = type(name, (torch.autograd.Function,), members)
    apply: Callable[..., Any] = function.apply
    return apply
