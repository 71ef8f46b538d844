"""The fixed shapes of a run's packs, and the rules by which the planner fills them.

A region of share ``a`` has a quota of rows per pack proportional to ``a`` and slightly more rows
than that; modalities of constant length get whole samples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from uml_fast.config import ConfigError, MixConfig, require
from uml_fast.packing.pack import Layout, Region, padding_slots

SLACK = 0.01
"""Rows of a region above its quota, so that a modality that fell behind can catch up."""
ENOUGH_FILL = 0.97
"""Fill of a layout above which more rows are preferred to a higher fill."""
TRIED_COUNTS = 64
"""Whole numbers of constant-length samples per pack that are tried for a layout."""
ROW_ALIGN = 8
"""Regions are a multiple of this many rows, which keeps every slice of a pack aligned."""


def _aligned(rows: int) -> int:
    return -(-rows // ROW_ALIGN) * ROW_ALIGN


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Stream:
    """What the planner knows of one modality: lengths, never contents.

    Raises:
        ConfigError: no samples, an empty sample, or a share that is not positive.
    """

    name: str
    """Modality."""
    lengths: np.ndarray
    """int64 (n,) rows of each sample."""
    share: float = 1.0
    """Part in the token mix, relative to the other streams."""
    is_target: bool = False
    """Whether this is the modality that is evaluated; policy warmup divides the streams by it."""
    row_elems: int = 1
    """Elements of one raw row."""
    dtype: str = "float32"
    """numpy name of the raw element type."""

    def __post_init__(self) -> None:
        require(
            len(self.lengths) >= 1,
            f"{self.name} has no samples; give it data or take it out of the run",
        )
        require(
            int(self.lengths.min()) >= 1, f"{self.name} sample {self.lengths.argmin()} has no rows"
        )
        require(self.share > 0, f"{self.name}.share is {self.share}; it must be positive")

    @property
    def longest(self) -> int:
        """Rows of the longest sample."""
        return int(self.lengths.max())

    @property
    def is_constant(self) -> bool:
        """Whether all samples have the same length."""
        return int(self.lengths.min()) == self.longest

    @property
    def mean_length(self) -> int:
        """Mean rows of a sample, rounded down."""
        return int(self.lengths.sum()) // len(self.lengths)

    def rows_for(self, quota: float) -> int:
        """Rows of a region that takes ``quota`` rows a pack on average."""
        if self.is_constant:
            need = max(1, math.ceil(quota / self.longest - 1e-9)) * self.longest
        else:
            need = math.ceil(quota * (1 + SLACK) - 1e-9)
        return _aligned(need)

    def quota_of(self, rows: int) -> float:
        """The largest quota a region of ``rows`` rows is for."""
        if self.is_constant:
            return float(rows // self.longest * self.longest)
        return rows / (1 + SLACK)

    def slots_for(self, rows: int) -> int:
        """Segment slots for ``rows`` rows: mean number of samples plus four standard deviations."""
        mean = float(self.lengths.mean())
        spread = math.sqrt(rows * float(self.lengths.var()) / mean**3)
        most = -(-rows // int(self.lengths.min()))
        return max(2, min(most, math.ceil(rows / mean + 4 * spread) + 2))


def bucket(length: int) -> int:
    """``length`` rounded up to a multiple of 8, with four buckets an octave above 64."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _layout(streams: Sequence[Stream], token_budget: int) -> Layout:
    """The layout whose regions take rows in proportion to the shares and use the budget best."""

    def rows_at(pace: float) -> list[int]:
        return [s.rows_for(pace * s.share) for s in streams]

    total_share = sum(s.share for s in streams)
    low, high = 0.0, token_budget / total_share
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(rows_at(middle)) <= token_budget else (low, middle)
    paces = [low] + [
        s.longest * k / s.share
        for s in streams
        if s.is_constant
        for k in range(1, int(low * s.share / s.longest) + 1)[-TRIED_COUNTS:]
    ]
    candidates = [(pace, rows_at(pace)) for pace in paces]
    longest = [s.longest for s in streams]
    fitting = [c for c in candidates if all(r >= n for r, n in zip(c[1], longest, strict=True))]
    if not fitting or sum(fitting[0][1]) > token_budget:
        s = max(streams, key=lambda s: s.longest / s.share)
        least = max(
            (s.longest if s.is_constant else s.quota_of(_aligned(s.longest))) / s.share
            for s in streams
        )
        raise ConfigError(
            f"{s.name}: sample {int(s.lengths.argmax())} has {s.longest} rows, but of "
            f"mix.token_budget={token_budget} this modality gets "
            f"{int(token_budget * s.share / total_share)} rows a pack; set mix.token_budget to "
            f"at least {sum(rows_at(least))} or raise {s.name}.share"
        )
    fills = [pace * total_share / sum(rows) for pace, rows in fitting]
    enough = min(ENOUGH_FILL, max(fills))
    _, rows = max(x for x, fill in zip(fitting, fills, strict=True) if fill >= enough)
    return Layout(
        tuple(
            Region(
                name=s.name, rows=r, slots=s.slots_for(r), row_elems=s.row_elems, dtype=s.dtype,
                max_len=bucket(s.longest),
            )
            for s, r in zip(streams, rows, strict=True)
        )
    )  # fmt: skip


def make_layouts(streams: Sequence[Stream], mix: MixConfig) -> tuple[Layout, ...]:
    """The fixed shapes of a run's packs.

    One for ``joint``, one per stream for ``alternate`` (the whole budget each), two for ``warmup``:
    that of the first side alone, then the joint one. A run of the target alone that shall see as
    many target rows per pack takes the rows of the target's region in the joint layout as its
    ``token_budget``; it then gets a region of exactly that many rows.

    Raises:
        ConfigError: a sample is longer than its modality's part of the budget; says what would do.
    """
    if mix.policy == "alternate":
        return tuple(_layout([s], mix.token_budget) for s in streams)
    joint = _layout(streams, mix.token_budget)
    first = _first_side(streams, mix)
    return (_layout(first, mix.token_budget), joint) if first else (joint,)


def _first_side(streams: Sequence[Stream], mix: MixConfig) -> list[Stream]:
    """Streams that go first under ``warmup``; empty where the policy has nothing to separate."""
    if mix.policy != "warmup":
        return []
    first = [s for s in streams if s.is_target == (mix.warmup_first == "target")]
    return first if len(first) < len(streams) else []


@dataclass(frozen=True, slots=True)
class RegionRule:
    """How the planner fills one region."""

    stream: int
    rows: int
    slots: int
    max_len: int
    reserve: int
    """Rows kept for the one or two samples that close the gap."""
    close: int
    """Gap in rows that is small enough for a single sample; pairs would use up the short ones."""


@dataclass(frozen=True, slots=True)
class LayoutRule:
    """How the planner fills one layout."""

    regions: tuple[RegionRule, ...]
    order: tuple[int, ...]
    """Regions in the order they are filled: the one that sets the pace first."""
    pace: float
    """Rows per unit of share that a pack adds."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything the planner needs beside the lengths; both implementations get the same values."""

    policy: str
    layouts: tuple[LayoutRule, ...]
    first_side: tuple[int, ...]
    warmup_epochs: float


def make_rules(streams: Sequence[Stream], layouts: Sequence[Layout], mix: MixConfig) -> Rules:
    """Derive the planner's rules, checking that every sample fits its regions.

    Raises:
        ConfigError: a region of an unknown modality, or too small for one of its samples.
    """
    names = [s.name for s in streams]
    require(len(set(names)) == len(names), f"stream names are not unique: {names}")

    def rule(layout: Layout) -> LayoutRule:
        regions, paces, grain = [], [], []
        for r in layout.regions:
            require(
                r.name in names,
                f"the layout has a region for {r.name!r}, but there is no such stream in {names}",
            )
            s = streams[names.index(r.name)]
            room = min(r.rows, r.max_len)
            require(
                s.longest <= room and r.slots >= 1 + padding_slots(r.rows - s.longest, r.max_len),
                f"{r.name}: sample {int(s.lengths.argmax())} has {s.longest} rows; its region "
                f"takes samples of up to {room} rows in {r.rows} rows and {r.slots} slots",
            )
            regions.append(
                RegionRule(
                    names.index(r.name),
                    r.rows,
                    r.slots,
                    r.max_len,
                    2 * s.mean_length,
                    r.rows // 128,
                )
            )
            paces.append(s.quota_of(r.rows) / s.share)
            grain.append((s.longest if s.is_constant else s.mean_length / 4) / s.share)
        order = sorted(range(len(regions)), key=lambda m: -grain[m])
        return LayoutRule(tuple(regions), tuple(order), min(paces))

    first = tuple(names.index(s.name) for s in _first_side(streams, mix))
    count = {"joint": 1, "alternate": len(streams), "warmup": 2 if first else 1}[mix.policy]
    require(len(layouts) == count, f"policy {mix.policy} takes {count} layouts, got {len(layouts)}")
    return Rules(mix.policy, tuple(rule(x) for x in layouts), first, mix.warmup_epochs)
