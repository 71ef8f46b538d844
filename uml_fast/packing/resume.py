"""Where a run is in its samples: saved by all ranks together, continued by any number of them.

The state is a list of generations, one per number of ranks; the last one is the present. Each has
the state of every rank's planner (``Planner.save``: cursors and windows, never lists of samples)
and, per stream, the last epoch that had begun before it (``dealt``; -1: none).

Another number of ranks gets what no rank was given yet of the epochs that have begun: what is left
in each rank's window and behind its cursor, in the order (epoch, place in the epoch), dealt out in
turn. From the epoch after those on it takes every ``world``-th sample as ever. An older generation
is kept while some rank still has samples of what was dealt at its end.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from uml_fast.packing.layout import Stream
from uml_fast.packing.schedule import (
    STATE_FORMAT,
    STATE_HEADER,
    STREAM_STATE,
    Deal,
    Queue,
    epoch_order,
    rank_part,
    stream_identity,
)

_EPOCH, _CURSOR, _PHASE_ROWS, _SAMPLES, _ROWS, _WINDOW = 3, 4, 5, 6, 7, 8
"""Places in a stream's part of a planner's state."""


class Generation(TypedDict):
    """A time in which the number of ranks did not change."""

    dealt: list[int]
    """Per stream the last epoch of what its ranks were dealt at its start; -1: nothing."""
    ranks: list[list[int]]
    """State of each rank's planner at its end, or now."""


State = dict[str, list[Generation]]
"""``{"planner": generations}``, the oldest first: a JSON value."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank continues."""

    values: list[int]
    """State of its planner."""
    deals: tuple[Deal, ...]
    """What its streams were dealt."""
    dealt: list[int]
    """Per stream the last epoch of that."""
    before: list[Generation]
    """Earlier generations that a state still needs."""


def rank_state(values: list[int], dealt: list[int], before: Sequence[Generation]) -> State:
    """The state of one rank; ``join`` those of all ranks to the state of the run."""
    return {"planner": [*before, {"dealt": dealt, "ranks": [values]}]}


def join(states: Sequence[State]) -> State:
    """The state of the run from those of its ranks, in any order."""
    *before, present = states[0]["planner"]
    ranks = sorted((s["planner"][-1]["ranks"][0] for s in states), key=lambda values: values[2])
    generations = [*before, Generation(dealt=present["dealt"], ranks=ranks)]
    streams = range(len(present["dealt"]))
    return {"planner": generations[min(_first_needed(generations, k) for k in streams) :]}


def continue_from(
    state: Mapping[str, list[Generation]],
    streams: Sequence[Stream],
    seed: int,
    rank: int,
    world: int,
) -> Place:
    """Where ``rank`` of ``world`` continues a run that had any number of ranks.

    Raises:
        ValueError: the state is of other data or another seed, or lacks ranks; says which.
    """
    generations = list(state.get("planner", ()))
    _check(generations, streams, seed)
    *before, present = generations
    if len(present["ranks"]) == world:
        pairs = [_dealt(before, present["dealt"][k], k, s, seed) for k, s in enumerate(streams)]
        deals = tuple(
            _share(p, through, rank, world)
            for p, through in zip(pairs, present["dealt"], strict=True)
        )
        return Place(present["ranks"][rank], deals, present["dealt"], before)
    through = [_through(present, k) for k in range(len(streams))]
    pairs = [_dealt(generations, through[k], k, s, seed) for k, s in enumerate(streams)]
    deals = tuple(_share(p, e, rank, world) for p, e in zip(pairs, through, strict=True))
    values = _head(present, seed, rank, world)
    for k, s in enumerate(streams):
        queue = Queue(s, seed, rank, world, deals[k])
        queue.phase_rows = _split(_total(present, k, _PHASE_ROWS), rank, world)
        queue.samples = _split(_total(present, k, _SAMPLES), rank, world)
        queue.rows = _split(_total(present, k, _ROWS), rank, world)
        values += queue.save()
    return Place(values, deals, through, generations)


def left_over(
    state: State, streams: Sequence[Stream], seed: int
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Per stream what no rank was given yet: the last epoch that has begun, epochs and samples.

    Both arrays are int64 (k,), in the order (epoch, place in the epoch), and end with that epoch.
    """
    out = []
    for k, s in enumerate(streams):
        through = _through(state["planner"][-1], k)
        pairs = _dealt(state["planner"], through, k, s, seed)
        out.append((through, pairs[:, 0], pairs[:, 1]))
    return out


def _share(pairs: np.ndarray, through: int, rank: int, world: int) -> Deal:
    """A rank's part of what all of them are dealt."""
    part = pairs[rank::world]
    return Deal(through, np.ascontiguousarray(part[:, 0]), np.ascontiguousarray(part[:, 1]))


def _part(values: Sequence[int], k: int) -> Sequence[int]:
    """Stream ``k``'s part of a planner's state."""
    at = STATE_HEADER + k * STREAM_STATE
    return values[at : at + STREAM_STATE]


def _heads(generation: Generation, k: int) -> list[int]:
    """Per rank the epoch of the sample that comes next."""
    return [_part(values, k)[_WINDOW] for values in generation["ranks"]]


def _through(generation: Generation, k: int) -> int:
    """Last epoch that has begun at the end of a generation, on any rank."""
    return max(generation["dealt"][k], *_heads(generation, k))


def _first_needed(generations: Sequence[Generation], k: int) -> int:
    """The first generation that tells what the ranks of the last one have left."""
    at = len(generations) - 1
    while at > 0 and min(_heads(generations[at], k)) <= generations[at]["dealt"][k]:
        at -= 1
    return at


def _dealt(
    generations: Sequence[Generation], through: int, k: int, stream: Stream, seed: int
) -> np.ndarray:
    """int64 (k, 2) epoch and sample of what the ranks after ``generations`` are dealt."""
    pairs = np.empty((0, 2), np.int64)
    if through < 0 or not generations:
        return pairs
    for at in range(_first_needed(generations, k), len(generations)):
        pairs = _left(generations[at], pairs, k, stream, seed)
    return pairs


def _left(
    generation: Generation, dealt: np.ndarray, k: int, stream: Stream, seed: int
) -> np.ndarray:
    """Epoch and sample of what the ranks of a generation have left of the epochs that have begun.

    ``dealt`` is what they were dealt at its start.
    """
    world, last, through = len(generation["ranks"]), generation["dealt"][k], _through(generation, k)

    @functools.cache
    def order(epoch: int) -> np.ndarray:
        return epoch_order(stream, seed, epoch)

    left = []
    for rank, values in enumerate(generation["ranks"]):
        part = np.array(_part(values, k), np.int64)
        window = part[_WINDOW:].reshape(-1, 2)
        left.append(window[window[:, 0] <= through])
        epoch, cursor = int(part[_EPOCH]), int(part[_CURSOR])
        if epoch == last:
            left.append(dealt[rank::world][cursor:])
            epoch, cursor = epoch + 1, 0
        for e in range(epoch, through + 1):
            samples = rank_part(order(e), e, rank, world)[cursor:]
            left.append(np.column_stack([np.full(len(samples), e), samples]))
            cursor = 0
    pairs = np.concatenate(left)
    ordered = []
    for e in np.unique(pairs[:, 0]).tolist():
        is_left = np.zeros(len(stream.lengths), bool)
        is_left[pairs[pairs[:, 0] == e, 1]] = True
        samples = order(e)[is_left[order(e)]]
        ordered.append(np.column_stack([np.full(len(samples), e), samples]))
    return np.concatenate([np.empty((0, 2), np.int64), *ordered])


def _total(generation: Generation, k: int, place: int) -> int:
    """Sum of a counter over the ranks.

    Rows of a phase count where the warm-up is over, if it is over on any rank: all ranks then go on
    without it.
    """
    ranks = generation["ranks"]
    if place == _PHASE_ROWS and not all(values[5] for values in ranks):
        ranks = [values for values in ranks if not values[5]]
    return sum(_part(values, k)[place] for values in ranks)


def _split(total: int, rank: int, world: int) -> int:
    return total // world + (rank < total % world)


def _head(generation: Generation, seed: int, rank: int, world: int) -> list[int]:
    """Header of the state of a rank that continues."""
    ranks = generation["ranks"]
    warm = int(all(values[5] for values in ranks))
    return [STATE_FORMAT, seed, rank, world, max(v[4] for v in ranks), warm, ranks[0][6]]


def _check(generations: Sequence[Generation], streams: Sequence[Stream], seed: int) -> None:
    """Raise ValueError unless the generations belong to these streams and this seed."""
    foreign = "not a planner state of this version of uml_fast"
    if not generations:
        raise ValueError(foreign)
    for generation in generations:
        if not isinstance(generation, Mapping) or len(generation["dealt"]) != len(streams):
            raise ValueError(foreign)
        for rank, values in enumerate(generation["ranks"]):
            if len(values) < STATE_HEADER or values[0] != STATE_FORMAT:
                raise ValueError(foreign)
            if values[1] != seed:
                raise ValueError(
                    f"the planner state was saved with seed {values[1]}, this run has {seed}"
                )
            if values[2] != rank or values[3] != len(generation["ranks"]):
                raise ValueError(
                    f"the planner state holds {len(generation['ranks'])} of {values[3]} ranks; "
                    "join the states of all of them"
                )
            _check_streams(values, streams)


def _check_streams(values: Sequence[int], streams: Sequence[Stream]) -> None:
    size = STATE_HEADER + len(streams) * STREAM_STATE
    if values[STATE_HEADER - 1] != len(streams) or len(values) != size:
        raise ValueError(
            f"the planner state holds {values[STATE_HEADER - 1]} streams, this run has "
            f"{len(streams)}"
        )
    for k, s in enumerate(streams):
        saved = tuple(_part(values, k)[:3])
        if saved != stream_identity(s):
            raise ValueError(
                f"the planner state was saved with other data for {s.name}: {saved[1]} samples of "
                f"{saved[2]} rows in total; this run has {len(s.lengths)} of "
                f"{int(s.lengths.sum())}"
            )
