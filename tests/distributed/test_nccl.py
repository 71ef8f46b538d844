"""NCCL with one rank on a CUDA device: what several do, as far as one GPU shows it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.tiny import tiny
from uml_fast.config import DistConfig, RunConfig
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.distributed import parallel
from uml_fast.distributed.parallel import Losses, clip, whole
from uml_fast.distributed.ranks import Ranks
from uml_fast.model.objective import losses, total
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import PackedBatch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
CONFIG = dataclasses.replace(tiny(), precision="fp32", device="cuda")


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One rank that talks through NCCL and gloo, as ``join_ranks`` sets them up."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def first_pack(config: RunConfig) -> PackedBatch:
    sources = config.load(0, "uml").train
    with Loader(sources, layouts_of(sources, config.mix), config.mix, seed=0) as loader:
        return copy.deepcopy(next(loader)[0]).to(CUDA)


def gradients(module: torch.nn.Module, model: Uml, pack: PackedBatch) -> dict[str, torch.Tensor]:
    key = torch.zeros(1, dtype=torch.int64, device=CUDA)
    total(module(pack, key), CONFIG).backward()
    clip(model.parameters(), 1.0)
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return whole(found)


def test_sums_run_beside_the_step(alone: None) -> None:
    values = torch.arange(5.0, device=CUDA)
    wait = Ranks(0, 1).start_sum(values)
    wait()
    assert values.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_of_one_rank_are_those_of_none(alone: None, strategy: str) -> None:
    torch.manual_seed(0)
    model = Uml(CONFIG).to(CUDA)
    own, pack = copy.deepcopy(model), first_pack(CONFIG)
    expected = gradients(Losses(model, CONFIG, losses), model, pack)
    module = Losses(own, CONFIG, losses)
    if strategy == "ddp":
        spread = parallel._replicated(module, CUDA)
    else:
        mesh = parallel._mesh(DistConfig(), Ranks(0, 1), CUDA)
        for unit in own.backbone.units():
            parallel.fully_shard(unit, mesh=mesh)
        spread = parallel.fully_shard(module, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in own.parameters())
    found = gradients(spread, own, pack)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
