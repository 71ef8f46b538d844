"""Measure the models of a run folder again: ``python -m uml_fast.evaluate RUN``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from uml_fast.analysis.probe import knn
from uml_fast.cli import options, run_main
from uml_fast.config import RunConfig
from uml_fast.experiment.heads import compare_heads, evaluate_heads
from uml_fast.experiment.run import read_any_config
from uml_fast.experiment.summary import baselines, compare
from uml_fast.experiment.trained import finished_trials, load_model, unfinished_trials
from uml_fast.grid.run import GridConfig
from uml_fast.report import print_table
from uml_fast.report.table import ROW_AXES, Metric
from uml_fast.runtime.device import resolve_device
from uml_fast.runtime.progress import LongWork
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
        yield {"mode": mode, "seed": seed} | {k: v for k, v in numbers.items() if v is not None}


def stored_baselines(folder: Path, config: RunConfig | GridConfig) -> list[dict[str, Any]]:
    """The simple methods as the run measured them: a grid's when it ends, others' with a trial."""
    if isinstance(config, GridConfig):
        summary = folder / "summary.json"
        return json.loads(summary.read_text())["baselines"] if summary.exists() else []
    places = [folder / "trials" / f"{m}-{s}" / "result.json" for m, s in finished_trials(folder)]
    return baselines(config, [json.loads(p.read_text()) for p in places])


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """Measure the models of a run folder again, on its test samples.

      python -m uml_fast.evaluate runs/numbers
      python -m uml_fast.evaluate runs/numbers --json > numbers.json

    probe: logistic regression on frozen embeddings; knn: nearest neighbours there; head: the shared
    head; error: of predictions. A run that is not finished is measured as far as it is.
    """

    run: Annotated[Path, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    json: bool = False
    """Print one JSON object instead of tables; accuracies are then parts of one."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.evaluate``; returns the exit status."""
    given = options(EvaluateConfig, "evaluate", argv)
    config = read_any_config(given.run)
    missing: list[str] = []
    if isinstance(config, GridConfig):
        results = evaluate_heads(given.run, config)
        comparison = compare_heads(config, results)
    else:
        missing = unfinished_trials(given.run, config)
        results = []
        with LongWork("evaluating trial", len(finished_trials(given.run))) as work:
            for result in evaluate(given.run):
                results.append(result)
                work.add(1)
        comparison = compare(config, results)
    if missing:
        told = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        print(
            f"not finished: {told} ({len(missing)} of {len(missing) + len(results)} trials); the "
            "command that began the run goes on with it",
            file=sys.stderr,
        )
    measured = {
        "results": results, "comparison": comparison,
        "baselines": stored_baselines(given.run, config),
    }  # fmt: skip
    if given.json:
        print(json.dumps(measured, indent=1))
        return 0
    print(_table(results))
    of = {"recipe": config.recipe, "target": config.target, "metric": config.metric}
    print(print_table(of | measured))
    return 0


def _table(results: Sequence[dict[str, Any]]) -> str:
    """A row for each model, with units as in the comparison."""
    measured = [n for n in ("probe", "knn", "head", "error") if _is_there(results, n)]
    axes = [n for n in ("shots", *ROW_AXES) if _is_there(results, n)]
    lines = [("mode", "seed", *(a.replace("_", " ") for a in axes), *map(_title, measured))]
    for r in results:
        places = (str(r[a]) if r.get(a) is not None else "-" for a in axes)
        values = (Metric(n).text(r[n]) if r.get(n) is not None else "-" for n in measured)
        lines.append((r["mode"], str(r["seed"]), *places, *values))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    out = ""
    for row in lines:
        first, *others = (c.rjust(w) for c, w in zip(row, widths, strict=True))
        out += "  ".join([first.strip().ljust(widths[0]), *others]) + "\n"
    return out


def _is_there(results: Sequence[dict[str, Any]], name: str) -> bool:
    return any(r.get(name) is not None for r in results)


def _title(name: str) -> str:
    return name if Metric(name).lower_is_better else f"{name} %"


if __name__ == "__main__":
    raise SystemExit(run_main(main))
