"""The random numbers of one visit of a sample: splitmix64 from (seed, modality, epoch, sample).

A numpy generator takes 10 us to be seeded, as long as a small JPEG takes to decode; a number of
this stream takes 0.4 us and its array form is vectorised.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from uml_fast.packing.schedule import GOLDEN, hash64, mix64, stream_key

_MASK = (1 << 64) - 1


def visit_keys(
    seed: int, name: str, epochs: Sequence[int] | np.ndarray, samples: np.ndarray
) -> list[int]:
    """Key of each visit: ``schedule.hash64`` under a name of its own.

    The planner sorts an epoch by the same hash of the modality's name; under that name the numbers
    of a visit would follow from its place in the epoch.
    """
    stream = stream_key(f"{name} augment")
    keys: list[int] = hash64(seed, stream, np.asarray(epochs), samples).tolist()
    return keys


class Draws:
    """Numbers one after the other; the same key gives the same ones."""

    __slots__ = ("_state",)

    def __init__(self, key: int) -> None:
        self._state = key

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        self._state = state = (self._state + GOLDEN) & _MASK
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return low + (high - low) * ((z ^ (z >> 31)) >> 11) * 2.0**-53

    def below(self, n: int) -> int:
        """An integer in 0..n - 1."""
        return int(self.uniform() * n)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability

    def array(self, n: int) -> np.ndarray:
        """float64 (n,) in [0, 1): what ``uniform`` would give n times."""
        steps = np.uint64(GOLDEN) * np.arange(1, n + 1, dtype=np.uint64)
        z = mix64(np.uint64(self._state) + steps)
        self._state = (self._state + GOLDEN * n) & _MASK
        return (z >> np.uint64(11)) * 2.0**-53
