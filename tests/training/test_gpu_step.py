"""The step on a CUDA device with all it can do: captured as a graph, and never waiting."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.tiny import tiny, tiny_prediction
from tests.training.test_graph import CUDA, STEPS, losses, with_all
from uml_fast.config import RunConfig
from uml_fast.training.graph import WARM_STEPS

pytestmark = pytest.mark.gpu
MAKERS = [tiny, tiny_prediction]
LAYOUTS = 3
"""Of the packs of ``losses``: each is captured in its turn."""


@contextlib.contextmanager
def no_waiting(step: int) -> Iterator[None]:
    """A wait for the device is an error, once all layouts are captured."""
    torch.cuda.set_sync_debug_mode("error" if step >= LAYOUTS * (WARM_STEPS + 1) else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize("make", MAKERS)
def test_captured_steps_have_the_losses_of_plain_ones(
    make: Callable[[], RunConfig], packs: int
) -> None:
    config = dataclasses.replace(with_all(make(), packs), precision="fp32", device="cuda")
    on, off = (dataclasses.replace(config, cuda_graph=x) for x in ("on", "off"))
    found, ours = losses(on, CUDA)
    expected, plain = losses(off, CUDA)
    assert found == pytest.approx(expected, rel=1e-4)
    for name, weight in plain.model.named_parameters():
        own = dict(ours.model.named_parameters())[name]
        torch.testing.assert_close(own, weight, rtol=1e-3, atol=1e-4, msg=name)
        torch.testing.assert_close(
            ours.averaged[name], plain.averaged[name], rtol=1e-3, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize("make", MAKERS)
def test_no_step_waits_for_the_device(
    make: Callable[[], RunConfig], packs: int, graph: str
) -> None:
    config = dataclasses.replace(with_all(make(), packs), cuda_graph=graph, device="cuda")
    found, _ = losses(config, CUDA, no_waiting)
    assert len(set(found)) == STEPS
