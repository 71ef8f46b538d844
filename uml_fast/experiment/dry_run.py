"""Say what a run would be, without training: ``python -m uml_fast.train RECIPE --dry-run``."""

from __future__ import annotations

import json
from collections.abc import Iterator

from uml_fast.config import RunConfig
from uml_fast.cost.scaling import stays_gathered
from uml_fast.distributed.parallel import choose, memory_bytes
from uml_fast.distributed.ranks import Ranks
from uml_fast.experiment.run import to_json
from uml_fast.runtime.device import resolve_device, resolve_dtype
from uml_fast.training.memory import kept_bytes
from uml_fast.training.start import build_model, plan_mix, resolve

_MIB = 2**20


def dry_run(config: RunConfig, world: int) -> str:
    """The resolved run on ``world`` ranks: configuration, packs, strategy and memory of a rank.

    Data and models are built as training builds them, so what would stop a run before its first
    step does so here.

    Raises:
        ConfigError, DataError: as ``train``.
    """
    config = resolve(config)
    lines = [json.dumps(to_json(config), indent=1)]
    for mode in config.modes:
        lines += _lines(config, mode, world)
    return "\n".join(lines)


def _lines(run: RunConfig, mode: str, world: int) -> Iterator[str]:
    config = run.for_mode(mode)
    task = config.load(config.seed, mode)
    _, layouts = plan_mix(run, mode, task, config.seed)
    model = build_model(config, task, config.seed)
    device = resolve_device(config.device)
    strategy = choose(config.dist, model, Ranks(0, world), device)
    dtype = resolve_dtype(config.precision, device)
    parts = (config.dist.shard_ranks or world) if strategy == "fsdp" else 1
    count = sum(p.numel() for p in model.parameters())
    how = f"{strategy}, weights in {parts} parts" if world > 1 else "alone"
    yield f"{mode}: {config.steps:,} steps on {world} ranks ({how}), {device}, {dtype}"
    for source in task.train:
        yield f"  {source.name}: {len(source.lengths):,} samples, {int(source.offsets[-1]):,} rows"
    for layout in layouts:
        rows = ", ".join(f"{r.name} {r.rows}" for r in layout.regions)
        in_step = world * config.optim.accumulate * layout.rows
        yield f"  pack of a rank: {layout.rows:,} rows ({rows}); {in_step:,} a step"
    yield f"  {count:,} parameters; memory of a rank, estimated:"
    yield f"    weights {4 * count / parts / _MIB:,.1f} MiB, gradients the same, fp32"
    yield f"    optimiser {8 * count / parts / _MIB:,.1f} MiB"
    if parts > 1 and stays_gathered(count, parts, memory_bytes(device)):
        yield f"    gathered weights, from forward until backward, {4 * count / _MIB:,.1f} MiB"
    if config.optim.ema:
        yield f"    averaged weights {4 * count / parts / _MIB:,.1f} MiB"
    kept = kept_bytes(config, max(layouts, key=lambda layout: layout.rows), dtype)
    if kept is not None:
        yield f"    activations {kept / _MIB:,.1f} MiB (uml-fast plan says more)"
