"""Launches: which device they are on, when there is none, and what stands in for them."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from uml_fast.kernels.triton import launch


class Kernel:
    """Notes its launches and the device that was current."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.device: Any = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **constants: self.launches.append((self.device, grid, args, constants))


def test_the_current_device_is_that_of_the_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, x = Kernel(), torch.ones(3)

    @contextmanager
    def device_of(t: Tensor) -> Any:
        kernel.device = t
        yield
        kernel.device = None

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(launch._Target, "launcher", None)
    monkeypatch.setattr(launch._Target, "launcher", None)
    launch.launch(kernel, (2, 1), None, 7, x, torch.zeros(1), BLOCK=16)
    ((device, grid, args, constants),) = kernel.launches
    assert device is x and kernel.device is None
    assert (grid, args[:2], constants) == ((2, 1), (None, 7), {"BLOCK": 16})


def test_a_grid_with_a_zero_launches_nothing() -> None:
    kernel, taken = Kernel(), []
    with launch.launching(lambda *a: taken.append(a), 80, 1):
        launch.launch(kernel, (4, 0), torch.ones(3))
    launch.launch(kernel, (4, 0), torch.ones(3))
    assert not kernel.launches and not taken


def test_a_launcher_sees_launches_and_gives_its_chip() -> None:
    kernel, taken = Kernel(), []
    with launch.launching(lambda *a: taken.append(a), 80, 7):
        assert (launch.arch(), launch.processors()) == (80, 7)
        launch.launch(kernel, (4,), 1, BLOCK=2)
    assert taken == [(kernel, (4,), (1,), {"BLOCK": 2})] and not kernel.launches
