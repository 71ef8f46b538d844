"""Synthetic ragged data of a named shape, for the throughput recipe, for benches and for tests.

There is nothing to learn in it. What it keeps of real data is what speed depends on: modalities,
row sizes, dtypes, the spread of the lengths and the distribution of the values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import numpy as np

from uml_fast.config import DataConfig, RunConfig, require
from uml_fast.data.source import Source, Task

Shape = Literal["mosi", "mixed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stream:
    """Rows and lengths of one modality."""

    row_elems: int
    """Elements of a row."""
    dtype: Literal["float32", "uint8", "int16", "int32"]
    """Raw type: float32 standard normal, uint8 smooth pixels, int16 noise, int32 token ids."""
    shortest: int
    """Fewest rows of a sample."""
    longest: int
    """Most rows of a sample."""
    mean: float
    """Mean rows of a sample."""
    vocabulary: int = 0
    """Number of ids (int32); frequent ids are drawn more often, as words are."""


SHAPES: Mapping[Shape, Mapping[str, Stream]] = MappingProxyType(
    {
        "mosi": {
            "x": Stream(row_elems=20, dtype="float32", shortest=3, longest=50, mean=19),
            "y": Stream(row_elems=300, dtype="float32", shortest=3, longest=50, mean=19),
        },
        "mixed": {
            "image": Stream(row_elems=192, dtype="uint8", shortest=16, longest=16, mean=16),
            "audio": Stream(row_elems=640, dtype="int16", shortest=5, longest=100, mean=40),
            "text": Stream(
                row_elems=1, dtype="int32", shortest=3, longest=64, mean=18, vocabulary=4096
            ),
            "features": Stream(row_elems=35, dtype="float32", shortest=3, longest=50, mean=19),
        },
    }
)
"""Modalities of each shape, the target first. mosi: vision and GloVe of CMU-MOSI (paper 1.2)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig(DataConfig):
    """Random samples of a named shape with random labels."""

    shape: Shape = "mosi"
    """Which modalities, row sizes and lengths."""
    samples: int = 1024
    """Training samples of each modality."""
    held_out: int = 128
    """Samples of the target in the validation and in the test split."""
    classes: int = 2
    """Number of classes; labels are drawn evenly."""

    def __post_init__(self) -> None:
        require(self.shape in SHAPES, f"data.shape is {self.shape!r}; one of {sorted(SHAPES)}")
        require(
            self.samples >= self.classes,
            f"data.samples is {self.samples}; one for each class is needed",
        )
        require(
            self.held_out >= self.classes,
            f"data.held_out is {self.held_out}; one for each class is needed",
        )
        require(self.classes >= 2, f"data.classes is {self.classes}; it must be >= 2")

    def load(self, seed: int, mode: str, run: RunConfig | None = None) -> Task:
        """The samples of one trial; ``unimodal`` has the target alone, the same as in ``uml``."""
        streams = SHAPES[self.shape]
        target = next(iter(streams))
        wanted = (target,) if mode == "unimodal" else tuple(streams)

        def source(name: str, split: int, count: int) -> Source:
            place = list(streams).index(name)
            rng = np.random.Generator(np.random.Philox(key=[seed, 4 * place + split]))
            return draw(name, streams[name], count, self.classes, rng)

        return Task(
            train=tuple(source(name, 0, self.samples) for name in wanted),
            validation=source(target, 1, self.held_out),
            test=source(target, 2, self.held_out),
            class_names=tuple(f"class {c}" for c in range(self.classes)),
        )


def draw(name: str, stream: Stream, count: int, classes: int, rng: np.random.Generator) -> Source:
    """``count`` random samples; every class has one or more when ``count >= classes``."""
    lengths = draw_lengths(stream, count, rng)
    rows = draw_rows(stream, int(lengths.sum()), rng)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    labels = rng.permutation(np.arange(count) % classes).astype(np.int32)
    return Source(name, rows, offsets, labels)


def draw_lengths(stream: Stream, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 (count,) lengths, skewed to the right and cut off at the longest, as corpora are."""
    shape = (
        2.0  # at the mosi shape 2 % of the samples are cut at 50 rows, about one in a batch of 32
    )
    excess = rng.gamma(shape, (stream.mean - stream.shortest) / shape, count)
    return np.minimum(stream.shortest + np.rint(excess), stream.longest).astype(np.int64)


def draw_rows(stream: Stream, rows: int, rng: np.random.Generator) -> np.ndarray:
    """(rows, row_elems) values of the stream's raw type."""
    size = (rows, stream.row_elems)
    if stream.dtype == "float32":
        return rng.standard_normal(size, np.float32)
    if stream.dtype == "int16":
        return np.clip(np.rint(rng.standard_normal(size) * 3000), -32768, 32767).astype(np.int16)
    if stream.dtype == "int32":
        # Zipf's law over the vocabulary
        weight = 1 / np.arange(1, stream.vocabulary + 1)
        return rng.choice(stream.vocabulary, size, p=weight / weight.sum()).astype(np.int32)
    # neighbouring pixels of photographs are alike: a brightness per row, a drift, a little noise
    brightness = rng.normal(120, 45, (rows, 1))
    drift = np.cumsum(rng.normal(0, 3, size), axis=1)
    return np.clip(np.rint(brightness + drift + rng.normal(0, 4, size)), 0, 255).astype(np.uint8)
