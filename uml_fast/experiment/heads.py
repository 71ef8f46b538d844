"""The chosen heads of a grid: compared, measured again, written as a plain file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uml_fast.analysis.statistics import correct_rows, mean_interval, paired_comparison
from uml_fast.config import ConfigError
from uml_fast.grid.baselines import simple_methods
from uml_fast.grid.data import LoadedData
from uml_fast.grid.results import Head, load_heads
from uml_fast.grid.run import UNIMODAL, GridConfig
from uml_fast.runtime.files import replace_file
from uml_fast.runtime.machine import machine_info
from uml_fast.training.log import RunFolderError


def evaluate_heads(folder: Path, config: GridConfig) -> list[dict[str, Any]]:
    """Test accuracy of every chosen head, from its matrix and the features as they are now.

    Raises:
        DataError: features or heads cannot be read, or do not belong together.
    """
    out = []
    data = LoadedData(config.data, config.modalities)
    for head in load_heads(folder):
        cell = head.record["cell"]
        test = data.of(cell["seed"], cell["shots"]).heads.test
        right = (test.rows @ head.weight).argmax(1) == test.labels
        out.append({
            "mode": head.record["variant"], "seed": cell["seed"], "shots": cell["shots"],
            **head.record["row"], "head": float(right.float().mean()),
        })  # fmt: skip
    return out


def export_head(
    folder: Path, variant: str, shots: int | None, seed: int | None, out: Path | None
) -> Path:
    """Write one head as a plain file: ``weight`` fp32 (D, C), so that logits are rows @ weight.

    Projection, head and scale are one matrix there. Its metadata name the classes, the encoder of
    the rows with its transform, and how the head was trained, as JSON.

    Args:
        folder: run folder.
        variant: uml, unimodal, ...
        shots: None: the most there are, all samples before any number.
        seed: None: the first.
        out: file; None: ``<folder>/<target>.safetensors``.

    Raises:
        ConfigError: there is no such head.
        DataError: the run folder has none.
        RunFolderError: the file cannot be written.
    """

    def place(head: Head) -> tuple[float, int]:
        of = head.record["cell"]
        return -(of["shots"] or float("inf")), of["seed"]

    heads = load_heads(folder)
    fitting = [
        h for h in heads
        if h.record["variant"] == variant and shots in (None, h.record["cell"]["shots"])
        and seed in (None, h.record["cell"]["seed"])
    ]  # fmt: skip
    if not fitting:
        names = ", ".join(h.path.stem for h in heads[:20])
        wanted = f"{variant}{'' if shots is None else f', {shots} shots'}"
        wanted += "" if seed is None else f", seed {seed}"
        raise ConfigError(f"{folder} has no chosen head {wanted}; there are: {names}")
    chosen = min(fitting, key=place)
    path = out or folder / f"{chosen.metadata['target']}.safetensors"
    try:
        replace_file(path, chosen.path.read_bytes())
    except OSError as e:
        raise RunFolderError(f"cannot write {path}: {e.strerror or e}") from e
    return path


def baselines(config: GridConfig, data: LoadedData) -> list[dict[str, Any]]:
    """Simple methods on the target's features alone, for every number of shots."""
    out = []
    for shots in config.shots:
        found: dict[str, list[float]] = {}
        for seed in range(config.seed, config.seed + config.seeds):
            own = data.of(seed, shots).heads
            for name, accuracy in simple_methods(own, shots, seed).items():
                found.setdefault(name, []).append(accuracy)
        for name, accuracies in found.items():
            mean = mean_interval(accuracies)
            out.append({
                "name": name, "shots": shots, "mean": mean.mean,
                "ci95_low": mean.ci95_low, "ci95_high": mean.ci95_high, "n": mean.n,
            })  # fmt: skip
    return out


def summarise_heads(
    config: GridConfig, chosen: Sequence[dict[str, Any]], simple: Sequence[dict[str, Any]],
    heads: int,
) -> dict[str, Any]:  # fmt: skip
    """The content of summary.json."""
    info = machine_info()
    results = [
        {"mode": c["variant"], "seed": c["cell"]["seed"], "shots": c["cell"]["shots"], **c["row"],
         "head": c["test"], "validation": c["validation"], "steps": c["steps"], "cell": c["cell"]}
        for c in chosen
    ]  # fmt: skip
    return {
        "recipe": config.recipe, "target": config.target, "metric": config.metric,
        "machine": info["machine"], "versions": info["versions"], "commit": info["commit"],
        "results": results, "comparison": compare_heads(config, results), "baselines": list(simple),
        "throughput": {}, "searched": config.points, "heads": heads,
    }  # fmt: skip


def compare_heads(config: GridConfig, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every variant and row against the unimodal head with the same shots, over paired seeds."""
    by_group: dict[tuple[Any, ...], dict[int, float]] = {}
    for r in results:
        row = tuple((name, r[name]) for name in config.rows if name in r)
        by_group.setdefault((r["mode"], row, r["shots"]), {})[r["seed"]] = r["head"]
    out = []
    for (mode, row, shots), found in by_group.items():
        if mode == UNIMODAL:
            continue
        alone = by_group.get((UNIMODAL, (), shots), {})
        seeds = sorted(found.keys() & alone.keys())
        if not seeds:
            continue
        c = paired_comparison([alone[s] for s in seeds], [found[s] for s in seeds])
        place = {"shots": shots, "mode": mode, **dict(row), "metric": "head"}
        out.append(place | asdict(c))
    order = {v.name: i for i, v in enumerate(config.variants)}
    out.sort(key=lambda r: (order[r["mode"]], config.shots.index(r["shots"])))
    return correct_rows(out)
