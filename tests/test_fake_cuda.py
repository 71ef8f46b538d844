"""A GPU's way through the step without a GPU: no value is read, no tensor is on the host."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.fake_cuda import CUDA, fake_cuda, move, on_cuda
from tests.grid.test_grid import THREE, made_data, name, one_lesson
from tests.model.test_encoder import network, own_networks
from tests.tiny import tiny, tiny_prediction
from uml_fast.config import OptimConfig, RunConfig
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.distributed.ranks import Ranks
from uml_fast.grid import Cell
from uml_fast.grid.heads import Heads
from uml_fast.grid.stacked import _Stack
from uml_fast.model.bottleneck import BottleneckConfig
from uml_fast.model.objective import counts
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import PackedBatch
from uml_fast.recipes.throughput import mosi
from uml_fast.training import step as step_module
from uml_fast.training.optim import build_optimizer
from uml_fast.training.step import TrainStep

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu.py runs the real one"),
]
STEPS = 2


def with_backbone(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(
        config, backbone=dataclasses.replace(config.backbone, **changes), recipe=str(changes)
    )


def with_class_token() -> RunConfig:
    image, *others = tiny().modalities
    image = dataclasses.replace(image, class_token=True)
    return dataclasses.replace(tiny(), modalities=(image, *others), recipe="class token")


def clipped() -> RunConfig:
    return dataclasses.replace(
        tiny(), optim=OptimConfig(kind="adam", clip_norm=1.0), recipe="clipped"
    )


CONFIGS: list[Callable[[], RunConfig]] = [
    tiny,
    tiny_prediction,
    lambda: dataclasses.replace(mosi(40, 8), recipe="mosi"),
    lambda: with_backbone(tiny(), recompute=True, positions="learned", pooling="last"),
    lambda: with_backbone(tiny(), norm_kind="rms", activation="swiglu", positions="rotary"),
    lambda: with_backbone(tiny(), layer_scale=0.1, positions="sinusoid", key_heads=1),
    lambda: with_backbone(tiny(), input_norm=True, embedding=8, pooling="first", bias=False),
    lambda: dataclasses.replace(tiny(), backbone=BottleneckConfig(width=16), recipe="bottleneck"),
    lambda: dataclasses.replace(own_networks(precision="bf16"), recipe="own networks"),
    lambda: dataclasses.replace(
        own_networks(backbone=network(35, heads=5, freeze=True)), recipe="frozen"
    ),
    with_class_token,
    clipped,
]


def pack_of(config: RunConfig) -> PackedBatch:
    sources = config.load(0, "uml").train
    with Loader(sources, layouts_of(sources, config.mix), config.mix, seed=0) as loader:
        return copy.deepcopy(next(loader)[0])


def fake_pack(pack: PackedBatch) -> PackedBatch:
    """Called inside ``fake_cuda``."""
    values = {f.name: on_cuda(getattr(pack, f.name)) for f in dataclasses.fields(pack)[1:]}
    return dataclasses.replace(pack, **values)


def optimizer_of(model: nn.Module, config: OptimConfig, _: Ranks) -> torch.optim.Optimizer:
    """That of one rank. Adam reads the rate that it is given once, when it is made."""
    made = build_optimizer(model, config, Ranks(0, 2))
    rate = torch.full((), config.lr, device=CUDA)
    for group in made.param_groups:
        group["lr"] = rate
    return made


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("make", CONFIGS, ids=[c().recipe for c in CONFIGS])
def test_a_step_stays_on_the_device(
    make: Callable[[], RunConfig], is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables are copied to the device in the first step, and nothing in the following ones."""
    config = dataclasses.replace(make(), cuda_graph="off")
    pack, model = pack_of(config), Uml(config, torch.bfloat16)
    monkeypatch.setattr(step_module, "build_optimizer", optimizer_of)
    if is_compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with fake_cuda(monkeypatch) as (copies, launches):
        move(model)
        train, batch = TrainStep(model, config, seed=0), fake_pack(pack)
        for step in range(STEPS):
            copies.found.clear()
            result = train(batch, step)
        assert copies.found == []
        assert result.loss.device == CUDA
        with torch.no_grad():
            assert model(batch).embedding_SE.device == CUDA
        assert all(n.device == CUDA for n in counts(model, batch, config).values())
        assert {p.device for p in model.parameters()} == {CUDA}
    attends = any("segment_attention" in kernel for kernel in launches.kernels)
    assert attends != (is_compiled or config.recipe == "bottleneck")


@pytest.mark.parametrize(
    "cell", [Cell(batch=8), Cell(batch=5, project=False), Cell(modalities=THREE)], ids=name
)
def test_a_step_of_stacked_heads_stays_on_the_device(
    cell: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured as a graph: it may not copy either."""
    data = made_data(image=20, text=20, audio=20)
    lesson = one_lesson(data, cell)
    with fake_cuda(monkeypatch) as (copies, _):
        stack = _Stack(Heads(data, [cell], 4, CUDA), lesson, size=4)
        stack.load([lesson] * 4)
        copies.found.clear()
        stack._one_step()
        assert copies.found == []
        assert stack.state.device == CUDA
