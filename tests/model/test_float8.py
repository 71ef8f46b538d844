"""Float8 products: which maps are swapped, that they train, and where they are refused.

No CPU has them: torchao emulates their rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import numpy as np
import pytest
import torch

from tests.distributed.test_distributed import pack
from tests.tiny import tiny
from uml_fast.config import ConfigError, RunConfig
from uml_fast.model.float8 import check_float8, to_float8
from uml_fast.training import step as step_module
from uml_fast.training.start import build_model
from uml_fast.training.step import TrainStep

CPU = torch.device("cpu")


def config(**changes: Any) -> RunConfig:
    wanted = {"width": 32, "layers": 2, "dropout": 0.0} | changes
    backbone = dataclasses.replace(tiny().backbone, **wanted)
    return dataclasses.replace(tiny(), backbone=backbone, precision="bf16")


def test_the_maps_around_attention_are_swapped_and_train(monkeypatch: pytest.MonkeyPatch) -> None:
    float8_linear = pytest.importorskip("torchao.float8.float8_linear").Float8Linear
    run = config()
    task = run.load(0, "uml")
    batch = pack(run, task, {m.name: np.arange(8) for m in run.modalities})
    plain = TrainStep(build_model(run, task, 3), run, 0)
    monkeypatch.setattr(step_module, "check_float8", lambda *_: None)
    monkeypatch.setattr(step_module, "to_float8", functools.partial(to_float8, emulate=True))
    rough = TrainStep(build_model(run, task, 3), dataclasses.replace(run, float8=True), 0)
    swapped = [n for n, m in rough.model.named_modules() if isinstance(m, float8_linear)]
    assert swapped == [f"backbone.blocks.{i}.{part}" for i in range(2) for part in ("qkv", "out")]
    assert list(rough.model.state_dict()) == list(plain.model.state_dict())
    ours, theirs = ([float(s(batch, i).loss) for i in range(8)] for s in (rough, plain))
    assert ours != theirs and ours == pytest.approx(theirs, rel=0.02)
    assert ours[-1] < 0.8 * ours[0]


def test_scaled_branches_keep_the_map_that_scales() -> None:
    pytest.importorskip("torchao")
    run = config(layer_scale=0.1)
    model = build_model(run, run.load(0, "uml"), 3)
    assert to_float8(model, emulate=True) == [f"backbone.blocks.{i}.qkv" for i in range(2)]


def test_narrow_models_are_refused() -> None:
    pytest.importorskip("torchao")
    run = config(width=24)
    with pytest.raises(ConfigError, match="multiple of 16"):
        to_float8(build_model(run, run.load(0, "uml"), 3), emulate=True)


def test_chips_without_it_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    run = dataclasses.replace(config(), float8=True)
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 .* this device is cpu"):
        TrainStep(build_model(run, run.load(0, "uml"), 3), run, 0)
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ConfigError, match=r"this one has 8\.0"):
        check_float8(cuda, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_float8(cuda, torch.bfloat16)
    with pytest.raises(ConfigError, match=r"products are torch\.float32"):
        check_float8(cuda, torch.float32)


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ConfigError, match=r"pip install 'uml-fast\[float8\]'"):
        to_float8(torch.nn.Linear(2, 2))
