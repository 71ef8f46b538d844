"""Which samples go into which pack: the readable definition that ``csrc/core/planner.cpp`` repeats.

Both give the same plans, bit for bit; this one also runs where the extension is missing. All
decisions are made on integers and IEEE doubles in a fixed order of operations.

Order of a stream: epoch ``e`` visits samples by ``hash64(seed, stream, e, i)``, ties by ``i``. Of
the places of all epochs one after the other, rank ``r`` of ``world`` takes every ``world``-th from
``r`` on, so that uneven parts even out. A window holds the next 64 of them. A region takes the
oldest first, then the one or two of the window that bring it nearest to its target, and never a
sample of the next epoch before the last of this one. So no sample is ever handed out twice more
often than another.

Ratio: the region with the coarsest samples sets the pace, one quota ahead of the modality furthest
behind, and the others follow what it reached. So the totals stay proportional to the shares
whatever the lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from uml_fast.config import MixConfig, require
from uml_fast.packing.layout import RegionRule, make_rules
from uml_fast.packing.layout import Stream as Stream
from uml_fast.packing.layout import make_layouts as make_layouts
from uml_fast.packing.pack import Layout, Region, padding_slots

WINDOW = 64
"""Samples of each stream that a pack can choose from."""
STATE_FORMAT = 2
"""Version of a planner's state: a list of integers, a header and one part per stream."""
STATE_HEADER = 7
"""Integers of the header: format, seed, rank, world, packs, is warming up, number of streams."""
STREAM_STATE = 8 + 2 * WINDOW
"""Integers of a stream: key, samples and rows it has; epoch, cursor, rows of this phase, samples
and rows so far; epoch and index of each sample in the window."""
GOLDEN = 0x9E3779B97F4A7C15
"""Step of splitmix64."""
_MASK = (1 << 64) - 1


def mix64(z: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64, a bijection of uint64 values."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def hash64(seed: int, stream: int, epoch: int | np.ndarray, index: np.ndarray) -> np.ndarray:
    """uint64 hash of (seed, stream, epoch, index[i]), or of epoch[i] where they differ.

    ``h = mix64(h + golden * (x + 1))`` over the four values x, from h = 0, modulo 2**64.
    """
    h = np.zeros(1, np.uint64)
    for x in (seed, stream, epoch, index):
        values = np.asarray(x & _MASK if isinstance(x, int) else x).astype(np.uint64)
        h = mix64(h + np.uint64(GOLDEN) * (values.reshape(-1) + np.uint64(1)))
    return h


def stream_key(name: str) -> int:
    """FNV-1a of the name: a stream keeps its order when other streams join the run."""
    h = 0xCBF29CE484222325
    for byte in name.encode():
        h = ((h ^ byte) * 0x100000001B3) & _MASK
    return h


@dataclass(frozen=True, slots=True)
class PackPlan:
    """The samples of one pack."""

    layout: int
    """Index of the layout."""
    samples: tuple[np.ndarray, ...]
    """Per region int64 sample indices in packed order."""
    epochs: tuple[np.ndarray, ...]
    """Per region int64 epoch that each of these samples is taken from."""


@dataclass(frozen=True, slots=True)
class Deal:
    """What a rank still gets of the epochs that had begun when the number of ranks changed."""

    through: int = -1
    """Last of those epochs; -1: there are none."""
    epochs: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 (k,) epoch of each sample, rising."""
    samples: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """int64 (k,) samples in the order in which they come."""


def epoch_order(stream: Stream, seed: int, epoch: int) -> np.ndarray:
    """int64 (n,) samples of a stream in the order in which ``epoch`` visits them."""
    index = np.arange(len(stream.lengths))
    return np.argsort(hash64(seed, stream_key(stream.name), epoch, index), kind="stable")


def rank_part(order: np.ndarray, epoch: int, rank: int, world: int) -> np.ndarray:
    """The samples of ``order`` that a rank takes in ``epoch``."""
    return order[(rank - epoch * len(order)) % world :: world]


class Queue:
    """The samples of one stream to come: a window of the next 64 in the order of their epochs."""

    def __init__(
        self, stream: Stream, seed: int, rank: int, world: int, deal: Deal | None = None
    ) -> None:
        self.stream, self.seed, self.rank, self.world = stream, seed, rank, world
        self.deal = Deal() if deal is None else deal
        self.phase_rows = self.samples = self.rows = 0
        self.seek(max(0, self.deal.through), 0)
        self.window: list[tuple[int, int]] = []
        self.lengths: list[int] = []
        self.refill()

    def seek(self, epoch: int, cursor: int) -> None:
        """Go to a position in this rank's part of ``epoch``, or in what it was dealt."""
        if epoch == self.deal.through:
            self.epochs, self.order = self.deal.epochs, self.deal.samples
        else:
            order = epoch_order(self.stream, self.seed, epoch)
            self.order = rank_part(order, epoch, self.rank, self.world)
            self.epochs = np.broadcast_to(np.int64(epoch), self.order.shape)
        self.epoch, self.cursor = epoch, cursor

    def refill(self) -> None:
        """Fill the window up."""
        while len(self.window) < WINDOW:
            if self.cursor == len(self.order):
                self.seek(self.epoch + 1, 0)
            i = int(self.order[self.cursor])
            self.window.append((int(self.epochs[self.cursor]), i))
            self.lengths.append(int(self.stream.lengths[i]))
            self.cursor += 1

    def save(self) -> list[int]:
        """This stream's part of a state."""
        head = [self.epoch, self.cursor, self.phase_rows, self.samples, self.rows]
        return [*stream_identity(self.stream), *head, *(x for pair in self.window for x in pair)]

    def load(self, values: Sequence[int], deal: Deal) -> None:
        """Go to where ``save`` was called on a queue with the same ``deal``."""
        self.deal = deal
        epoch, cursor, self.phase_rows, self.samples, self.rows = values[3:8]
        self.seek(epoch, cursor)
        self.window = list(zip(values[8::2], values[9::2], strict=True))
        self.lengths = [int(self.stream.lengths[i]) for _, i in self.window]

    def take(self, position: int) -> tuple[int, int]:
        """Remove the sample at ``position`` of the window; its epoch and index."""
        taken = self.window.pop(position)
        n = self.lengths.pop(position)
        self.phase_rows += n
        self.rows += n
        self.samples += 1
        self.refill()
        return taken

    def group(self, rem: int, room: int, count: int, rule: RegionRule) -> tuple[int, ...]:
        """Window positions of the one or two samples that leave least of ``rem``; maybe none."""
        best = abs(rem)
        choice: tuple[int, ...] = ()
        if best == 0:
            return choice
        epoch = self.window[0][0]
        head = next((k for k, (e, _) in enumerate(self.window) if e != epoch), WINDOW)
        lengths = np.array(self.lengths[:head], np.int64)

        def cost(sums: np.ndarray, taken: int) -> np.ndarray:
            rest = room - sums
            ok = (rest >= 0) & (count + taken - (-rest // rule.max_len) <= rule.slots)
            return np.where(ok, np.abs(rem - sums), best)

        one = cost(lengths, 1)
        if one.min() < best:
            best, choice = int(one.min()), (int(one.argmin()),)
            if best <= rule.close:
                return choice
        two = np.where(np.tri(head, dtype=bool), best, cost(lengths[:, None] + lengths, 2))
        if two.min() < best:
            i, j = divmod(int(two.argmin()), head)
            choice = (i, j)
        return choice

    def fill(self, target: int, rule: RegionRule) -> list[tuple[int, int]]:
        """Take samples for one region so that their rows come nearest to ``target``."""
        picks: list[tuple[int, int]] = []
        taken = 0
        while True:
            rem, room, n = target - taken, rule.rows - taken, self.lengths[0]
            fits = (
                n <= room and len(picks) + 1 + padding_slots(room - n, rule.max_len) <= rule.slots
            )
            if fits and (rem - n >= rule.reserve or (not picks and abs(rem - n) < abs(rem))):
                chosen: tuple[int, ...] = (0,)
            else:
                chosen = self.group(rem, room, len(picks), rule)
            if not chosen:
                return picks
            taken += sum(self.lengths[k] for k in chosen)
            picks += [self.take(k - shift) for shift, k in enumerate(chosen)]


class Planner:
    """Plans pack after pack, for ever: a stream that ends starts its next epoch in another order.

    ``rank`` of ``world`` takes every ``world``-th sample of the common order.

    Raises:
        ConfigError: a sample does not fit its region, or a stream has fewer samples than ranks.
    """

    def __init__(
        self, streams: Sequence[Stream], layouts: Sequence[Layout], mix: MixConfig, seed: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        check_ranks(streams, rank, world)
        self._rules = make_rules(streams, layouts, mix)
        self._queues = [Queue(s, seed, rank, world) for s in streams]
        self._identity = (STATE_FORMAT, seed, rank, world)
        self._packs, self._warm = 0, bool(self._rules.first_side)

    def next(self) -> PackPlan:
        """The next pack."""
        if self._warm and self._first_side_done():
            self._warm = False
            for q in self._queues:
                q.phase_rows = 0
        index = self._layout_index()
        rule = self._rules.layouts[index]
        queues = [self._queues[r.stream] for r in rule.regions]
        shares = [q.stream.share for q in queues]
        reach = min(q.phase_rows / a for q, a in zip(queues, shares, strict=True))
        picks: list[list[tuple[int, int]]] = [[] for _ in queues]
        while not any(picks):
            reach += rule.pace
            ahead = reach
            for k, m in enumerate(rule.order):
                target = math.floor(ahead * shares[m] + 0.5) - queues[m].phase_rows
                picks[m] = queues[m].fill(target, rule.regions[m])
                if k == 0:
                    ahead = queues[m].phase_rows / shares[m]
        self._packs += 1
        pairs = [np.array(x, np.int64).reshape(-1, 2) for x in picks]
        return PackPlan(index, tuple(p[:, 1] for p in pairs), tuple(p[:, 0] for p in pairs))

    def _first_side_done(self) -> bool:
        side = [self._queues[i] for i in self._rules.first_side]
        return all(
            q.samples * q.world >= self._rules.warmup_epochs * len(q.stream.lengths) for q in side
        )

    def _layout_index(self) -> int:
        if self._rules.policy == "alternate":
            behind = [q.phase_rows / q.stream.share for q in self._queues]
            return behind.index(min(behind))
        return 0 if self._warm else len(self._rules.layouts) - 1

    def epochs(self) -> dict[str, float]:
        """Passes over each stream so far, in epochs of all ranks together."""
        return {q.stream.name: q.samples * q.world / len(q.stream.lengths) for q in self._queues}

    def save(self) -> list[int]:
        """Where the planner is: a few hundred integers a stream."""
        state = [*self._identity, self._packs, int(self._warm), len(self._queues)]
        return state + [x for q in self._queues for x in q.save()]

    def load(self, values: Sequence[int], deals: Sequence[Deal] = ()) -> None:
        """Continue where ``save`` was called on the planner of this rank.

        ``deals`` are what its streams were dealt (``uml_fast.packing.resume``); none: nothing.
        """
        self._packs, self._warm = values[4], bool(values[5])
        for k, q in enumerate(self._queues):
            at = STATE_HEADER + k * STREAM_STATE
            q.load(values[at : at + STREAM_STATE], deals[k] if deals else Deal())


def check_ranks(streams: Sequence[Stream], rank: int, world: int) -> None:
    """Raise ConfigError unless every rank gets samples of every stream."""
    require(0 <= rank < world, f"rank {rank} is not one of {world} ranks")
    for s in streams:
        require(
            len(s.lengths) >= world,
            f"{s.name} has {len(s.lengths)} samples, fewer than the {world} ranks",
        )


def stream_identity(stream: Stream) -> tuple[int, int, int]:
    """What tells a stream from another in a state: name, number of samples, number of rows."""
    key = stream_key(stream.name)
    return (key - (1 << 64) if key >> 63 else key, len(stream.lengths), int(stream.lengths.sum()))


def sequential_plan(lengths: np.ndarray, region: Region) -> Iterator[np.ndarray]:
    """Each sample once, in order, as many to a pack as fit; for evaluation.

    Yields int64 sample indices of one pack after another; the last may be partly empty.

    Raises:
        ConfigError: a sample is longer than the region takes.
    """
    room = min(region.rows, region.max_len)
    first = rows = 0
    for i, n in enumerate(lengths.tolist()):
        require(
            n <= room and region.slots >= 1 + padding_slots(region.rows - n, region.max_len),
            f"{region.name}: sample {i} has {n} rows; its region takes up to {room}",
        )
        rest = region.rows - rows - n
        if rest < 0 or i - first + 1 + padding_slots(rest, region.max_len) > region.slots:
            yield np.arange(first, i)
            first, rows = i, 0
        rows += n
    yield np.arange(first, len(lengths))
