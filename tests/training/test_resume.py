"""Other numbers of ranks continue a run: every sample once an epoch, whatever the history."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uml_fast.config import ConfigError, MixConfig
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.loading.packs import planner_args
from uml_fast.data.source import Source
from uml_fast.packing.layout import Stream, make_layouts, make_rules
from uml_fast.packing.pack import Layout
from uml_fast.packing.resume import State, continue_from, join, left_over, rank_state
from uml_fast.packing.schedule import Deal, PackPlan, Planner
from uml_fast.runtime import native

BOTH = [False, pytest.param(True, marks=pytest.mark.native)]
RNG = np.random.default_rng(0)


class NativePlanner:
    """The extension's planner with the methods of the reference."""

    def __init__(self, streams, layouts, mix, seed: int, rank: int, world: int) -> None:
        extension = native.module()
        rules = make_rules(streams, layouts, mix)
        self._planner = extension.Planner(**planner_args(streams, rules, seed, rank, world))

    def next(self) -> PackPlan:
        layout, picks = self._planner.next()
        return PackPlan(layout, *zip(*picks, strict=True))

    def save(self) -> list[int]:
        return self._planner.save().tolist()

    def load(self, values: list[int], deals: Sequence[Deal]) -> None:
        self._planner.load(
            np.array(values, np.int64), [(d.through, d.epochs, d.samples) for d in deals]
        )


@dataclass
class Run:
    """A run whose number of ranks changes."""

    streams: list[Stream]
    mix: MixConfig
    is_native: bool
    seed: int = 3
    state: State | None = None
    layouts: tuple[Layout, ...] = ()
    handed: list[list[np.ndarray]] = field(default_factory=list)
    """Per stream and epoch how often each sample was handed out."""

    def __post_init__(self) -> None:
        self.layouts = make_layouts(self.streams, self.mix)
        self.handed = [[] for _ in self.streams]

    def go_on(self, packs: Sequence[int]) -> list[list[list[int]]]:
        """Let rank r of ``len(packs)`` take ``packs[r]`` packs; the samples of each."""
        world, states, out = len(packs), [], []
        for rank, count in enumerate(packs):
            kind = NativePlanner if self.is_native else Planner
            planner = kind(self.streams, self.layouts, self.mix, self.seed, rank, world)
            dealt, before = [-1] * len(self.streams), []
            if self.state is not None:
                place = continue_from(self.state, self.streams, self.seed, rank, world)
                planner.load(place.values, place.deals)
                dealt, before = place.dealt, place.before
            for _ in range(count):
                out.append(self.take(planner))
            states.append(rank_state(planner.save(), dealt, before))
        self.state = json.loads(json.dumps(join(states[::-1])))
        return out

    def take(self, planner: Planner | NativePlanner) -> list[list[int]]:
        plan = planner.next()
        names = [s.name for s in self.streams]
        regions = self.layouts[plan.layout].regions
        for region, index, epochs in zip(regions, plan.samples, plan.epochs, strict=True):
            k = names.index(region.name)
            for i, epoch in zip(index.tolist(), epochs.tolist(), strict=True):
                while len(self.handed[k]) <= epoch:
                    self.handed[k].append(np.zeros(len(self.streams[k].lengths), int))
                self.handed[k][epoch][i] += 1
        return [index.tolist() for index in plan.samples]

    def count(self, k: int) -> np.ndarray:
        """How often each sample of stream ``k`` was handed out."""
        return sum(self.handed[k], np.zeros(len(self.streams[k].lengths), int))

    def check(self) -> None:
        """Of the epochs that have begun, every sample was handed out once or is still to come."""
        assert self.state is not None
        found = left_over(self.state, self.streams, self.seed)
        for stream, handed, (through, epochs, samples) in zip(
            self.streams, self.handed, found, strict=True
        ):
            assert (np.diff(epochs) >= 0).all() and len(handed) <= through + 1
            for epoch in range(through + 1):
                given = handed[epoch] if epoch < len(handed) else 0
                left = np.bincount(samples[epochs == epoch], minlength=len(stream.lengths))
                assert (given + left == 1).all()


@st.composite
def runs(draw: st.DrawFn, is_native: bool) -> Run:
    """Two or three streams, one of them small, any policy."""
    sizes = [draw(st.integers(4, 9)), draw(st.integers(4, 300)), draw(st.integers(60, 200))]
    streams = [
        Stream(
            name=f"m{k}",
            lengths=np.random.default_rng(k).integers(1, draw(st.sampled_from([2, 25])), n),
            share=draw(st.sampled_from([0.5, 1.0, 3.0])),
            is_target=k == 0,
        )
        for k, n in enumerate(sizes[: draw(st.integers(2, 3))])
    ]
    mix = MixConfig(
        policy=draw(st.sampled_from(["joint", "alternate", "warmup"])),
        token_budget=draw(st.sampled_from([400, 900])),
        warmup_epochs=1.5,
    )
    return Run(streams, mix, is_native)


@pytest.mark.parametrize("is_native", BOTH)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_epoch_hands_out_every_sample_once(is_native: bool, data: st.DataObject) -> None:
    run = data.draw(runs(is_native))
    for _ in range(data.draw(st.integers(1, 5))):
        world = data.draw(st.integers(1, 4))
        packs = data.draw(st.integers(0, 12))
        run.go_on([packs + data.draw(st.integers(0, 2)) for _ in range(world)])
        run.check()


@pytest.mark.parametrize("is_native", BOTH)
@pytest.mark.parametrize("packs", [1, 4, 9])
def test_two_then_one_then_three_then_four_ranks(is_native: bool, packs: int) -> None:
    """Many changes within one epoch of the large stream and many epochs of the small one."""
    streams = [
        Stream(name="big", lengths=RNG.integers(1, 25, 1501)),
        Stream(name="small", lengths=RNG.integers(1, 25, 5)),
    ]
    run = Run(streams, MixConfig(token_budget=400), is_native)
    for world in (2, 1, 3, 4, 4, 2):
        run.go_on([packs] * world)
        run.check()
    assert run.state is not None
    through = [found[0] for found in left_over(run.state, streams, run.seed)]
    assert through[1] > through[0]
    kept = len(run.state["planner"])
    assert kept == 5 if through[0] == 0 else kept < 5


def test_native_and_reference_continue_alike() -> None:
    streams = [Stream(name=f"m{k}", lengths=RNG.integers(1, 25, n)) for k, n in enumerate((7, 333))]
    if native.module() is None:
        pytest.skip("no extension")
    packs = []
    for is_native in (False, True):
        run = Run(streams, MixConfig(token_budget=400), is_native)
        packs.append([run.go_on([5] * world) for world in (3, 2, 2, 4, 1)])
        packs[-1].append(run.state)
    assert packs[0] == packs[1]


@pytest.mark.parametrize("is_native", BOTH)
def test_the_same_number_of_ranks_continues_bit_equal(is_native: bool) -> None:
    streams = [Stream(name=f"m{k}", lengths=RNG.integers(1, 25, n)) for k, n in enumerate((70, 90))]
    whole, stopped = (Run(streams, MixConfig(token_budget=400), is_native) for _ in range(2))
    for run in (whole, stopped):
        run.go_on([3] * 4)
    once = whole.go_on([14] * 3)
    parts = [stopped.go_on([7] * 3) for _ in range(2)]
    again = [p for r in range(3) for part in parts for p in part[7 * r : 7 * r + 7]]
    assert again == once


def test_no_rank_falls_behind_with_uneven_parts() -> None:
    streams = [Stream(name="five", lengths=np.full(5, 10))]
    run = Run(streams, MixConfig(token_budget=16), is_native=False)
    run.go_on([100] * 4)
    assert run.state is not None
    assert run.count(0).tolist() == [4 * 100 // 5] * 5


def test_shares_hold_over_changes_of_ranks() -> None:
    streams = [
        Stream(name="a", lengths=RNG.integers(1, 50, 900), share=3.0),
        Stream(name="b", lengths=RNG.integers(1, 20, 400)),
    ]
    run = Run(streams, MixConfig(token_budget=600), is_native=False)
    for world in (4, 1, 3, 2):
        run.go_on([16] * world)
    rows = [int((s.lengths * run.count(k)).sum()) for k, s in enumerate(streams)]
    assert abs(rows[0] / rows[1] / 3 - 1) < 0.01


def test_warmup_counts_on() -> None:
    """Three epochs of the first side over all ranks, however many there were."""
    streams = [
        Stream(name="image", lengths=np.full(100, 10), is_target=True),
        Stream(name="text", lengths=np.full(400, 10)),
    ]
    mix = MixConfig(policy="warmup", token_budget=200, warmup_epochs=3)
    run = Run(streams, mix, is_native=False)
    for world, packs in ((2, 10), (3, 8), (1, 15)):
        run.go_on([packs] * world)
        assert run.count(0).sum() == 0
    run.go_on([1])
    assert run.count(0).sum() == 0
    run.go_on([2])
    assert run.count(0).sum() > 0


def test_more_ranks_than_samples_is_an_error() -> None:
    streams = [Stream(name="few", lengths=np.full(3, 8))]
    mix = MixConfig(token_budget=40)
    layouts = make_layouts(streams, mix)
    with pytest.raises(ConfigError, match="few has 3 samples, fewer than the 4 ranks"):
        Planner(streams, layouts, mix, 0, 0, 4)


def test_foreign_states_are_refused_by_name() -> None:
    streams = [Stream(name="text", lengths=np.full(50, 8))]
    mix = MixConfig(token_budget=40)
    planners = [Planner(streams, make_layouts(streams, mix), mix, 0, r, 2) for r in range(2)]
    parts = [rank_state(p.save(), [-1], []) for p in planners]
    state = join(parts)
    with pytest.raises(ValueError, match="seed 0, this run has 1"):
        continue_from(state, streams, 1, 0, 1)
    other = [Stream(name="text", lengths=np.full(49, 8))]
    with pytest.raises(ValueError, match="other data for text: 50 samples"):
        continue_from(state, other, 0, 0, 1)
    with pytest.raises(ValueError, match="1 of 2 ranks; join"):
        continue_from(parts[0], streams, 0, 0, 2)
    for foreign in ({}, {"planner": [1, 0, 0, 1]}):
        with pytest.raises(ValueError, match="not a planner state"):
            continue_from(foreign, streams, 0, 0, 1)


def source(name: str, lengths: np.ndarray) -> Source:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    rows = np.zeros((int(offsets[-1]), 1), np.float32)
    return Source(name, rows, offsets, np.zeros(len(lengths), np.int32))


def test_slots_and_threads_do_not_matter() -> None:
    sources = (source("a", RNG.integers(1, 25, 80)), source("b", RNG.integers(1, 25, 9)))
    mix = MixConfig(token_budget=300)
    layouts = layouts_of(sources, mix)

    def loader(rank: int, world: int, slots: int) -> Loader:
        return Loader(
            sources, layouts, mix, 5, rank=rank, world=world, slots=slots, threads=1 + slots % 2
        )

    def packs(rank: int, world: int, slots: int, state: State | None) -> tuple[list, State]:
        with loader(rank, world, slots) as made:
            if state is not None:
                made.load_state_dict(state)
            out = [next(made)[0].sample_S.tolist() for _ in range(6)]
            return out, made.state_dict()

    first, second = (
        join([packs(rank, 2, slots, None)[1] for rank in range(2)]) for slots in (2, 5)
    )
    assert first == second
    a, b = (packs(1, 3, slots, first) for slots in (3, 4))
    assert a == b
