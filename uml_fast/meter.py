"""Throughput of a trial between two log lines: rows and samples per second, MFU, stall and fill."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from uml_fast.config import RunConfig
from uml_fast.data.loader import Loader
from uml_fast.data.source import Samples
from uml_fast.device import resolve_dtype
from uml_fast.flops import (
    datasheet_peak,
    linear_flops,
    measured_peak,
    training_flops,
    transformer_flops,
)
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import Uml


def flops_per_row(model: Uml, config: RunConfig, source: Samples) -> float:
    """Useful operations of forward and backward per row of a modality, averaged over its samples.

    Only matrix products of the model count (``uml_fast.flops``): stem, backbone and decoder.
    """
    rows = int(source.offsets[-1])
    modality = model.modality(source.name)
    stem = 0
    if isinstance(modality.stem, torch.nn.Linear):
        stem = linear_flops(rows, modality.stem.in_features, modality.stem.out_features)
    forward = stem
    if isinstance(config.backbone, TransformerConfig):
        b = config.backbone
        forward += transformer_flops(
            b.width, b.layers, b.feed_forward, source.lengths, causal=b.causal,
            gated=b.activation == "swiglu",
        )  # fmt: skip
        if b.input_projection:
            forward += linear_flops(rows, b.width, b.width)
    else:
        weights = [m for m in model.backbone.modules() if isinstance(m, torch.nn.Linear)]
        forward += sum(linear_flops(rows, m.in_features, m.out_features) for m in weights)
    if modality.decoder is not None:
        forward += linear_flops(rows, modality.decoder.in_features, modality.decoder.out_features)
    return training_flops(forward, first_layer=stem) / rows


Lap = dict[str, float | dict[str, float]]
"""What was measured between two log lines; inner dictionaries are by stage or modality."""


def combine(laps: Sequence[Lap]) -> Lap:
    """The laps of all ranks as one: rates add up, times and shares are averaged."""
    if len(laps) == 1:
        return laps[0]
    out: Lap = {}
    for name in dict.fromkeys(name for lap in laps for name in lap):
        values = [lap.get(name, 0.0) for lap in laps]
        inner = [v for v in values if isinstance(v, dict)]
        if inner:
            keys = dict.fromkeys(key for v in inner for key in v)
            out[name] = {k: sum(v.get(k, 0.0) for v in inner) / len(laps) for k in keys}
        else:
            total = sum(v for v in values if not isinstance(v, dict))
            out[name] = total if name.endswith("_per_s") else total / len(laps)
    return out


class Meter:
    """Reads the loader's counters and the clock; ``lap`` gives the rates since the last lap."""

    def __init__(
        self,
        model: Uml,
        config: RunConfig,
        sources: tuple[Samples, ...],
        loader: Loader,
        device: torch.device,
    ) -> None:
        self.loader = loader
        self.flops = {s.name: flops_per_row(model, config, s) for s in sources}
        dtype = resolve_dtype(config.precision, device)
        self.peak = measured_peak(device, dtype)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.datasheet = datasheet_peak(name, dtype)
        self.restart()

    def restart(self) -> None:
        """Begin a lap now."""
        self.started = time.perf_counter()
        self.before = self.loader.stats()

    def lap(self) -> Lap:
        """Rates since the last lap; begins the next one.

        ``stages`` are what the loader's slots were in, in % of their time. ``stall_ms`` is what
        the trial waited for, and ``read_ms``, ``decode_ms``, ``assemble_ms`` the threads' time
        by modality, in milliseconds a pack.
        """
        now, stats, before = time.perf_counter(), self.loader.stats(), self.before
        seconds = now - self.started
        tokens = {name: stats[f"tokens/{name}"] - before[f"tokens/{name}"] for name in self.flops}
        samples = sum(stats[f"samples/{name}"] - before[f"samples/{name}"] for name in self.flops)
        useful = sum(self.flops[name] * n for name, n in tokens.items()) / seconds
        out: Lap = {
            "tokens_per_s": sum(tokens.values()) / seconds,
            "samples_per_s": samples / seconds,
            "mfu": useful / self.peak,
            "stall_pct": 100 * (stats["stall_s"] - before["stall_s"]) / seconds,
            "fill_pct": 100 * stats["fill"],
            "queue_occupancy": stats["occupancy"],
        }
        if self.datasheet:
            out["mfu_datasheet"] = useful / self.datasheet
        out |= self._times(stats)
        self.started, self.before = now, stats
        return out

    def _times(self, stats: dict[str, float]) -> Lap:
        spent: dict[str, dict[str, float]] = {}
        for key, value in stats.items():
            group, _, name = key.partition("_s/")
            if name and value > self.before.get(key, 0.0):
                spent.setdefault(group, {})[name] = value - self.before.get(key, 0.0)
        stages = spent.pop("stage", {})
        total = sum(stages.values())
        packs = max(1.0, stats["packs"] - self.before["packs"])
        out: Lap = {}
        if stages:
            out["stages"] = {k: 100 * s / total for k, s in stages.items() if k != "free"}
        for group, seconds in spent.items():
            out[f"{group}_ms"] = {name: 1000 * s / packs for name, s in seconds.items()}
        return out
