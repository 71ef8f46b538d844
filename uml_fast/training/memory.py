"""Memory of a rank: what training will take of it, and what to lower when there was too little."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from uml_fast.config import BackboneConfig, RunConfig
from uml_fast.cost.scaling import BETWEEN, STATE_BYTES, Network, stays_gathered
from uml_fast.distributed.parallel import parts_of
from uml_fast.distributed.ranks import Ranks
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout
from uml_fast.runtime.device import resolve_dtype
from uml_fast.runtime.memory import memory_bytes

_SAFE = 0.95
"""Part of the memory that may be filled."""
_STEP = 0.75
"""What the packs are multiplied with where the estimate says that they fit: it leaves things out,
such as what a user's own stems and losses keep."""
_GIB = 2**30


class OutOfMemory(RuntimeError):
    """A rank has too little memory; the message says what to lower, and by how much."""


def kept_bytes(config: RunConfig, layout: Layout, dtype: torch.dtype) -> float | None:
    """Bytes of a pack's activations that forward keeps; None: a network without an estimate."""
    total = 0.0
    for region in layout.regions:
        own = config.modality(region.name)
        shared_rows = region.slots if own.pooled else region.rows
        for network, rows in ((own.encoder, region.rows), (config.backbone, shared_rows)):
            if network is None:
                continue
            a_row = _kept_of_a_row(network, dtype)
            if a_row is None:
                return None
            total += a_row * rows
    return total


def _kept_of_a_row(b: BackboneConfig, dtype: torch.dtype) -> float | None:
    if not isinstance(b, TransformerConfig):
        return None
    network = Network(
        width=b.width, layers=b.layers, feed_forward=b.feed_forward,
        gated=b.activation == "swiglu",
    )  # fmt: skip
    whole = network.kept(dtype.itemsize)
    return whole / max(1, b.layers) + 4 * b.width * b.layers if b.recompute else whole


@contextlib.contextmanager
def explained(
    config: RunConfig,
    model: Uml,
    layouts: tuple[Layout, ...],
    device: torch.device,
    ranks: Ranks,
    strategy: str,
    now: Callable[[], str],
) -> Iterator[None]:
    """Turn a lack of memory into ``OutOfMemory``; ``now`` says what was being done."""
    try:
        yield
    except RuntimeError as error:
        is_of_cpu = "DefaultCPUAllocator" in str(error)
        if not (isinstance(error, torch.OutOfMemoryError) or is_of_cpu):
            raise
        raise OutOfMemory(
            f"rank {ranks.rank} has too little memory at {now()}: "
            + _advice(config, model, layouts, device, ranks, strategy)
        ) from error


def _advice(
    config: RunConfig,
    model: Uml,
    layouts: tuple[Layout, ...],
    device: torch.device,
    ranks: Ranks,
    strategy: str,
) -> str:
    total, others, name = _memory_of(device)
    parts = parts_of(config.dist, strategy, ranks.world)
    count = sum(p.numel() for p in model.parameters())
    states = (STATE_BYTES + 4 * bool(config.optim.ema)) * count / parts
    if parts > 1 and stays_gathered(count, parts, total):
        states += 4 * count
    largest = max(layouts, key=lambda layout: layout.rows)
    kept = kept_bytes(config, largest, resolve_dtype(config.precision, device))
    shown = f"{kept / _GIB:,.1f} GiB" if kept else "an unknown part"
    said = (
        f"{name} has {total / _GIB:,.1f} GiB"
        + (f", {others / _GIB:,.1f} of them taken by other processes" if others > _GIB / 10 else "")
        + f"; weights, gradients and moments need about {states / _GIB:,.1f} GiB, activations of a "
        f"pack of {largest.rows:,} rows {shown}. "
    )
    room = _SAFE * (total - others) / BETWEEN - states
    if room <= 0:
        return said + (
            "The model alone does not fit: --dist.strategy fsdp"
            if strategy == "ddp" and ranks.world > 1
            else "The model alone does not fit: more ranks with --dist.strategy fsdp, or a smaller "
            "--backbone"
        )
    factor = min(room / kept, _STEP) if kept else _STEP
    option, value = "--mix.token-budget", config.mix.token_budget
    if config.mix.batch:
        option, value = "--mix.batch", config.mix.batch
    lower = max(1, int(factor * value))
    lower = lower // 64 * 64 or lower
    turns = config.optim.accumulate * -(-value // lower)
    b = config.backbone
    other = isinstance(b, TransformerConfig) and b.layers > 1 and not b.recompute
    return (
        f"{said}Lower {option} from {value:,} to {lower} (--optim.accumulate {turns} keeps the "
        "samples of a step)"
        + (", or keep the packs and give --backbone.recompute (a third more products)" * other)
        + ". That is another run: --resume never sets this one aside"
    )


def _memory_of(device: torch.device) -> tuple[float, float, str]:
    """Bytes that a rank can use, those of them that other processes hold, and where they are."""
    total = memory_bytes(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        others = max(0.0, total - free - torch.cuda.memory_reserved(device))
        return total, others, f"{device} ({torch.cuda.get_device_name(device)})"
    return total, 0.0, "a rank on this machine"
