"""Decoded samples kept in memory: decoded once, the same rows, never more than the room."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile

from uml_fast.data.augment import AugmentConfig
from uml_fast.data.augment.audio import AudioAugment
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import DecodeError, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.kept import Room
from uml_fast.data.shards.source import ShardSource
from uml_fast.modalities.audio import AudioConfig
from uml_fast.prepare import Audio, build

CONFIG = AudioConfig(
    name="audio", sample_rate=8000, row_samples=160, frames=2, window=160, positions=30
)
SOUNDS = 10


class Counting:
    """Counts how often each payload is decoded."""

    def __init__(self) -> None:
        self.decode = decode_of(CONFIG)
        self.count = 0

    def __call__(self, payloads: Sequence[bytes]) -> list[np.ndarray | DecodeError]:
        self.count += len(payloads)
        return self.decode(payloads)


@pytest.fixture
def shards(tmp_path: Path):
    rng = np.random.default_rng(0)
    for i in range(SOUNDS):
        folder = tmp_path / "sounds" / f"c{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"{i}.wav", rng.normal(0, 0.1, 1600 + 16 * i), 8000)
    job = Audio(source=tmp_path / "sounds", out=tmp_path / "out", split="train=1").job()
    build(job, io.StringIO())
    with ShardSet.open(tmp_path / "out", "train") as found:
        yield found


def source_of(
    shards: ShardSet, decode: Counting, room: Room | None, augment: AugmentConfig
) -> ShardSource:
    return ShardSource(
        "audio", shards, decode, rows_of(CONFIG, augment), DataErrors(0), seed=3, room=room
    )


def three_epochs(source: ShardSource) -> np.ndarray:
    order = np.random.default_rng(1).permutation(SOUNDS)
    out = np.zeros((3, int(source.offsets[-1]), source.row_elems), source.row_dtype)
    for epoch in range(3):
        assert source.read(order, out[epoch], [epoch] * SOUNDS) == []
    return out


@pytest.mark.parametrize(
    "augment",
    [AugmentConfig(), AugmentConfig(audio=AudioAugment(gain_db=6, shift_s=0.1, noise=0.5))],
)
def test_a_sample_is_decoded_once_and_gives_the_same_rows(
    shards: ShardSet, augment: AugmentConfig
) -> None:
    again, once = Counting(), Counting()
    want = three_epochs(source_of(shards, again, None, augment))
    got = three_epochs(source_of(shards, once, Room(1 << 20), augment))
    np.testing.assert_array_equal(got, want)
    assert (again.count, once.count) == (3 * SOUNDS, SOUNDS)


def test_what_has_no_room_is_decoded_again(shards: ShardSet) -> None:
    largest = 2 * (1600 + 16 * SOUNDS)
    decode = Counting()
    three_epochs(source_of(shards, decode, Room(4 * largest), AugmentConfig()))
    assert SOUNDS + 2 * (SOUNDS - 5) <= decode.count <= SOUNDS + 2 * (SOUNDS - 4)


def test_sources_share_the_room(shards: ShardSet) -> None:
    room = Room(2 * (1600 * SOUNDS + 16 * 45))  # what one source needs
    first, second = Counting(), Counting()
    three_epochs(source_of(shards, first, room, AugmentConfig()))
    three_epochs(source_of(shards, second, room, AugmentConfig()))
    assert (first.count, second.count) == (SOUNDS, 3 * SOUNDS)
