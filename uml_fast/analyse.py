"""Every analysis of the paper that a run allows: ``python -m uml_fast.analyse RUN``.

Writes analysis.json into the run folder and its charts into report.html.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uml_fast.analysis.findings import Findings, Of
from uml_fast.analysis.of_heads import Trained, head_findings, pair_findings, pictures
from uml_fast.cli import run_main
from uml_fast.config import ConfigError, RunConfig, require
from uml_fast.data.source import DataError
from uml_fast.evaluate import finished_trials, load_model
from uml_fast.observe import (
    Observed,
    look,
    neuron_findings,
    open_pairs,
    open_shifted,
    shift_findings,
)
from uml_fast.progress import StatusLine, duration
from uml_fast.report import print_analyses, write_report
from uml_fast.report.table import mode_name
from uml_fast.run import read_config, write_json

ANALYSIS = "analysis.json"
"""Name of the file in a run's folder."""


def analyse(
    folder: Path, shifted: Mapping[str, str] | None = None, pairs: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Analyse every finished trial of a run; returns what analysis.json holds.

    Args:
        folder: run folder.
        shifted: name of a shifted test set of the target -> its shards.
        pairs: auxiliary -> shards whose samples are named like their partners among the target's
            test samples (for measuring multimodal neurons; training never sees them).

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: no trial is finished, or one has no whole checkpoint.
        DataError: shards that cannot be used.
        ConfigError: ``pairs`` names no auxiliary of the run.
    """
    config = read_config(folder)
    first, second = config.compared
    found = Findings(config.compared, (mode_name(first), mode_name(second)))
    trials = finished_trials(folder)
    _analyse_run(found, folder, config, trials, shifted or {}, pairs or {})
    return {
        "recipe": config.recipe, "target": config.target, "compared": config.compared,
        "trials": [list(t) for t in trials],
        "rows": found.rows(), "values": found.values, "charts": found.charts,
        "skipped": found.skipped,
    }  # fmt: skip


def _analyse_run(
    found: Findings,
    folder: Path,
    config: RunConfig,
    trials: Sequence[tuple[str, int]],
    shifted: Mapping[str, str],
    pairs: Mapping[str, str],
) -> None:
    auxiliaries = [m.name for m in config.modalities if m.name != config.target]
    for name in pairs:
        require(name in auxiliaries, f"--pairs names {name!r}; auxiliaries are {auxiliaries}")
    sets = open_shifted(config, shifted)
    if not sets:
        found.skipped["robustness under shift"] = "no shifted set is given (--shifted NAME=SHARDS)"
    found.skipped["exchange rate"] = (
        "needs a grid of target shots and auxiliary shots (vision_text)"
    )
    seen: dict[int, dict[str, Trained]] = {}
    status, started = StatusLine(), time.monotonic()
    for done, (mode, seed) in enumerate(trials):
        left = (time.monotonic() - started) / max(done, 1) * (len(trials) - done)
        status.update(
            f"analysing {mode} seed {seed} ({done + 1} of {len(trials)}"
            + (f", {duration(left)} left)" if done else ")")
        )
        observed = Observed(*load_model(folder, mode, seed), Of(mode, seed))
        with found.attempt("test samples"):
            if not (observed.task.test.labels >= 0).any():
                raise DataError("the test samples have no classes")
            trained = seen.setdefault(seed, {})[mode] = look(observed)
            head_findings(found, trained)
            shift_findings(found, observed, sets)
        if mode == config.compared[1]:
            _neurons(found, observed, pairs, folder / "trials" / f"{mode}-{seed}")
        of_seed = seen.get(seed, {})
        if set(config.compared) <= of_seed.keys():
            pair_findings(found, *(of_seed[m] for m in config.compared))
        if seed == trials[0][1] and (done + 1 == len(trials) or trials[done + 1][1] != seed):
            pictures(found, list(of_seed.values()), observed.task.class_names)
        if done + 1 < len(trials) and trials[done + 1][1] != seed:
            seen.pop(seed, None)


def _neurons(found: Findings, o: Observed, places: Mapping[str, str], place: Path) -> None:
    pairs = open_pairs(o, places)
    if not pairs:
        found.skipped["multimodal neurons"] = (
            "the data have no true pairs; give some with --pairs AUXILIARY=SHARDS"
        )
        return
    neuron_findings(found, o, pairs, place)


def _named(option: str, given: Sequence[str]) -> dict[str, str]:
    """``NAME=PLACE`` arguments by name.

    Raises:
        ConfigError: one is written otherwise, or a name stands twice.
    """
    out: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not (name and equals and place) or name in out:
            raise ConfigError(f"{option} {text}: write NAME=SHARDS, every name once")
        out[name] = place
    return out


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.analyse``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m uml_fast.analyse", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--shifted", nargs="+", default=[], metavar="NAME=SHARDS",
        help="test sets of the target from elsewhere; classes meet by name",
    )  # fmt: skip
    parser.add_argument(
        "--pairs", nargs="+", default=[], metavar="AUXILIARY=SHARDS",
        help="samples named as their true partners among the target's test samples",
    )  # fmt: skip
    parser.add_argument(
        "--json", action="store_true", help="print what analysis.json holds instead of a table"
    )
    args = parser.parse_args(argv)
    shifted, pairs = _named("--shifted", args.shifted), _named("--pairs", args.pairs)
    result = analyse(args.run, shifted, pairs)
    write_json(args.run / ANALYSIS, result)
    report = write_report(args.run)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        print(print_analyses(result))
        print(f"report: {report}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
