"""From trials to a verdict: modes compared over paired seeds, and what the report shows."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.analysis.statistics import correct_rows, mean_interval, paired_comparison
from uml_fast.analysis.theory import TheoremCheck, check_all
from uml_fast.config import RunConfig
from uml_fast.data.in_memory import in_memory
from uml_fast.data.source import Task
from uml_fast.model.uml import Uml
from uml_fast.report.table import mode_name
from uml_fast.runtime.machine import machine_info
from uml_fast.training.log import read_metrics

_APART = ("baselines", "probes")
"""Parts of a trial's result that have a table of their own."""
_GROUPS = ("stages", "read_ms", "decode_ms", "assemble_ms", "stall_ms", "wait_pct")
_RATES = (
    "tokens_per_s", "samples_per_s", "mfu", "mfu_datasheet", "stall_pct", "fill_pct", "ranks",
    "imbalance_pct", "comm_pct", "memory_mib",
)  # fmt: skip


def summarise(config: RunConfig, results: Sequence[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """The content of summary.json."""
    info = machine_info()
    out: dict[str, Any] = {
        "recipe": config.recipe, "target": config.target, "metric": config.metric,
        "compared": config.compared,
        "machine": info["machine"], "versions": info["versions"], "commit": info["commit"],
        "results": [{k: v for k, v in r.items() if k not in _APART} for r in results],
        "comparison": compare(config, results),
        "baselines": baselines(config, results),
        "probes": probes(results),
        "throughput": throughput(folder, config.compared[1]),
    }  # fmt: skip
    if config.eval.theory:
        out["theory"] = [_check_record(c) for c in check_all(config.seed)]
    return out


def _check_record(check: TheoremCheck) -> dict[str, Any]:
    """A check as JSON; its quantities as one line of text."""
    shown = ", ".join(f"{name} {value:.4g}" for name, value in check.quantities)
    return dataclasses.asdict(check) | {"quantities": shown}


def compare(config: RunConfig, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run's two modes on its metric, over seeds that have both; empty where none has.

    ``unimodal_mean`` of a row is that of the baseline, ``uml_mean`` that of the other mode.
    """
    first, second = config.compared
    by_mode: dict[str, dict[int, float]] = defaultdict(dict)
    for r in results:
        if r.get(config.metric) is not None:
            by_mode[r["mode"]][r["seed"]] = r[config.metric]
    seeds = sorted(by_mode[first].keys() & by_mode[second].keys())
    if not seeds:
        return []
    c = paired_comparison(
        [by_mode[first][s] for s in seeds],
        [by_mode[second][s] for s in seeds],
        lower_is_better=config.metric == "error",
        names=(mode_name(first), mode_name(second)),
    )
    return correct_rows([{"shots": None, "metric": config.metric} | dataclasses.asdict(c)])


def baselines(config: RunConfig, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The simple methods' means over seeds, on the target data that the first mode trained on."""
    values: dict[str, list[float]] = defaultdict(list)
    for r in results:
        if r["mode"] == config.modes[0]:
            for name, value in r["baselines"].items():
                values[name].append(value)
    out = []
    for name, over_seeds in values.items():
        i = mean_interval(over_seeds)
        out.append(
            {
                "name": name,
                "mean": i.mean,
                "ci95_low": i.ci95_low,
                "ci95_high": i.ci95_high,
                "n": i.n,
            }
        )
    return out


def probes(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracies of aligned modalities' probes: mean over seeds for each mode, view and split."""
    values: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for r in results:
        for view, splits in r.get("probes", {}).items():
            for split, value in splits.items():
                values[r["mode"], view, split].append(value)
    return [
        {"mode": mode, "view": view, "split": split} | dataclasses.asdict(mean_interval(over_seeds))
        for (mode, view, split), over_seeds in values.items()
    ]


def throughput(folder: Path, mode: str = "uml") -> dict[str, Any]:
    """Medians of a mode's logged rates, without each trial's first lap (it pays for warm-up).

    ``is_too_short``: the trials of the mode logged no other lap.
    """
    laps: dict[str, list[float]] = defaultdict(list)
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    recompiles, seen = 0, set()
    for record in read_metrics(folder):
        trial = (record["mode"], record["seed"])
        recompiles = max(recompiles, record.get("recompiles", 0))
        if record["mode"] != mode or "tokens_per_s" not in record:
            continue
        if trial in seen:
            for name in _RATES:
                if name in record:
                    laps[name].append(record[name])
            for name in _GROUPS:
                groups[name].append(record.get(name) or {})
        seen.add(trial)
    rates: dict[str, Any] = {
        name: float(np.median(v)) if (v := laps.get(name)) else None for name in _RATES
    }
    means = {name: _means(found) for name, found in groups.items() if any(found)}
    return rates | means | {"recompiles": recompiles, "is_too_short": bool(seen) and not laps}


def _means(laps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over all laps, 0 where a lap lacks it."""
    names = list(dict.fromkeys(name for lap in laps for name in lap))
    return {name: float(np.mean([lap.get(name, 0.0) for lap in laps])) for name in names}


def describe_samples(model: Uml, task: Task, count: int = 4) -> list[dict[str, Any]]:
    """Some samples of each modality as a person sees them (samples.json)."""
    out = []
    for source in task.train:
        shown = in_memory(source, count)
        for i in np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int):
            label = int(shown.labels[i])
            name = task.class_names[label] if 0 <= label < len(task.class_names) else ""
            caption = " -> ".join(x for x in (shown.key(i) if shown.keys else "", name) if x)
            seen = model.modality(shown.name).describe(shown.sample(i))
            out.append({"modality": source.name, "caption": caption} | seen)
    return out
