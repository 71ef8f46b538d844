"""Tensors without data on a CUDA device that is not there, to run the path of a GPU anywhere.

Every tensor has shape, dtype and device alone (torch's ``FakeTensor``): reading a value raises, and
so do operands on two devices; copies between devices are noted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode, fake_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from uml_fast.kernels.triton import launch

CUDA = torch.device("cuda", 0)
MOST_BLOCKS = (2**31 - 1, 65535, 65535)
"""Programs of a launch along each dimension of its grid (CUDA programming guide)."""

WITHOUT_FAKE = (torch.ops.aten._fused_adam_.tensor_lr, torch.ops.aten._fused_adamw_.tensor_lr)
"""Operators that write in place, return nothing and are not known to ``FakeTensorMode``."""


class _Mode(FakeTensorMode):
    """Tensors that C++ asks for on "meta", because it saw others there, are on ``CUDA``."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WITHOUT_FAKE:
            return None
        kwargs = dict(kwargs or {})
        if not self.in_kernel_invocation and str(kwargs.get("device")) == "meta":
            kwargs["device"] = CUDA
        return super().dispatch(func, types, args, kwargs)


class Copies(TorchDispatchMode):
    """Notes every operator with tensors on both sides; a copy makes the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        both = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, Tensor)]
        if len({t.device.type for t in both}) > 1:
            self.found.append(f"{func}: " + ", ".join(f"{list(t.shape)} {t.device}" for t in both))
        return out


class Launches:
    """Takes launches of Triton kernels and checks what a GPU would refuse."""

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        name = kernel.__name__
        self.kernels.append(name)
        for size, most in zip(grid, MOST_BLOCKS, strict=False):
            assert 1 <= size <= most, f"{name}: a grid of {grid}"
        for value in args:
            if isinstance(value, Tensor):
                assert value.is_cuda, f"{name}: a tensor on {value.device}"
            else:
                assert value is None or isinstance(value, int | float), f"{name}: {value!r}"


@contextlib.contextmanager
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Copies, Launches]]:
    """Tensors made inside have no data; those on ``CUDA`` take the way of a Hopper GPU.

    Autograd's engine asks C++ for a device's streams, which a build for CPUs has none of: to C++
    the tensors are on "meta", to Python on "cuda". Backward then runs on this thread.
    """
    found = FakeTensor.__torch_dispatch__.__func__  # type: ignore[attr-defined]

    def dispatch(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        return found(cls, func, types, args, kwargs)

    monkeypatch.setattr(FakeTensor, "__torch_dispatch__", classmethod(dispatch))
    handlers = fake_tensor._DISPATCH_META_HANDLERS
    monkeypatch.setitem(handlers, torch.ops.prim.device.default, lambda _: torch.device("meta"))
    is_cuda = property(lambda t: t.device.type == "cuda")
    monkeypatch.setattr(FakeTensor, "is_cuda", is_cuda, raising=False)
    launches, copies = Launches(), Copies()
    with (
        launch.launching(launches, arch=90, processors=132),
        _Mode(allow_non_fake_inputs=True),
        copies,
    ):
        yield copies, launches


def move(module: nn.Module) -> None:
    """The module's parameters and buffers as fake tensors on ``CUDA``; in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(like(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = like(buffer)


def like(tensor: Tensor) -> Tensor:
    """A fake tensor on ``CUDA`` of the same shape, dtype and strides."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


def on_cuda(value: Any) -> Any:
    """``value`` with ``like`` of every tensor in it."""
    return tree_map_only(Tensor, like, value)
