"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from uml_fast.kernels.native import next_embedding_loss
from uml_fast.kernels.triton import launch


def launch_on_gpu(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """A launch whose CPU tensors go to the GPU and come back with what was written."""
    there = [_on_gpu(a) if isinstance(a, Tensor) else a for a in args]
    kernel[grid](*there, **constants)
    for here, copy in zip(args, there, strict=True):
        if here is not copy:
            here.data.copy_(copy)  # not a change that autograd should see


def _on_gpu(t: Tensor) -> Tensor:
    if t.is_cuda:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda").copy_(t)


@pytest.fixture(autouse=True)
def _triton_takes_cpu_tensors() -> Iterator[None]:
    """As the interpreter does; where there is a GPU, tests run on it instead."""
    if not torch.cuda.is_available():
        yield
        return
    with launch.launching(launch_on_gpu, launch.arch(), launch.processors()):
        yield


@pytest.fixture(params=["one pass", "chunks"])
def passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test once with each way in which the CPU multiplies in next_embedding_loss."""
    most = 1 << 20 if request.param == "one pass" else 0
    narrow = dict.fromkeys(next_embedding_loss.NARROW, most)
    monkeypatch.setattr(next_embedding_loss, "NARROW", narrow)


@pytest.fixture
def rng_key() -> Tensor:
    """The key of a step; its high half is not zero."""
    return torch.tensor([0x1234_5678_9ABC_DEF0])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Runs the test with two threads, also where there is one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
