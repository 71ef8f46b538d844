"""Measure the models of a run folder again: ``python -m uml_fast.evaluate RUN``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from uml_fast.analysis.probe import knn
from uml_fast.cli import run_main
from uml_fast.experiment.heads import compare_heads, evaluate_heads
from uml_fast.experiment.run import read_any_config
from uml_fast.experiment.summary import compare
from uml_fast.experiment.trained import finished_trials, load_model
from uml_fast.grid.run import GridConfig
from uml_fast.report import print_table
from uml_fast.runtime.device import resolve_device
from uml_fast.training.measure import embeddings_and_labels, measure, pack_source


def evaluate(folder: Path) -> Iterator[dict[str, Any]]:
    """For every finished trial, on the test samples: probe, head, error and 5-NN accuracy."""
    for mode, seed in finished_trials(folder):
        model, config, task = load_model(folder, mode, seed)
        device = resolve_device(config.device)
        train, test = (
            pack_source(task.source(config.target), device, config),
            pack_source(task.test, device, config),
        )
        numbers = asdict(measure(model, config, train, test, task.class_names))
        del numbers["validation"]
        if (task.test.labels >= 0).any():
            known = embeddings_and_labels(model, train)
            k = min(5, len(known[1]))
            numbers["knn"] = knn(*known, *embeddings_and_labels(model, test), k=k)
        yield {"mode": mode, "seed": seed, "shots": None} | numbers


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.evaluate``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m uml_fast.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of tables"
    )
    args = parser.parse_args(argv)
    config = read_any_config(args.run)
    if isinstance(config, GridConfig):
        results = evaluate_heads(args.run, config)
        comparison = compare_heads(config, results)
    else:
        results = list(evaluate(args.run))
        comparison = compare(config, results)
    if args.json:
        print(json.dumps({"results": results, "comparison": comparison}, indent=1))
        return 0
    columns = [
        name
        for name in ("probe", "knn", "head", "error")
        if any(r.get(name) is not None for r in results)
    ]
    if results[0]["shots"] is not None:
        columns = ["shots", *columns]
    print("".join(f"{c:>10}" for c in ("mode", "seed", *columns)))
    for r in results:
        values = [r.get(c) for c in columns]
        cells = "".join(
            f"{v:>10}" if isinstance(v, int) else f"{'-' if v is None else f'{v:.4f}':>10}"
            for v in values
        )
        print(f"{r['mode']:>10}{r['seed']:>10}{cells}")
    print(print_table({"recipe": config.recipe, "target": config.target, "metric": config.metric,
                       "results": results, "comparison": comparison, "baselines": []}))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
