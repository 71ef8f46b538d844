"""The training step on a CUDA device: the CPU's losses, no wait inside a step, packs uploaded."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import pytest
import torch

from tests.tiny import tiny, tiny_prediction
from uml_fast.config import RunConfig
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import PackedBatch, unpack_samples
from uml_fast.training.step import TrainStep

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
STEPS = 4


def loader(config: RunConfig, device: str) -> Loader:
    sources = config.load(0, "uml").train
    return Loader(sources, layouts_of(sources, config.mix), config.mix, seed=0, device=device)


def packs(config: RunConfig) -> Iterator[PackedBatch]:
    """Packs on the CPU, each with memory of its own."""
    with loader(config, "cpu") as source:
        for _ in range(STEPS):
            yield copy.deepcopy(next(source)[0])


@pytest.mark.parametrize("config", [tiny(), tiny_prediction()], ids=lambda c: c.recipe)
def test_losses_equal_those_of_the_cpu(config: RunConfig) -> None:
    """The same weights, packs and dropout masks; fp32 rounding apart."""
    config = dataclasses.replace(config, precision="fp32")
    torch.manual_seed(0)
    model = Uml(config)
    on_cpu = TrainStep(model, config, seed=0)
    on_gpu = TrainStep(copy.deepcopy(model).to(CUDA), config, seed=0)
    for step, pack in enumerate(packs(config)):
        want = on_cpu(pack, step).parts
        got = on_gpu(pack.to(CUDA), step).parts
        assert got.keys() == want.keys()
        for name, loss in want.items():
            assert got[name].item() == pytest.approx(loss.item(), rel=2e-4), name


@pytest.mark.parametrize("config", [tiny(), tiny_prediction()], ids=lambda c: c.recipe)
def test_a_step_never_waits_for_the_device(config: RunConfig) -> None:
    train = TrainStep(Uml(config, torch.bfloat16).to(CUDA), config, seed=0)
    on_device = [pack.to(CUDA) for pack in packs(config)]
    train(on_device[0], 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, pack in enumerate(on_device[1:], 1):
            train(pack, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.native
def test_the_loader_uploads_the_packs_of_the_cpu() -> None:
    """Slots are used again while earlier packs are still in flight on the device."""
    config = tiny()
    before = torch.cuda.current_device()
    with loader(config, "cuda") as on_gpu, loader(config, "cpu") as on_cpu:
        for _ in range(20):
            got, want = next(on_gpu)[0], next(on_cpu)[0]
            assert got.offsets_S1.is_cuda
            for name, samples in unpack_samples(got.to(torch.device("cpu"), False)).items():
                expected = unpack_samples(want)[name]
                assert len(samples) == len(expected)
                for a, b in zip(samples, expected, strict=True):
                    assert (a == b).all()
    assert torch.cuda.current_device() == before
