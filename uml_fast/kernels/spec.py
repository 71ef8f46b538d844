"""What an op declares once, for its tests, its ahead-of-time compile check and its bench rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = Mapping[str, Any]
"""Sizes by their letter, and options such as ``causal``."""

Pair = tuple[float, float]
"""A quantity of the forward and of the backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelSpec:
    """The declaration of one op."""

    name: str
    """Of the op, its module and its test file."""
    function: Callable[..., Any]
    """The public function; takes ``backend``, of which "reference" is float64-capable."""
    inputs: Callable[[Shape, torch.dtype, torch.Generator], dict[str, Any]]
    """Arguments of ``function`` by name, on the CPU, drawn from the generator."""
    gradients: tuple[str, ...]
    """Arguments that have a gradient."""
    tests: Mapping[str, Shape]
    """Why a shape is tested -> the shape; small, as the Triton interpreter runs each."""
    benches: Mapping[str, Shape]
    """What a shape stands for -> the shape."""
    aot: Mapping[str, Shape]
    """Shapes whose kernels are compiled ahead of time: the columns, head sizes and options of the
    benches with few rows, since the launchers run, their kernels compiled instead of launched."""
    flops: Callable[[Shape], Pair]
    """Floating-point operations of useful work."""
    bytes: Callable[[Shape, int], Pair]
    """Bytes that must cross memory, with elements of the working dtype of that many bytes."""
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16))
    """Working dtypes that are tested."""


def draw(
    spec: KernelSpec, shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> dict[str, Any]:
    """The arguments of ``spec.function`` on ``device``; ``spec.gradients`` require one."""
    inputs = spec.inputs(shape, dtype, torch.Generator().manual_seed(seed))
    out = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    for name in spec.gradients:
        out[name] = out[name].detach().requires_grad_()
    return out
