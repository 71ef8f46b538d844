"""Sources that are read when needed give the packs of the same samples in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from uml_fast.config import MixConfig
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.source import DataError, Samples, Source
from uml_fast.packing.pack import PADDING, PackedBatch


class Lazy:
    """A source whose rows come late, out of order, and not at all for the samples in ``bad``."""

    def __init__(self, source: Source, delay_s: float = 0.0, bad: Sequence[int] = ()) -> None:
        self.source, self.delay_s, self.bad = source, delay_s, set(bad)
        self.reads = 0

    def __getattr__(self, name: str) -> object:
        if name == "rows":
            raise AssertionError("the rows of this source are not in memory")
        return getattr(self.source, name)

    def __len__(self) -> int:
        return len(self.source)

    def read(
        self, samples: np.ndarray, out: np.ndarray, epochs: np.ndarray | None = None
    ) -> list[int]:
        self.reads += 1
        time.sleep(self.delay_s * (self.reads % 3))
        self.source.read(samples, out)
        return [at for at, i in enumerate(samples) if int(i) in self.bad]


def ragged(name: str, n: int, elems: int, seed: int) -> Source:
    rng = np.random.default_rng(seed)
    samples = [rng.integers(1, 255, (rng.integers(1, 9), elems), np.uint8) for _ in range(n)]
    return Source.from_samples(name, samples, rng.integers(0, 3, n).tolist())


SOURCES = (ragged("a", 40, 6, 0), ragged("b", 25, 4, 1))
MIX = MixConfig(token_budget=96)


def packs(sources: Sequence[Samples], count: int = 30, **options: int) -> list[dict]:
    """Fields of the first packs, copied."""
    with Loader(sources, layouts_of(SOURCES, MIX), MIX, seed=3, **options) as loader:
        return [fields(next(loader)[0]) for _ in range(count)]


def fields(batch: PackedBatch) -> dict:
    names = ("offsets_S1", "modality_S", "label_S", "sample_S", "position_T", "segment_T")
    raw = {f"raw {i}": r.numpy().copy() for i, r in enumerate(batch.raw)}
    return {n: getattr(batch, n).numpy().copy() for n in names} | raw


def assert_same(got: list[dict], want: list[dict]) -> None:
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        for name in b:
            np.testing.assert_array_equal(a[name], b[name], err_msg=f"pack {i}, {name}")


@pytest.mark.native
@pytest.mark.parametrize("options", [{}, {"threads": 4, "slots": 2}, {"slots": 1}], ids=str)
def test_packs_do_not_depend_on_where_rows_are(options: dict) -> None:
    want = packs(SOURCES)
    mixed = (Lazy(SOURCES[0], delay_s=0.002), SOURCES[1])
    both = tuple(Lazy(s, delay_s=0.001) for s in SOURCES)
    assert_same(packs(mixed, **options), want)
    assert_same(packs(both, **options), want)


@pytest.mark.native
def test_samples_that_cannot_be_read_become_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {2, 3, 17}
    lazy = (Lazy(SOURCES[0], bad=tuple(bad)), SOURCES[1])
    got, want = packs(lazy), packs(SOURCES)
    rejected = 0
    for a, b in zip(got, want, strict=True):
        is_bad = (b["modality_S"] == 0) & np.isin(b["sample_S"], list(bad))
        rejected += int(is_bad.sum())
        assert (a["modality_S"][is_bad] == PADDING).all()
        assert (a["label_S"][is_bad] == -1).all() and (a["sample_S"][is_bad] == -1).all()
        rows = np.isin(b["segment_T"], np.flatnonzero(is_bad))
        assert (a["raw 0"][rows[: len(a["raw 0"])]] == 0).all()
        kept = ~is_bad
        np.testing.assert_array_equal(a["sample_S"][kept], b["sample_S"][kept])
        np.testing.assert_array_equal(a["offsets_S1"], b["offsets_S1"])
    assert rejected > 5
    monkeypatch.setattr("uml_fast.runtime.native.module", lambda: None)
    assert_same(packs(lazy), got)


class Visits(Lazy):
    """A source whose rows are the epochs they are read in."""

    def read(
        self, samples: np.ndarray, out: np.ndarray, epochs: np.ndarray | None = None
    ) -> list[int]:
        assert epochs is not None
        assert len(samples) == len(epochs)
        out[:] = np.repeat(epochs, self.source.lengths_of(samples))[: len(out), None]
        return []


@pytest.mark.native
def test_a_source_is_told_the_epoch_of_each_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uml_fast.data.loading.packs._JOB_BYTES", 24)
    visits = tuple(Visits(s, delay_s=0.001) for s in SOURCES)
    got = packs(visits, threads=3)
    for m in range(2):
        seen = np.zeros(len(SOURCES[m]), int)
        for pack in got:
            chosen = np.flatnonzero(pack["modality_S"] == m)
            first = pack["offsets_S1"][chosen] - 48 * m
            epochs = pack[f"raw {m}"][first, 0]
            for i, epoch in zip(pack["sample_S"][chosen], epochs, strict=True):
                assert epoch == seen[i]
                seen[i] += 1
        assert seen.min() > 2
    monkeypatch.setattr("uml_fast.runtime.native.module", lambda: None)
    assert_same(packs(visits), got)


@pytest.mark.native
def test_an_error_in_a_source_reaches_the_consumer_as_it_is() -> None:
    class Broken(Lazy):
        def read(
            self, samples: np.ndarray, out: np.ndarray, epochs: np.ndarray | None = None
        ) -> list[int]:
            raise DataError("a: shard 3 is gone")

    with (
        Loader((Broken(SOURCES[0]), SOURCES[1]), layouts_of(SOURCES, MIX), MIX, seed=0) as loader,
        pytest.raises(DataError, match="a: shard 3 is gone"),
    ):
        next(loader)


@pytest.mark.native
def test_resume_while_reads_are_under_way() -> None:
    lazy = tuple(Lazy(s, delay_s=0.003) for s in SOURCES)
    want = packs(SOURCES)
    with Loader(lazy, layouts_of(SOURCES, MIX), MIX, seed=3) as loader:
        for _ in range(7):
            next(loader)
        state = loader.state_dict()
        for _ in range(5):
            next(loader)
        loader.load_state_dict(state)
        assert_same([fields(next(loader)[0]) for _ in range(10)], want[7:17])


@pytest.mark.native
def test_a_stalled_source_is_named() -> None:
    lazy = (SOURCES[0], Lazy(SOURCES[1], delay_s=2.0))
    with (
        Loader(lazy, layouts_of(SOURCES, MIX), MIX, seed=0, timeout_s=0.3) as loader,
        pytest.raises(
            TimeoutError, match=r"read b \(pack 0, slot 0\)\n  reader uml-read-0 has b: in read"
        ),
    ):
        next(loader)


@pytest.mark.native
def test_close_leaves_no_thread() -> None:
    before = threading.active_count()
    packs(tuple(Lazy(s, delay_s=0.001) for s in SOURCES), count=3)
    assert threading.active_count() == before
