"""The loader: the packs of the plan, whole and in order, whatever the consumer does."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from uml_fast.config import ConfigError, MixConfig
from uml_fast.data.loading.loader import Loader, iterate_once, layouts_of, streams_of
from uml_fast.data.source import Source
from uml_fast.packing.pack import PackedBatch, pack_samples, unpack_samples
from uml_fast.packing.schedule import Planner
from uml_fast.runtime import native

MIX = MixConfig(token_budget=512)


def source(name: str, dtype: str, elems: int, lengths: np.ndarray, seed: int) -> Source:
    rng = np.random.default_rng(seed)
    samples = [rng.integers(0, 100, (n, elems)).astype(dtype) for n in lengths]
    return Source.from_samples(name, samples, rng.integers(0, 9, len(lengths)))


@pytest.fixture(scope="module")
def sources() -> tuple[Source, ...]:
    rng = np.random.default_rng(1)
    return (
        source("image", "uint8", 12, np.full(40, 16), 2),
        source("audio", "int16", 5, rng.integers(10, 60, 70), 3),
        source("text", "int32", 1, rng.integers(1, 20, 90), 4),
        source("motion", "float32", 3, rng.integers(1, 9, 50), 5),
    )


@pytest.fixture(params=["native", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways packs are made."""
    if request.param == "reference":
        monkeypatch.setattr(native, "module", lambda: None)
    elif not native.available():
        pytest.skip(f"no native extension: {native.reason()}")
    return request.param


def tensors(batch: PackedBatch) -> list[torch.Tensor]:
    return [
        *batch.raw, batch.offsets_S1, batch.modality_S, batch.label_S, batch.sample_S,
        batch.position_T, batch.segment_T,
    ]  # fmt: skip


def snapshot(batch: PackedBatch) -> list[torch.Tensor]:
    return [t.clone() for t in tensors(batch)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
        for x, y in zip(a, b, strict=True)
    )


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize("policy", ["joint", "alternate", "warmup"])
def test_packs_are_those_of_the_readable_definition(sources, path, policy) -> None:
    mix = MixConfig(policy=policy, token_budget=512, warmup_epochs=1)
    layouts = layouts_of(sources, mix)
    planner = Planner(streams_of(sources), layouts, mix, 7)
    by_name = {s.name: s for s in sources}
    with Loader(sources, layouts, mix, 7, threads=2) as loader:
        for _ in range(60):
            batch, index = next(loader)
            plan = planner.next()
            assert index == plan.layout
            names = [r.name for r in layouts[index].regions]
            samples = dict(zip(names, plan.samples, strict=True))
            want = pack_samples(
                layouts[index],
                {n: [by_name[n].sample(i) for i in x] for n, x in samples.items()},
                {n: by_name[n].labels[x] for n, x in samples.items()},
            )
            for m, x in enumerate(plan.samples):
                first = layouts[index].slot_slice(m).start
                want.sample_S[first : first + len(x)] = torch.from_numpy(x)
            assert same(tensors(batch), tensors(want))
        assert loader.state_dict()["planner"][-1]["ranks"] == [planner.save()]
        assert loader.epochs() == planner.epochs()


def test_samples_stay_whole_and_apart(sources, path) -> None:
    by_name = {s.name: s for s in sources}
    with Loader(sources, layouts_of(sources, MIX), MIX, 0) as loader:
        for _ in range(30):
            batch, _ = next(loader)
            found = unpack_samples(batch)
            for m, region in enumerate(batch.layout.regions):
                slots = batch.layout.slot_slice(m)
                index = batch.sample_S[slots][batch.modality_S[slots] == m].tolist()
                for i, rows in zip(index, found[region.name], strict=True):
                    assert np.array_equal(rows, by_name[region.name].sample(i))
            assert not any(
                r[~batch.valid_T()[batch.layout.row_slice(m)]].any()
                for m, r in enumerate(batch.raw)
            )


def test_slots_are_not_overwritten_while_in_use(sources, path) -> None:
    """A slow consumer: the workers have time to fill every slot that is free."""
    layouts = layouts_of(sources, MIX)
    with Loader(sources, layouts, MIX, 0, slots=2, threads=2) as loader:
        for _ in range(10):
            batch, _ = next(loader)
            before = snapshot(batch)
            time.sleep(0.02)
            assert same(before, tensors(batch))


@pytest.mark.native
def test_a_slot_is_reused_after_release_without_new_tensors(sources) -> None:
    with Loader(sources, layouts_of(sources, MIX), MIX, 0, slots=2) as loader:
        first, _ = next(loader)
        pointers = {tuple(t.data_ptr() for t in tensors(next(loader)[0])) for _ in range(20)}
        assert len(pointers) == 2
        assert any(next(loader)[0] is first for _ in range(2))


def test_state_is_that_of_the_last_pack_handed_out(sources, path) -> None:
    layouts = layouts_of(sources, MIX)
    with Loader(sources, layouts, MIX, 3) as loader:
        start = loader.state_dict()
        packs = []
        for k in range(30):
            if k == 17:
                middle = json.loads(json.dumps(loader.state_dict()))
            packs.append(snapshot(next(loader)[0]))
        for state, done in ((middle, 17), (start, 0)):
            loader.load_state_dict(state)
            assert loader.state_dict() == state
            assert same(snapshot(next(loader)[0]), packs[done])
    with Loader(sources, layouts, MIX, 3, slots=3, threads=2) as other:
        other.load_state_dict(middle)
        for want in packs[17:]:
            assert same(snapshot(next(other)[0]), want)


def test_stats_count_what_was_handed_out(sources, path) -> None:
    layouts = layouts_of(sources, MIX)
    with Loader(sources, layouts, MIX, 0) as loader:
        valid, rows, samples = 0, 0, 0
        for _ in range(25):
            batch, _ = next(loader)
            valid += int(batch.valid_T().sum())
            rows += batch.layout.rows
            samples += int((batch.modality_S == 2).sum())
        stats = loader.stats()
    assert stats["packs"] == 25
    assert stats["fill"] == valid / rows
    assert stats["samples/text"] == samples
    assert sum(v for k, v in stats.items() if k.startswith("tokens/")) == valid
    assert stats["stall_s"] > 0


@pytest.mark.native
@pytest.mark.parametrize("packs", [0, 1, 5])
def test_close_leaves_no_thread_in_any_state(sources, packs) -> None:
    layouts = layouts_of(sources, MIX)
    before = thread_count()
    loader = Loader(sources, layouts, MIX, 0, threads=3)
    batch = None
    for _ in range(packs):
        batch, _ = next(loader)
    if packs:
        time.sleep(0.02)  # all slots are full and the workers wait for a free one
        assert thread_count() == before + 3
    kept = snapshot(batch) if batch else []
    loader.close()
    loader.close()
    assert thread_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)
    if batch:
        del loader
        assert same(kept, tensors(batch))


@pytest.mark.native
def test_threads_end_with_an_exception_and_without_close(sources) -> None:
    layouts = layouts_of(sources, MIX)
    before = thread_count()
    with pytest.raises(KeyboardInterrupt), Loader(sources, layouts, MIX, 0) as loader:
        next(loader)
        raise KeyboardInterrupt
    assert thread_count() == before
    dropped = Loader(sources, layouts, MIX, 0)
    next(dropped)
    del dropped
    assert thread_count() == before


@pytest.mark.native
def test_a_pack_that_does_not_come_names_the_stage(sources, monkeypatch) -> None:
    extension = native.module()
    assert extension is not None

    class Stuck(extension.Loader):
        def acquire(self, wait_s: float, stream: int) -> None:
            threading.Event().wait(0.01)

        def stage(self) -> str:
            return "assemble (slot 1)"

    monkeypatch.setattr(extension, "Loader", Stuck)
    with (
        Loader(sources, layouts_of(sources, MIX), MIX, 0, timeout_s=0.05) as loader,
        pytest.raises(TimeoutError, match=r"no pack for 0.05 s.*assemble \(slot 1\)"),
    ):
        next(loader)


def test_iterate_once_gives_every_sample_in_order(sources) -> None:
    text = sources[2]
    layout = layouts_of(sources, MIX)[0]
    index, labels = [], []
    for batch in iterate_once(text, layout):
        found = batch.modality_S == 2
        index += batch.sample_S[found].tolist()
        labels += batch.label_S[found].tolist()
        assert set(batch.modality_S.tolist()) <= {2, -1}
    assert index == list(range(len(text)))
    assert labels == text.labels.tolist()
    with pytest.raises(ConfigError, match="no region for 'video'"):
        next(iterate_once(Source("video", text.rows, text.offsets, text.labels), layout))


def test_bad_settings_are_refused(sources) -> None:
    layouts = layouts_of(sources, MIX)
    with pytest.raises(ConfigError, match="no such stream"):
        Loader(sources[:3], layouts, MIX, 0)
    with pytest.raises(ConfigError, match="seed is -1"):
        Loader(sources, layouts, MIX, -1)
    with pytest.raises(ConfigError, match="policy alternate takes 4 layouts, got 1"):
        Loader(sources, layouts, MixConfig(policy="alternate"), 0)
