"""The loader bench gives its baselines whole epochs, no padding, and their best workers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bench import loader, loader_providers


def test_every_epoch_of_the_baseline_has_every_sample_once() -> None:
    batches = itertools.islice(loader_providers._Shuffled([10, 7], [4, 2]), 35)
    first, second = (np.concatenate(x) for x in zip(*batches, strict=True))
    for samples, size in ((first, 10), (second, 7)):
        epochs = samples.reshape(-1, size)
        assert (np.sort(epochs, 1) == np.arange(size)).all()
        assert (epochs[0] != epochs[1]).any()


def test_ragged_samples_lie_end_to_end() -> None:
    samples = [np.arange(n, dtype=np.int16) for n in (3, 1, 2)]
    rows, lengths, labels = loader_providers.gathered(samples, [5, 6, 7])
    assert rows.tolist() == [0, 1, 2, 0, 0, 1]
    assert (lengths.tolist(), labels.tolist()) == ([3, 1, 2], [5, 6, 7])


class Fake:
    """A provider whose batches take a given time, the first ones none."""

    def __init__(self, ready: int) -> None:
        self.taken, self.ready = 0, ready

    def next(self) -> int:
        self.taken += 1
        return 8

    def ahead(self) -> int:
        return self.ready

    def close(self) -> None: ...


def test_what_lies_ready_is_not_timed() -> None:
    provider = Fake(ready=3)
    turn = loader.take(provider, 0.0)
    assert (turn.samples, provider.taken) == (8 * (provider.taken - 3), 4)


def test_the_fastest_number_of_workers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    speed = {0: 10, 1: 30, 2: 20}
    monkeypatch.setattr(loader, "take", lambda p, s: loader.Turn(1.0, speed[p.ready], 0.0))
    provider, workers = loader.tuned(Fake)
    assert workers == 1
    assert provider.ready == 1
