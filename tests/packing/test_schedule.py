"""The planner: every sample once an epoch, shares kept, packs full, the same after a restart."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uml_fast.config import ConfigError, MixConfig
from uml_fast.data.loading.packs import planner_args
from uml_fast.packing.layout import bucket, make_rules
from uml_fast.packing.pack import padding_slots
from uml_fast.packing.schedule import (
    Planner,
    Stream,
    hash64,
    make_layouts,
    sequential_plan,
    stream_key,
)
from uml_fast.runtime import native

RNG = np.random.default_rng(0)
RAGGED = np.clip(np.round(RNG.gamma(2.5, 7.6, 1284)), 3, 50).astype(np.int64)
AUDIO = RNG.integers(40, 401, 2000)
TEXT = RNG.integers(3, 65, 2000)


def stream(name: str, lengths: np.ndarray, share: float = 1.0, is_target: bool = False) -> Stream:
    return Stream(name=name, lengths=np.asarray(lengths), share=share, is_target=is_target)


def plan_rows(streams: list[Stream], mix: MixConfig, packs: int) -> tuple[np.ndarray, int]:
    """int64 (packs, streams) rows of samples in each joint pack, and the rows of a pack."""
    layouts = make_layouts(streams, mix)
    planner = Planner(streams, layouts, mix, 0)
    rows = [
        [int(s.lengths[i].sum()) for s, i in zip(streams, planner.next().samples, strict=True)]
        for _ in range(packs)
    ]
    return np.array(rows), layouts[0].rows


@st.composite
def mixes(draw: st.DrawFn) -> tuple[list[Stream], MixConfig, int]:
    """Small streams of any shape, with a budget that they fit."""
    streams = []
    for k in range(draw(st.integers(1, 3))):
        lengths = draw(st.lists(st.integers(1, 30), min_size=2, max_size=20))
        streams.append(stream(f"m{k}", np.array(lengths), draw(st.sampled_from([0.5, 1.0, 3.0]))))
    streams[0] = dataclasses.replace(streams[0], is_target=True)
    mix = MixConfig(
        policy=draw(st.sampled_from(["joint", "alternate", "warmup"])),
        token_budget=draw(st.sampled_from([800, 1000])),
        warmup_epochs=draw(st.sampled_from([0.0, 1.5])),
        warmup_first=draw(st.sampled_from(["target", "auxiliary"])),
    )
    return streams, mix, draw(st.integers(0, 2**40))


@settings(max_examples=40, deadline=None)
@given(mixes(), st.integers(1, 2))
def test_no_sample_runs_ahead_and_regions_hold_their_samples(case, world: int) -> None:
    streams, mix, seed = case
    layouts = make_layouts(streams, mix)
    planners = [Planner(streams, layouts, mix, seed, rank, world) for rank in range(world)]
    seen = {s.name: np.zeros(len(s.lengths), int) for s in streams}
    for _ in range(15):
        for planner in planners:
            plan = planner.next()
            layout = layouts[plan.layout]
            for m, (region, index) in enumerate(zip(layout.regions, plan.samples, strict=True)):
                lengths = next(s.lengths for s in streams if s.name == region.name)
                rest = region.rows - int(lengths[index].sum())
                assert rest >= 0
                assert len(index) + padding_slots(rest, region.max_len) <= region.slots
                for i, epoch in zip(index, plan.epochs[m], strict=True):
                    assert epoch == seen[region.name][i] or world > 1
                    seen[region.name][i] += 1
            assert sum(len(x) for x in plan.samples) > 0
        if world == 1:
            assert all(np.ptp(n) <= 1 for n in seen.values())
    epochs = planners[0].epochs()
    if world == 1:
        assert epochs == {s.name: seen[s.name].sum() / len(s.lengths) for s in streams}


@settings(max_examples=25, deadline=None)
@given(mixes(), st.integers(0, 12))
def test_restored_planner_continues(case, packs: int) -> None:
    streams, mix, seed = case
    layouts = make_layouts(streams, mix)
    first, second = (Planner(streams, layouts, mix, seed) for _ in range(2))
    for _ in range(packs):
        first.next()
    second.load(first.save())
    for _ in range(10):
        a, b = first.next(), second.next()
        assert a.layout == b.layout
        assert [x.tolist() for x in a.samples] == [x.tolist() for x in b.samples]
        assert [x.tolist() for x in a.epochs] == [x.tolist() for x in b.epochs]
    assert first.save() == second.save()


@pytest.mark.native
@settings(max_examples=40, deadline=None)
@given(mixes(), st.integers(1, 2))
def test_native_planner_gives_the_same_plans_and_states(case, world: int) -> None:
    streams, mix, seed = case
    layouts = make_layouts(streams, mix)
    for rank in range(world):
        reference = Planner(streams, layouts, mix, seed, rank, world)
        args = planner_args(streams, make_rules(streams, layouts, mix), seed, rank, world)
        extension = native.module()
        assert extension is not None
        planner = extension.Planner(**args)
        for _ in range(20):
            want, (layout, picks) = reference.next(), planner.next()
            assert layout == want.layout
            assert [x.tolist() for x, _ in picks] == [x.tolist() for x in want.samples]
            assert [e.tolist() for _, e in picks] == [e.tolist() for e in want.epochs]
        assert planner.save().tolist() == reference.save()


def test_hash_is_that_of_the_extension_and_never_changes() -> None:
    key = stream_key("image")
    values = hash64(3, key, 2, np.arange(4))
    assert values.tolist() == [
        1481230413637942438, 14169969862039032997, 12508672464101544718, 12017511328375368073,
    ]  # fmt: skip
    extension = native.module()
    if extension is not None:
        assert values.tolist() == [extension.hash64(3, key, 2, i) for i in range(4)]


@pytest.mark.parametrize(
    ("lengths", "shares", "budget", "fill"),
    [
        # MOSI's shape: about 31 samples a region
        ([RAGGED, RAGGED[::-1]], [1, 1], 1200, 0.985),
        # constant short, long ragged, short ragged
        ([np.full(2000, 16), AUDIO, TEXT], [1, 1, 1], 1536, 0.97),
        # three images a pack beside two or three recordings
        ([np.full(2000, 196), AUDIO, TEXT], [1, 1, 1], 2048, 0.95),
        ([np.full(2000, 196), AUDIO, TEXT], [3, 1, 0.5], 4096, 0.95),
        # one or two recordings a pack
        ([np.full(2000, 196), AUDIO, TEXT], [1, 1, 1], 1300, 0.95),
    ],
)
def test_shares_hold_in_every_window_and_packs_are_full(lengths, shares, budget, fill) -> None:
    streams = [stream(f"m{k}", n, a) for k, (n, a) in enumerate(zip(lengths, shares, strict=True))]
    rows, total = plan_rows(streams, MixConfig(token_budget=budget), 300)
    assert budget * 0.7 < total <= budget
    assert rows.sum() / (len(rows) * total) > fill
    sums = np.cumsum(np.vstack([np.zeros(len(shares)), rows]), 0)
    windows = sums[64:] - sums[:-64]
    got = windows / windows.sum(1, keepdims=True)
    want = np.array(shares) / sum(shares)
    assert np.abs(got / want - 1).max() < 0.01


def test_alternate_takes_the_modality_furthest_behind() -> None:
    streams = [stream("a", RAGGED, 3.0), stream("b", RAGGED, 1.0)]
    mix = MixConfig(policy="alternate", token_budget=600)
    layouts = make_layouts(streams, mix)
    planner = Planner(streams, layouts, mix, 0)
    order = [planner.next().layout for _ in range(40)]
    assert order.count(0) == 30
    assert [r.rows for x in layouts for r in x.regions] == [600, 600]


@pytest.mark.parametrize("first", ["target", "auxiliary"])
def test_warmup_trains_its_side_for_the_given_epochs_then_all(first) -> None:
    streams = [stream("image", RAGGED, is_target=True), stream("text", RAGGED[:500])]
    mix = MixConfig(policy="warmup", token_budget=800, warmup_epochs=2, warmup_first=first)
    layouts = make_layouts(streams, mix)
    side = "image" if first == "target" else "text"
    assert [r.name for r in layouts[0].regions] == [side]
    assert len(layouts[1].regions) == 2
    planner = Planner(streams, layouts, mix, 0)
    while planner.next().layout == 0:
        done = planner.epochs()
    assert 2 <= done[side] < 2.2
    other = "text" if side == "image" else "image"
    assert done[other] == 0
    rows = np.zeros(2)
    for _ in range(64):
        plan = planner.next()
        assert plan.layout == 1
        rows += [s.lengths[i].sum() for s, i in zip(streams, plan.samples, strict=True)]
    assert abs(rows[0] / rows[1] - 1) < 0.01


def test_warmup_of_the_target_alone_is_plain() -> None:
    mix = MixConfig(policy="warmup", token_budget=600, warmup_epochs=2)
    assert len(make_layouts([stream("image", RAGGED, is_target=True)], mix)) == 1


@pytest.mark.parametrize("lengths", [RAGGED, np.full(100, 16), np.full(100, 196), np.ones(9, int)])
def test_target_alone_gets_the_rows_of_its_joint_region(lengths) -> None:
    target = stream("target", lengths, 1.0, True)
    joint = make_layouts([target, stream("other", TEXT, 2.0)], MixConfig(token_budget=3000))[0]
    alone = make_layouts([target], MixConfig(token_budget=joint.regions[0].rows))[0]
    assert alone.regions == joint.regions[:1]


def test_order_does_not_depend_on_the_other_streams() -> None:
    target = stream("target", np.full(64, 10), 1.0, True)
    mix = MixConfig(token_budget=400)
    both = [stream("other", np.full(64, 10)), target]
    joint = Planner(both, make_layouts(both, mix), mix, 5)
    mix = MixConfig(token_budget=200)
    alone = Planner([target], make_layouts([target], mix), mix, 5)
    for _ in range(9):
        assert joint.next().samples[1].tolist() == alone.next().samples[0].tolist()


def test_too_long_a_sample_names_a_budget_that_works() -> None:
    streams = [stream("audio", [40, 400]), stream("text", TEXT)]
    with pytest.raises(
        ConfigError, match=r"audio: sample 1 has 400 rows.*token_budget=600"
    ) as error:
        make_layouts(streams, MixConfig(token_budget=600))
    found = re.search(r"at least (\d+)", str(error.value))
    assert found
    budget = int(found[1])
    layouts = make_layouts(streams, MixConfig(token_budget=budget))
    Planner(streams, layouts, MixConfig(token_budget=budget), 0).next()
    with pytest.raises(ConfigError):
        make_layouts(streams, MixConfig(token_budget=budget - 16))


def test_ranks_share_an_epoch_without_overlap() -> None:
    streams = [stream("text", np.full(30, 8))]
    mix = MixConfig(token_budget=40)
    layouts = make_layouts(streams, mix)
    planners = [Planner(streams, layouts, mix, 0, rank, 3) for rank in range(3)]
    seen = np.concatenate([p.next().samples[0] for _ in range(2) for p in planners])
    assert sorted(seen.tolist()) == list(range(30))
    with pytest.raises(ConfigError, match="fewer than the 31 ranks"):
        Planner(streams, layouts, mix, 0, 0, 31)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_sequential_plan_keeps_order_and_fits(lengths: list[int]) -> None:
    values = np.array(lengths)
    region = make_layouts([stream("text", values)], MixConfig(token_budget=64))[0].regions[0]
    packs = list(sequential_plan(values, region))
    assert np.concatenate(packs).tolist() == list(range(len(lengths)))
    for index in packs:
        rest = region.rows - int(values[index].sum())
        assert rest >= 0
        assert len(index) + padding_slots(rest, region.max_len) <= region.slots


def test_buckets_are_few_and_never_too_short() -> None:
    found = {bucket(n) for n in range(1, 513)}
    assert all(bucket(n) >= n and bucket(n) % 8 == 0 for n in range(1, 513))
    assert len(found) <= 20
