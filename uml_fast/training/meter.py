"""Throughput of a trial between two log lines: rows and samples per second, MFU, stall and fill."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from uml_fast.config import BackboneConfig, RunConfig
from uml_fast.cost.flops import (
    datasheet_peak,
    linear_flops,
    measured_peak,
    training_flops,
    transformer_flops,
)
from uml_fast.data.loading.loader import Loader
from uml_fast.data.source import Samples
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import Uml
from uml_fast.runtime.device import resolve_dtype


def flops_per_row(model: Uml, config: RunConfig, source: Samples) -> float:
    """Useful operations of forward and backward per row of a modality, averaged over its samples.

    Only matrix products of the model count (``uml_fast.cost.flops``): stem, the modality's own
    network and its projection, backbone and decoder. A network that stays frozen has no products
    for gradients of weights, and none for those of its input where nothing in front of it is
    trained.
    """
    own, modality = config.modality(source.name), model.modality(source.name)
    lengths = source.lengths
    stem_stays = own.encoder is not None and own.encoder.stays_frozen
    parts = [(modality.stem, _linears(modality.stem, lengths), stem_stays)]
    if own.encoder is not None:
        encoder = model.encoders[source.name]
        parts.append((encoder, _network(own.encoder, encoder, lengths), stem_stays))
    if own.pooled:
        lengths = np.ones_like(lengths)
    if source.name in model.projections:
        projection = model.projections[source.name]
        parts.append((projection, _linears(projection, lengths), False))
    shared = _network(config.backbone, model.backbone, lengths)
    parts.append((model.backbone, shared, config.backbone.stays_frozen))
    if modality.decoder is not None:
        parts.append((modality.decoder, _linears(modality.decoder, lengths), False))
    total, reaches_back = 0.0, False
    for module, forward, stays in parts:
        is_trained = not stays and next(module.parameters(), None) is not None
        total += training_flops(forward, to_input=reaches_back, to_weights=is_trained)
        reaches_back |= is_trained
    return total / int(source.offsets[-1])


def _linears(module: torch.nn.Module, lengths: np.ndarray) -> int:
    """Forward operations of all linear maps of a module, each on every row."""
    rows = int(lengths.sum())
    found = [m for m in module.modules() if isinstance(m, torch.nn.Linear)]
    return sum(linear_flops(rows, m.in_features, m.out_features) for m in found)


def _network(config: BackboneConfig, network: torch.nn.Module, lengths: np.ndarray) -> int:
    """Forward operations of a network over packs."""
    if not isinstance(config, TransformerConfig):
        return _linears(network, lengths)
    forward = transformer_flops(
        config.width, config.layers, config.feed_forward, lengths, causal=config.causal,
        gated=config.activation == "swiglu",
        key_width=config.width // config.heads * config.heads_of_keys,
    )  # fmt: skip
    if config.input_projection:
        forward += linear_flops(int(lengths.sum()), config.width, config.width)
    if config.embedding:
        forward += linear_flops(len(lengths), config.width, config.embedding)
    return forward


Lap = dict[str, float | dict[str, float]]
"""What was measured between two log lines; inner dictionaries are by stage or modality."""


def combine(laps: Sequence[Lap]) -> Lap:
    """The laps of all ranks as one: rates add up, times and shares are averaged.

    ``imbalance_pct`` is what the ranks had less to do, on average, than the one with most tokens;
    ``wait_pct`` is by rank: who waits least is who the others wait for. ``memory_mib`` is that of
    the rank with most.
    """
    if len(laps) == 1:
        return laps[0]
    rates = [r for r in (lap.get("tokens_per_s") for lap in laps) if isinstance(r, float)]
    out: Lap = {"imbalance_pct": 100 * (1 - sum(rates) / len(rates) / max(*rates, 1e-9))}
    for name in dict.fromkeys(name for lap in laps for name in lap):
        values = [lap.get(name, 0.0) for lap in laps]
        inner = [v for v in values if isinstance(v, dict)]
        if inner:
            keys = dict.fromkeys(key for v in inner for key in v)
            out[name] = {k: sum(v.get(k, 0.0) for v in inner) / len(laps) for k in keys}
        else:
            total = sum(v for v in values if not isinstance(v, dict))
            out[name] = total if name.endswith("_per_s") else total / len(laps)
    memory = [m for m in (lap.get("memory_mib") for lap in laps) if isinstance(m, float)]
    return out | ({"memory_mib": max(memory)} if memory else {})


def memory_mib(device: torch.device) -> float:
    """Most MiB that tensors took on a GPU so far, or what this process holds in memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no Linux: the most it ever held, KiB there, bytes on macOS
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / 2**20 if sys.platform == "darwin" else most / 2**10
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


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
        self.loader, self.device = loader, device
        self.flops = {s.name: flops_per_row(model, config, s) for s in sources}
        dtype = resolve_dtype(config.precision, device)
        self.peak = measured_peak(device, dtype)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.datasheet = datasheet_peak(name, dtype)
        self.started = time.perf_counter()
        """When the lap began, later by what it was paused."""
        self.before = loader.stats()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of what is no training out of the lap: validations and checkpoints.

        The lap goes on with what was counted before, so its shares stay shares of its own time.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # steps that still run belong to the lap
        begin = time.perf_counter()
        yield
        self.started += time.perf_counter() - begin

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
            "memory_mib": memory_mib(self.device),
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
