"""Training end to end from files on images, sounds and texts, against the strongest plain stack.

    python -m bench.train              writes bench/results/train_<machine>.json
    python -m bench.train --sizes s    some sizes alone; the others' rows stay

Both train the same network (ViT of the size, 224-pixel images, ragged sounds and texts, shared
head) in bf16 on the same shards; the plain stack is ``bench/train_plain.py``, with the number of
DataLoader workers that is fastest here. Before anything is timed, both get the same weights and
must give the same loss on the same samples. A round is some steps, loading and optimiser included;
providers take turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import cuda_timing, harness, loader_data
from bench import loader_providers as by
from bench.loader_providers import Part
from bench.train_plain import PlainStack, PlainTraining, copy_weights, pad
from uml_fast.config import EvalConfig, MixConfig, ObjectiveConfig, OptimConfig, RunConfig
from uml_fast.cost.flops import datasheet_peak, measured_peak
from uml_fast.data.folders import FoldersConfig
from uml_fast.data.source import Source
from uml_fast.modalities.audio import AudioConfig, to_rows
from uml_fast.modalities.image import ImageConfig, to_patches
from uml_fast.modalities.text import TextConfig
from uml_fast.model.objective import losses
from uml_fast.model.transformer import vit
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, Region, pack_samples
from uml_fast.training.meter import flops_per_row
from uml_fast.training.trial import Trial

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SIZES = ("ti", "s", "b", "l") if ON_GPU else ("ti",)
COUNT = 128 if ON_GPU else 8
"""Samples of each modality in a step."""
WORKERS = (4, 8, 14) if ON_GPU else (0, 1, 2)
ROUND_STEPS = 8 if ON_GPU else 2
ROUNDS = 12 if ON_GPU else 9
TOLERANCE = 2e-3
"""Largest relative difference of the losses in fp32; GELU and sums differ in rounding alone."""


def parts(count: int) -> tuple[Part, ...]:
    """The modalities and their samples in a step."""
    audio = AudioConfig(
        name="audio", sample_rate=loader_data.SAMPLE_RATE, row_samples=1280, frames=8, positions=64
    )
    return (
        Part("image224", ImageConfig(name="image", height=224, width=224), count,
             by.decode_simplejpeg),
        Part("audio", audio, count, by.decode_sound),
        Part("text", TextConfig(name="text", vocabulary=256, positions=256), count, by.decode_text),
    )  # fmt: skip


def config_of(size: str, found: Sequence[Part]) -> RunConfig:
    """The run of uml_fast: packs with ``count`` samples of each modality on average."""
    shares = {}
    for part in found:
        shards = loader_data.open_shards(part.data)
        rows = np.array([_tokens(part, int(n)) for n in shards.length[:, 0]], np.float64)
        shares[part.config.name] = part.count * float(rows.mean())
        shards.close()
    places = {p.config.name: str(loader_data.shard_paths(p.data)[0].parent) for p in found}
    return RunConfig(
        recipe="train",
        target="image",
        modalities=tuple(dataclasses.replace(p.config, share=shares[p.config.name]) for p in found),
        data=FoldersConfig(**places),  # type: ignore[arg-type]
        backbone=vit(size),  # type: ignore[arg-type]
        objective=ObjectiveConfig(kind="classification"),
        mix=MixConfig(token_budget=round(sum(shares.values()))),
        optim=OptimConfig(lr=1e-3, schedule="constant"),
        eval=EvalConfig(probe=False),
        steps=1_000_000,
        precision="bf16",
        compile=ON_GPU,
        out=Path(tempfile.mkdtemp()),
    )


def _tokens(part: Part, length: int) -> int:
    if isinstance(part.config, ImageConfig):
        return part.config.patches
    return -(-length // (part.config.row_samples if isinstance(part.config, AudioConfig) else 1))


def check_equal_losses(model: Uml, plain: PlainStack, config: RunConfig, found: Any) -> float:
    """Largest relative difference of the losses on the same samples, in fp32.

    Raises:
        AssertionError: they differ; a speed-up would mean nothing.
    """
    copy_weights(model, plain)
    fp32 = model.dtype
    model.dtype = torch.float32
    raw: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    regions, theirs = [], {}
    for part in found:
        shards = loader_data.open_shards(part.data)
        name = part.config.name
        samples = [part.decode(shards.payload(i)) for i in range(4)]
        label = np.arange(4)
        loss = plain(*(t.to(DEVICE) for t in pad(part, samples, label)), name)
        theirs[name] = float(loss)
        raw[name] = [_rows(part, s) for s in samples]
        labels[name] = label.tolist()
        source = Source.from_samples(name, raw[name])
        regions.append(Region(
            name=name, rows=len(source.rows), slots=4, row_elems=source.row_elems,
            dtype=source.row_dtype, max_len=int(source.lengths.max()),
        ))  # fmt: skip
        shards.close()
    batch = pack_samples(Layout(tuple(regions)), raw, labels).to(DEVICE)
    with torch.no_grad():
        ours = losses(model, batch, config, None)
    model.dtype = fp32
    worst = max(abs(float(ours[name]) / theirs[name] - 1) for name in theirs)
    assert worst <= TOLERANCE, f"losses differ by {worst:.1e}: {ours} and {theirs}"
    return worst


def _rows(part: Part, sample: np.ndarray) -> np.ndarray:
    c = part.config
    if isinstance(c, ImageConfig):
        return to_patches(sample[None], c.patch_height, c.patch_width)[0]
    if isinstance(c, AudioConfig):
        return to_rows(sample, c.row_samples)
    return sample.astype(np.int32)[:, None]


class Ours:
    """Training steps of uml_fast as ``Trial`` takes them."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.loader = trial._loader(None)
        self.steps = 0
        self._before = self.loader.stats()

    def step(self) -> torch.Tensor:
        """One optimiser step."""
        batch, _ = next(self.loader)
        self.steps += 1
        return self.trial.train_step(batch, self.steps - 1).loss

    def lap(self) -> dict[str, float]:
        """Counters since the last lap."""
        now, before = self.loader.stats(), self._before
        self._before = now
        return {k: now[k] - before.get(k, 0.0) for k in now}


def timed(step: Callable[[], object], steps: int) -> float:
    """Seconds of some steps."""
    _synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def _graphs() -> int:
    """Graphs that torch.compile has made."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _peak_gib() -> float:
    if ON_GPU:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def tuned(plain: PlainStack, found: Sequence[Part]) -> tuple[PlainTraining, int, float]:
    """The plain stack with the fastest workers, how many, and its first step in seconds."""
    rates: dict[int, float] = {}
    start_s = 0.0
    for workers in WORKERS:
        training = PlainTraining(plain, found, workers, DEVICE)
        first = timed(training.step, 1)
        start_s = start_s or first
        timed(training.step, 2 * ROUND_STEPS)  # the other padded lengths compile
        rates[workers] = timed(training.step, 2 * ROUND_STEPS)
        training.close()
    best = min(rates, key=lambda w: rates[w])
    return PlainTraining(plain, found, best, DEVICE), best, start_s


def measure(size: str) -> list[dict[str, Any]]:
    """Rows of both providers."""
    load_before = round(os.getloadavg()[0], 2)
    found = parts(COUNT)
    config = config_of(size, found)
    trial = Trial(config, "uml", 0, Path(str(config.out)) / "trial")
    plain = PlainStack(vit(size), found, len(trial.task.class_names)).to(DEVICE)  # type: ignore[arg-type]
    difference = check_equal_losses(trial.model, plain, trial.config, found)
    flops = {s.name: flops_per_row(trial.model, trial.config, s) for s in trial.task.train}
    baseline, workers, plain_start_s = tuned(plain, found)
    begun = time.perf_counter()
    ours = Ours(trial)
    ours.step()
    _synchronize()
    start_s = {"uml_fast": time.perf_counter() - begun, "plain": plain_start_s}
    for _ in range(2):
        timed(ours.step, ROUND_STEPS)
        timed(baseline.step, ROUND_STEPS)
    seconds: dict[str, list[float]] = {"uml_fast": [], "plain": []}
    rates: dict[str, list[dict[str, float]]] = {"uml_fast": [], "plain": []}
    stall = []
    peak: dict[str, float] = {}
    compiled = {"uml_fast": 0, "plain": 0}
    gc.collect()
    for turn in range(ROUNDS):
        for name in ("uml_fast", "plain") if turn % 2 else ("plain", "uml_fast"):
            if ON_GPU:
                torch.cuda.reset_peak_memory_stats()
            before = dict(baseline.valid)
            ours.lap()
            graphs = _graphs()
            took = timed(ours.step if name == "uml_fast" else baseline.step, ROUND_STEPS)
            compiled[name] += _graphs() - graphs
            lap = ours.lap()
            tokens = {
                m: lap[f"tokens/{m}"] if name == "uml_fast" else baseline.valid[m] - before[m]
                for m in flops
            }
            seconds[name].append(took / ROUND_STEPS)
            rates[name].append({m: n / took for m, n in tokens.items()})
            peak[name] = max(peak.get(name, 0.0), _peak_gib())
            if name == "uml_fast":
                stall.append(100 * lap["stall_s"] / took)
    fill = {
        "uml_fast": 100 * ours.loader.stats()["fill"],
        "plain": 100 * sum(baseline.valid.values()) / baseline.padded,
    }
    gaps = {
        name: round(cuda_timing.measured_gap_pct(step), 2) if ON_GPU else None
        for name, step in (("uml_fast", ours.step), ("plain", baseline.step))
    }
    per_sample = {p.config.name: config.modality(p.config.name).share / p.count for p in found}
    baseline.close()
    ours.loader.close()
    chip = torch.cuda.get_device_name() if ON_GPU else ""
    peaks = measured_peak(DEVICE, torch.bfloat16), datasheet_peak(chip, torch.bfloat16)
    total = {n: float(np.median([sum(r.values()) for r in rates[n]])) for n in rates}
    out = []
    for name, laps in rates.items():
        by_modality = {m: float(np.median([lap[m] for lap in laps])) for m in flops}
        useful = float(np.median([sum(flops[m] * lap[m] for m in flops) for lap in laps]))
        out.append({
            "size": size, "provider": name, "batch": COUNT, "px": 224,
            "tokens_per_s": round(total[name], 1),
            "times": round(total["uml_fast"] / total[name], 3),
            "tokens_per_s_by_modality": {m: round(r, 1) for m, r in by_modality.items()},
            "samples_per_s": {m: round(r / per_sample[m], 2) for m, r in by_modality.items()},
            "mfu": round(useful / peaks[0], 4),
            "mfu_datasheet": round(useful / peaks[1], 4) if peaks[1] else None,
            "fill_pct": round(fill[name], 1),
            "stall_pct": round(float(np.median(stall)), 2) if name == "uml_fast" else None,
            "peak_gib": round(peak[name], 2) if ON_GPU else None, "gap_pct": gaps[name],
            "recompiles": compiled[name],
            "first_step_s": round(start_s[name], 2),
            "workers": workers if name == "plain" else None,
            **harness.quantiles(seconds[name]), "rounds": ROUNDS,
            "threads": torch.get_num_threads(), "load_before": load_before,
            "loss_difference_fp32": difference,
        })  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the sizes and write their rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=("ti", "s", "b", "l"))
    rows = []
    for size in parser.parse_args(argv).sizes:
        rows += measure(size)
        path = harness.RESULTS / f"train_{harness.machine_name()}.json"
        harness.merge_rows(path, rows, ("size",))
        print(json.dumps(rows[-2:], indent=1))


if __name__ == "__main__":
    main()
