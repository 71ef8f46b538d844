"""The shapes of the step bench and the batches all its providers get."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from uml_fast.data.synthetic import SHAPES, Stream, draw
from uml_fast.packing.pack import Layout, Region

Samples = Mapping[str, Sequence[np.ndarray]]
"""Samples of one batch per modality, each (rows, E)."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """One training step on data of MOSI's shape (paper 1.2)."""

    width: int
    """d, the width of the shared encoder."""
    batch: int
    """Samples of each modality in a step."""
    rounds: int
    """Rounds of uml_fast; the baseline gets ``plain_rounds``."""
    plain_rounds: int
    """Rounds of the baseline, which is slower."""

    @property
    def rows(self) -> int:
        """Rows of a region: what ``batch`` samples of the mean length have."""
        return round(self.batch * SHAPES["mosi"]["x"].mean)


STEP_SHAPES = (
    StepShape(width=40, batch=32, rounds=40, plain_rounds=20),
    StepShape(width=150, batch=128, rounds=12, plain_rounds=6),
    StepShape(width=300, batch=128, rounds=10, plain_rounds=5),
)


def draw_batches(shape: StepShape, count: int = 3, seed: int = 0) -> list[Samples]:
    """Batches of exactly ``shape.batch`` samples of each modality that fill a pack to 97 % or more.

    Random samples are drawn until that many fit: the baseline pads whatever it gets, and a pack
    needs a fixed number of rows (the planner of a run reaches it by choosing samples, not by
    drawing again).
    """
    rng = np.random.default_rng(seed)
    return [
        {m: _fitting(m, stream, shape, rng) for m, stream in SHAPES["mosi"].items()}
        for _ in range(count)
    ]


def _fitting(
    name: str, stream: Stream, shape: StepShape, rng: np.random.Generator
) -> list[np.ndarray]:
    while True:
        source = draw(name, stream, shape.batch, 2, rng)
        if 0.97 * shape.rows <= len(source.rows) <= shape.rows:
            return [source.sample(i) for i in range(len(source))]


def layout(shape: StepShape) -> Layout:
    """The pack of a step: a region for each modality."""
    return Layout(
        tuple(
            Region(
                name=m,
                rows=shape.rows,
                slots=shape.batch + 2,
                row_elems=s.row_elems,
                dtype=s.dtype,
                max_len=s.longest,
            )
            for m, s in SHAPES["mosi"].items()
        )
    )


def valid_tokens(batch: Samples) -> int:
    """Rows of samples, without any padding."""
    return sum(len(x) for samples in batch.values() for x in samples)
