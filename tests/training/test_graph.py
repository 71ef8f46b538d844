"""Steps that are captured and replayed: the same losses as without, whatever changes between them.

A CUDA graph is captured on CUDA alone; here a stand-in calls the captured function again, on the
memory that the graph would have.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.distributed.test_distributed import pack
from tests.tiny import tiny, tiny_prediction
from uml_fast.config import ConfigError, RunConfig
from uml_fast.distributed.ranks import ALONE, Ranks
from uml_fast.packing.pack import PackedBatch
from uml_fast.training import graph, step
from uml_fast.training.start import build_model
from uml_fast.training.step import TrainStep

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
STEPS = 14


def with_all(config: RunConfig, packs: int = 1) -> RunConfig:
    optim = dataclasses.replace(
        config.optim, accumulate=packs, ema=0.9, clip_norm=1.0, warmup_steps=3
    )
    return dataclasses.replace(config, optim=optim, steps=STEPS)


def batches(config: RunConfig, task: Any) -> Iterator[PackedBatch]:
    """Packs of three layouts, in a memory that the next one of its layout takes over."""
    names = [m.name for m in config.modalities]
    kept: dict[Any, PackedBatch] = {}
    for i in range(100):
        chosen = {0: names, 1: names[:2], 2: names[2:]}[i % 3]
        given = pack(
            config, task, {name: torch.arange(i % 5, i % 5 + 6).numpy() for name in chosen}
        )
        held = kept.setdefault(given.layout, given)
        held.copy_(given)
        yield held


def losses(
    config: RunConfig, device: torch.device = CPU, around: Any = contextlib.nullcontext
) -> tuple[list[float], TrainStep]:
    """Losses of steps, and what took them; ``around`` is entered for each."""
    task = config.load(0, "uml")
    made = TrainStep(build_model(config, task, 3).to(device), config, 0)
    packs, found = (p.to(device) for p in batches(config, task)), []
    for i in range(STEPS):
        before = [next(packs).clone() for _ in range(config.optim.accumulate - 1)]
        last = next(packs)
        with around(i):
            result = made(last, i, (), *before)
        found.append((result, float(result.loss)))
    # results are their own memory: a later replay does not write over them
    assert [float(result.loss) for result, _ in found] == [loss for _, loss in found]
    return [loss for _, loss in found], made


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], Any]]:
    """Steps are captured on the CPU, by a stand-in; what was captured."""
    made: list[Callable[[], Any]] = []

    def capture(function: Callable[[], Any], stream: Any, pool: Any) -> Any:
        assert stream is None and pool is None
        made.append(function)
        static: list[Any] = []

        def replay() -> Any:
            result = function()
            if not static:
                static.append(copy.deepcopy(result))
            static[0].loss.copy_(result.loss)
            for name, loss in result.parts.items():
                static[0].parts[name].copy_(loss)
            return static[0]

        return replay

    monkeypatch.setattr(graph, "capture", capture)
    monkeypatch.setattr(step, "is_wanted", lambda *_: True)
    return made


@pytest.mark.parametrize("packs", [1, 2])
@pytest.mark.parametrize("make", [tiny, tiny_prediction])
def test_replayed_steps_are_those_of_no_graph(
    make: Callable[[], RunConfig], packs: int, captures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_all(make(), packs)
    found, ours = losses(config)
    assert len(captures) == 3
    monkeypatch.setattr(step, "is_wanted", lambda *_: False)
    expected, plain = losses(config)
    assert found == expected
    assert len(set(found)) == STEPS
    for a, b in zip(
        ours.model.state_dict().values(), plain.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(ours.averaged[n], t) for n, t in plain.averaged.items())


def test_a_network_that_thaws_is_captured_again(
    captures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_all(tiny())
    backbone = dataclasses.replace(config.backbone, freeze=True, unfreeze_at=7)
    config = dataclasses.replace(config, backbone=backbone)
    monkeypatch.setattr(graph, "WARM_STEPS", 1)
    found, _ = losses(config)
    assert len(captures) == 6
    monkeypatch.setattr(step, "is_wanted", lambda *_: False)
    assert found == losses(config)[0]


def test_programs_beyond_the_most_run_uncaptured(
    captures: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_all(tiny())
    monkeypatch.setattr(graph, "MOST_PROGRAMS", 2)
    found, ours = losses(config)
    assert len(captures) == 2  # of three layouts
    assert caplog.text.count("more than 2 combinations of packs") == 1
    monkeypatch.setattr(step, "is_wanted", lambda *_: False)
    expected, plain = losses(config)
    assert found == expected
    weights = zip(ours.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_step_that_cannot_be_captured_runs_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = with_all(tiny())
    expected, _ = losses(config)

    def fail(function: Callable[[], Any], *_: Any) -> Any:
        with monkeypatch.context() as patch:  # a capture computes nothing and may end halfway
            patch.setattr(step, "update", unable)
            function()

    def unable(optimizer: torch.optim.Optimizer) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graph, "capture", fail)
    monkeypatch.setattr(step, "is_wanted", lambda *_: True)
    assert losses(config)[0] == expected
    assert caplog.text.count("no CUDA graph of the step (operation not permitted when") == 1
    with pytest.raises(RuntimeError, match="not permitted"):
        losses(dataclasses.replace(config, cuda_graph="on"))


def test_where_steps_are_captured() -> None:
    config = tiny()
    on, off = (dataclasses.replace(config, cuda_graph=x) for x in ("on", "off"))
    assert graph.is_wanted(config, ALONE, CUDA) and graph.is_wanted(on, ALONE, CUDA)
    assert not graph.is_wanted(off, ALONE, CUDA)
    assert not graph.is_wanted(config, ALONE, CPU) and not graph.is_wanted(
        config, Ranks(0, 2), CUDA
    )
    with pytest.raises(ConfigError, match="steps on cpu are no CUDA graphs; leave it at auto"):
        graph.is_wanted(on, ALONE, CPU)
    with pytest.raises(ConfigError, match="sums over ranks"):
        graph.is_wanted(on, Ranks(0, 2), CUDA)
