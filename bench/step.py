"""Speed of a training step on ragged data of MOSI's shape, against the release's way of doing it.

    python -m pytest bench/step.py     writes bench/results/step_<machine>.json

A step is forward, backward and optimiser, on batches in memory that are the same for both
providers. Before anything is timed, both train a few steps in fp32 without dropout and must give
the same losses, with the release's padding semantics and without; else the bench fails and prints
no time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import pytest
import torch

from bench import harness
from bench.plain import DEVICE, PlainStep, pad_batch
from bench.shapes import STEP_SHAPES, Samples, StepShape, draw_batches, layout, valid_tokens
from tests.plain_uml import PlainUml, adam, uml_fast_state
from uml_fast.cost.flops import measured_bandwidth, measured_peak
from uml_fast.model.compat import prediction_losses
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import pack_samples
from uml_fast.recipes.throughput import mosi
from uml_fast.runtime.device import resolve_dtype
from uml_fast.runtime.machine import machine_info
from uml_fast.training.step import TrainStep

DROPOUT = 0.1
CHECK_STEPS = 2
LOSS_TOLERANCE = 1e-4
"""Largest relative difference of the losses in fp32; rounding makes about 1e-6 in two steps."""
CLOCK = harness.RecordedClock()


class UmlFastStep:
    """One call is one training step of uml_fast on the next batch; returns the summed loss."""

    def __init__(
        self,
        batches: Sequence[Samples],
        shape: StepShape,
        dropout: float,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        seed: int = 0,
        compile: bool = False,
    ) -> None:
        torch.manual_seed(seed)
        config = dataclasses.replace(
            mosi(shape.width, shape.batch, dropout), precision=precision, compile=compile
        )
        self.dtype = resolve_dtype(precision, DEVICE)
        self.model = Uml(config, self.dtype).to(DEVICE)
        self.train_step = TrainStep(self.model, config, seed)
        packs = [pack_samples(layout(shape), batch) for batch in batches]
        rows = [int(p.valid_T().sum()) for p in packs]
        self.fill_pct = 100 * sum(rows) / (len(packs) * packs[0].layout.rows)
        self._packs = itertools.cycle([p.to(DEVICE) for p in packs])
        self._count = itertools.count()

    def __call__(self) -> float:
        return self.train_step(next(self._packs), next(self._count)).loss.item()


def check_equal_losses(shape: StepShape, batches: Sequence[Samples]) -> float:
    """Train both in fp32 without dropout; the largest relative difference of their losses.

    Raises:
        AssertionError: it is above LOSS_TOLERANCE.
    """
    ours = UmlFastStep(batches, shape, dropout=0.0, precision="fp32")
    sizes = {m: s[0].shape[1] for m, s in batches[0].items()}
    plain = PlainUml(sizes, shape.width, dropout=0.0).to(DEVICE)
    ours.model.load_state_dict(uml_fast_state(plain))
    optimizer = adam(plain)
    worst = 0.0
    for step in range(CHECK_STEPS):
        samples = batches[step % len(batches)]
        padded = pad_batch(samples)
        if step == 0:
            with torch.no_grad():
                released = plain.total_loss(padded, "release")[1]
                packed = pack_samples(layout(shape), samples).to(DEVICE)
                ours_released = prediction_losses(
                    ours.model, packed, ours.train_step.config, "release"
                )
            worst = max(abs(ours_released[m].item() / released[m].item() - 1) for m in released)
        total, _ = plain.total_loss(padded, "valid")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        worst = max(worst, abs(ours() / total.item() - 1))
    assert worst <= LOSS_TOLERANCE, (
        f"d={shape.width}: losses differ by {worst:.1e}; a speed-up would mean nothing"
    )
    return worst


@pytest.fixture(scope="module", params=STEP_SHAPES, ids=lambda s: f"d{s.width}")
def measured(request: pytest.FixtureRequest) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Rounds and the row of each provider at one shape."""
    shape: StepShape = request.param
    batches = draw_batches(shape)
    difference = check_equal_losses(shape, batches)
    ours = UmlFastStep(batches, shape, DROPOUT)
    steps = {"plain": PlainStep(batches, shape.width, DROPOUT), "uml_fast": ours}
    load_before = os.getloadavg()[0]
    seconds = harness.measure(
        steps,
        rounds={"plain": shape.plain_rounds, "uml_fast": shape.rounds},
        synchronize=torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None,
    )
    tokens = sum(valid_tokens(b) for b in batches) / len(batches)
    padded = sum(len(s) * max(map(len, s)) for b in batches for s in b.values()) / len(batches)
    fills = {"plain": 100 * tokens / padded, "uml_fast": ours.fill_pct}
    dtypes = {"plain": "float32", "uml_fast": str(ours.dtype).removeprefix("torch.")}
    peaks = {name: measured_peak(DEVICE, getattr(torch, dtype)) for name, dtype in dtypes.items()}
    bandwidth = measured_bandwidth(DEVICE)
    out = {}
    for provider, times in seconds.items():
        spread = harness.quantiles(times)
        out[provider] = (
            times,
            {
                "shape": "mosi",
                "d": shape.width,
                "batch": shape.batch,
                "provider": provider,
                "dtype": dtypes[provider],
                "valid_tokens_per_s": round(tokens / spread["p50_ms"] * 1000, 1),
                "valid_tokens": round(tokens, 1),
                "fill_pct": round(fills[provider], 2),
                **spread,
                "peak_tflops": round(peaks[provider] / 1e12, 3),
                "copy_gb_per_s": round(bandwidth / 1e9, 1),
                "rounds": len(times),
                "dropout": DROPOUT,
                "threads": torch.get_num_threads(),
                "load_before": round(load_before, 2),
                "loss_difference_fp32": difference,
            },
        )
    return out


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Collects the rows of all shapes and writes them when the last one is there."""
    collected: list[dict[str, Any]] = []
    yield collected
    if len(collected) == 2 * len(STEP_SHAPES):
        harness.write_rows(harness.RESULTS / f"step_{harness.machine_name()}.json", collected)


@pytest.mark.benchmark(group="step", timer=CLOCK)
@pytest.mark.parametrize("provider", ["plain", "uml_fast"])
def test_step(
    benchmark: Any,
    measured: dict[str, tuple[list[float], dict[str, Any]]],
    rows: list[dict[str, Any]],
    provider: str,
) -> None:
    seconds, row = measured[provider]
    CLOCK.load(seconds)
    benchmark.extra_info.update(row, **machine_info())
    benchmark.pedantic(lambda: None, rounds=len(seconds))
    rows.append(row)
