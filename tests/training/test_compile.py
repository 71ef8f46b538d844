"""``--compile``: the losses of no compile, each layout compiled once, one block for all of them."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.on_ranks import run_ranks
from tests.distributed.test_distributed import SAMPLES, pack, parts_of, step_config
from tests.tiny import tiny
from uml_fast.config import DistConfig, RunConfig
from uml_fast.distributed.ranks import join_ranks
from uml_fast.training.start import build_model
from uml_fast.training.step import TrainStep, _graphs

WITHOUT_CODE = functools.partial(torch.compile, backend="aot_eager")
"""torch.compile but for the code that inductor makes, which takes tens of seconds."""
LAYERS = 3


def deep(config: RunConfig, norm: Any) -> RunConfig:
    backbone = dataclasses.replace(config.backbone, layers=LAYERS, norm=norm, dropout=0.1)
    return dataclasses.replace(config, backbone=backbone, precision="fp32")


def test_every_layout_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", WITHOUT_CODE)
    config = dataclasses.replace(tiny(), precision="fp32")
    task = config.load(0, "uml")
    packs = [
        pack(config, task, {name: np.arange(4) for name in some})
        for some in (["text"], ["text", "features"])
    ]
    before = _graphs()
    ours, plain = (
        TrainStep(build_model(c, task, 3), c, 0)
        for c in (dataclasses.replace(config, compile=True), config)
    )
    for i in range(4):
        loss = float(plain(packs[i % 2], i).loss)
        assert float(ours(packs[i % 2], i).loss) == pytest.approx(loss, rel=1e-4)
    assert _graphs() - before == 2 and ours.recompiles == 0
    smoothed = dataclasses.replace(config.objective, label_smoothing=0.1)
    ours._own.config = dataclasses.replace(config, objective=smoothed)  # compiled in
    ours(packs[0], 4)
    assert ours.recompiles == 1


def on_ranks(backend: str, norms: list[str]) -> dict[str, Any]:
    """Losses, graphs and recompiles of steps in shards, eager and compiled."""
    torch.compile = functools.partial(torch.compile, backend=backend)  # type: ignore[assignment]
    out: dict[str, Any] = {}
    with join_ranks("cpu", timeout_s=60) as ranks:
        for norm in norms:
            for is_compiled in (False, True):
                config = dataclasses.replace(
                    deep(step_config("classification"), norm), compile=is_compiled,
                    dist=DistConfig(strategy="fsdp"),
                )  # fmt: skip
                task = config.load(0, "uml")
                step = TrainStep(build_model(config, task, 5), config, 0, ranks)
                names = [m.name for m in config.modalities]
                before = _graphs()
                found = []
                for i in range(4):
                    some = names if i % 2 else names[:2]
                    parts = parts_of("samples", some, ranks.rank, ranks.world)
                    found.append(float(step(pack(config, task, parts), i).loss))
                out[f"{norm} {is_compiled}"] = found, _graphs() - before, step.recompiles
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "norms"), [("aot_eager", ["pre"]), ("inductor", ["post"])])
def test_shards_compile_a_block_once(backend: str, norms: list[str], tmp_path: Path) -> None:
    """Under pre-norm the first block is another one: nothing was added up before it."""
    assert SAMPLES > 4 and LAYERS > 2
    layouts, graphs = 2, {"pre": 2, "post": 1}
    for found in run_ranks(on_ranks, 2, tmp_path / "log", backend, norms, timeout_s=400):
        for norm in norms:
            eager, ours = found[f"{norm} False"], found[f"{norm} True"]
            assert ours[0] == pytest.approx(eager[0], rel=1e-4)
            assert eager[1:] == (0, 0) and ours[1:] == (graphs[norm] * layouts, 0)
