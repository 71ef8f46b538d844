"""Say what a run would be, without training: ``python -m uml_fast.train RECIPE --dry-run``."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from uml_fast.config import RunConfig
from uml_fast.cost.scaling import stays_gathered
from uml_fast.distributed.parallel import choose, parts_of
from uml_fast.distributed.ranks import Ranks
from uml_fast.experiment.run import check_folder, to_json
from uml_fast.grid.data import LoadedData
from uml_fast.grid.run import GridConfig
from uml_fast.model.float8 import check_float8
from uml_fast.runtime.device import resolve_device, resolve_dtype
from uml_fast.runtime.memory import memory_bytes
from uml_fast.training.graph import is_wanted
from uml_fast.training.measure import pack_source
from uml_fast.training.memory import kept_bytes
from uml_fast.training.optim import short_warmup
from uml_fast.training.start import build_model, plan_mix, resolve
from uml_fast.training.wandb_runs import check_wandb

_MIB = 2**20


def dry_run(config: RunConfig, world: int) -> str:
    """The resolved run on ``world`` ranks: packs, strategy, memory of a rank, configuration.

    Data and models are built as training builds them, so what would stop a run before its first
    step does so here.

    Raises:
        ConfigError, DataError, RunFolderError: as ``train``.
    """
    config = resolve(config)
    if config.wandb:
        check_wandb()
    lines = [f"{config.recipe}: {check_folder(config)}"]
    if note := short_warmup(config.steps, config.optim):
        lines.append(f"note: {note}")
    for mode in config.modes:
        lines += _lines(config, mode, world)
    return "\n".join([*lines, *_configuration(config)])


def dry_run_heads(config: GridConfig) -> str:
    """The grid: its heads, the samples they are trained on, configuration.

    Raises:
        ConfigError, DataError, RunFolderError: as ``train_heads``.
    """
    lines = [f"{config.recipe}: {check_folder(config)}"]
    heads = sum(1 for _ in config.cells())
    names = ", ".join(["unimodal", *(v.name for v in config.variants)])
    shots = ", ".join(str(s or "all") for s in config.shots)
    lines.append(
        f"{heads:,} heads ({names}; {shots} shots; {config.seeds} seeds), each kept one chosen of "
        f"{config.points:,}"
    )
    loaded = LoadedData(config.data, config.modalities).of(config.seed, config.shots[0])
    data = loaded.heads
    varies = ", of the first seed and shots" if config.data.varies else ""
    lines.append(f"features{varies}: {data.classes:,} classes")
    for name, split in data.train.items():
        held = f", {len(data.validation):,} validation, {len(data.test):,} test"
        lines.append(
            f"  {name}: {len(split):,} training{held if name == data.target else ''} samples of "
            f"{split.width:,} features"
        )
    return "\n".join([*lines, *_configuration(config)])


def _configuration(config: RunConfig | GridConfig) -> Iterator[str]:
    yield "configuration:"
    yield json.dumps(to_json(config), indent=1)


def _lines(run: RunConfig, mode: str, world: int) -> Iterator[str]:
    config = run.for_mode(mode)
    task = config.load(config.seed, mode)
    _, layouts = plan_mix(run, mode, task, config.seed)
    model = build_model(config, task, config.seed)
    device = resolve_device(config.device)
    ranks = Ranks(0, world)
    strategy = choose(config.dist, model, ranks, device)
    dtype = resolve_dtype(config.precision, device)
    is_captured = is_wanted(config, ranks, device)
    if config.float8:
        check_float8(device, dtype)
    pack_source(task.validation, torch.device("cpu"), config)
    parts = parts_of(config.dist, strategy, world)
    count = sum(p.numel() for p in model.parameters())
    how = f"{strategy}, weights in {parts} parts" if world > 1 else "alone"
    how += ", as CUDA graphs" if is_captured else ""
    on = "one rank" if world == 1 else f"{world} ranks"
    yield f"{mode}: {config.steps:,} steps on {on} ({how}), {device}, {dtype}"
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
