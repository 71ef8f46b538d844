"""Search hyper-parameters, choosing on validation: ``python -m uml_fast.search RECIPE --over ...``.

``--over optim.lr=1e-3,1e-4 backbone.width=40,150`` trains the recipe with every combination, each
mode in a run folder of its own below the search's (``<mode>/<combination>``), so that a stopped
search goes on where it was. Each mode then takes the combination whose mean over seeds is best on
validation, and only of these two the test numbers are compared, seed by seed. The unimodal mode is
not trained twice where combinations differ in what it has not: warm-up, other modalities.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.cli import parse, run_main
from uml_fast.config import ConfigError, Mode, RunConfig, require
from uml_fast.experiment.run import open_run, to_json
from uml_fast.experiment.summary import compare
from uml_fast.report import print_table, write_report
from uml_fast.report.probes import probe_lines
from uml_fast.runtime.machine import machine_info
from uml_fast.runtime.progress import duration
from uml_fast.train import train
from uml_fast.training.log import write_json
from uml_fast.training.start import resolve
from uml_fast.training.trial import TrainingError

_PROG = "python -m uml_fast.search"
_USAGE = f"""usage: {_PROG} RECIPE --over FIELD=VALUE,VALUE [FIELD=...] [options of the recipe]

{__doc__}
  python -m uml_fast.search numbers --over optim.lr=1e-3,3e-3 backbone.width=64,128 --seeds 3

The options of a recipe: python -m uml_fast.train RECIPE --help
"""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One mode with one combination of values."""

    mode: Mode
    name: str
    config: RunConfig


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a candidate came to."""

    candidate: Candidate
    results: tuple[dict[str, Any], ...]
    """One of each seed; empty where training failed."""
    failure: str = ""

    @property
    def validation(self) -> float | None:
        """Mean of the run's metric over the seeds' validation samples; None where it failed."""
        values = [r["validation"] for r in self.results]
        return float(np.mean(values)) if values else None


def read_arguments(argv: Sequence[str]) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The arguments of the recipe, and the values to try of each field.

    Raises:
        ConfigError: nothing to search, or a field without two different values.
    """
    rest: list[str] = []
    over: dict[str, tuple[str, ...]] = {}
    is_over = False
    for argument in argv:
        if argument.startswith("--"):
            is_over = argument == "--over"
            rest += [] if is_over else [argument]
            continue
        if not is_over:
            rest.append(argument)
            continue
        field, _, values = argument.partition("=")
        given = tuple(v for v in values.split(",") if v)
        require(
            len(set(given)) == len(given) >= 2,
            f"--over {argument}: give FIELD=VALUE,VALUE with two values or more, all different",
        )
        require(field not in over, f"--over names {field} twice; put all its values behind it once")
        over[field] = given
    require(bool(over), f"nothing to search: {_PROG} RECIPE --over optim.lr=1e-3,1e-4")
    return rest, over


def candidates(arguments: Sequence[str], over: dict[str, tuple[str, ...]]) -> list[Candidate]:
    """Every combination for every mode of the run; of equal unimodal ones the first.

    Raises:
        ConfigError: a field that the recipe has not, or a value that it does not take.
        SystemExit: the same, found by the command line (2).
    """
    base = _parsed(arguments)
    folder = base.out or Path("runs") / f"{base.folder.name}-search"
    found: list[Candidate] = []
    seen: set[str] = set()
    for values in itertools.product(*over.values()):
        name = ",".join(f"{f}={v}" for f, v in zip(over, values, strict=True))
        changes = [x for f, v in zip(over, values, strict=True) for x in (f"--{f}", v)]
        config = _parsed([*arguments, *changes])
        for mode in config.modes:
            place = folder / mode / name.replace("/", "_")
            its = dataclasses.replace(config, modes=(mode,), out=place)
            key = _unimodal_key(its) if mode == "unimodal" else str(place)
            if key not in seen:
                found.append(Candidate(mode, name, its))
            seen.add(key)
    return found


def _parsed(arguments: Sequence[str]) -> RunConfig:
    config = parse(list(arguments), _PROG)
    if not isinstance(config, RunConfig):
        raise ConfigError(f"{arguments[0]} trains its own grid of hyper-parameters; use train")
    require(
        config.resume in ("auto", "never"),
        f"resume is {config.resume}; a search continues its own folder: give it as --out",
    )
    require(int(os.environ.get("WORLD_SIZE", "1")) == 1, "a search runs in one process")
    return config


def _unimodal_key(config: RunConfig) -> str:
    """What the unimodal trials of a configuration depend on."""
    its = config.for_mode("unimodal")
    mix = its.mix
    if mix.policy != "alternate":
        mix = dataclasses.replace(mix, policy="joint", warmup_epochs=0, warmup_first="auxiliary")
    return json.dumps(to_json(dataclasses.replace(its, mix=mix, out=None)), sort_keys=True)


def run_candidate(candidate: Candidate) -> Outcome | None:
    """Train a candidate, or read what it came to before; None if asked to stop.

    Raises:
        ConfigError, DataError, RunFolderError, CheckpointError: as ``train``.
    """
    config = resolve(candidate.config)
    seeds = range(config.seed, config.seed + config.seeds)
    summary = config.folder / "summary.json"
    if config.resume == "auto" and summary.exists():
        open_run(config)
        results = json.loads(summary.read_text())["results"]
        if [r["seed"] for r in results] == list(seeds):
            return Outcome(candidate, tuple(results))
    try:
        # what it prints has test numbers, which are nobody's business before the choice
        with contextlib.redirect_stdout(io.StringIO()):
            folder = train(config)
    except TrainingError as error:
        return Outcome(candidate, (), str(error))
    if folder is None:
        return None
    return Outcome(candidate, tuple(json.loads(summary.read_text())["results"]))


def choose(outcomes: Sequence[Outcome], *, lower_is_better: bool) -> Outcome:
    """The outcome that is best on validation; the first of equal ones. Test numbers are not read.

    Raises:
        ConfigError: every one failed, or the run measures nothing on validation.
    """
    known = [o for o in outcomes if o.results]
    if not known:
        raise ConfigError(f"every combination failed; the last: {outcomes[-1].failure}")
    require(
        all(r["validation"] is not None for o in known for r in o.results),
        "the run measures nothing on validation, so nothing can be chosen; set --metric",
    )
    sign = -1.0 if lower_is_better else 1.0
    return max(known, key=lambda o: sign * (o.validation or 0.0))


def summarise_search(
    folder: Path, over: dict[str, tuple[str, ...]], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Content of the search's summary.json: the choice, and the comparison of what was chosen."""
    modes = list(dict.fromkeys(o.candidate.mode for o in outcomes))
    config = outcomes[0].candidate.config
    lower = config.metric == "error"
    tried = {m: [o for o in outcomes if o.candidate.mode == m] for m in modes}
    chosen = {m: choose(tried[m], lower_is_better=lower) for m in modes}
    results = [r for m in modes for r in chosen[m].results]
    both = dataclasses.replace(config, modes=tuple(modes))
    stored = {m: json.loads((c.candidate.config.folder / "summary.json").read_text())
              for m, c in chosen.items()}  # fmt: skip
    info = machine_info()
    return {
        "recipe": config.recipe, "target": config.target, "metric": config.metric,
        "machine": info["machine"], "versions": info["versions"], "commit": info["commit"],
        "over": {f: list(v) for f, v in over.items()},
        "searched": max(len(t) for t in tried.values()),
        "tried": {m: [
            {"name": o.candidate.name, "folder": str(o.candidate.config.folder.relative_to(folder)),
             "validation": o.validation, "is_chosen": o is chosen[m], "failure": o.failure}
            for o in tried[m]
        ] for m in modes},
        "comparison": compare(both, results),
        "results": results,
        "baselines": stored[modes[0]]["baselines"],
        "probes": [p for m in modes for p in stored[m].get("probes", [])],
    }  # fmt: skip


def show(summary: dict[str, Any]) -> str:
    """The search as text: every combination's validation, what was chosen, then the comparison."""
    lines = []
    is_error = summary["metric"] == "error"
    for mode, tried in summary["tried"].items():
        lines.append(f"{mode}: {len(tried)} combinations, mean on validation (* chosen)")
        for t in tried:
            value = t["validation"]
            shown = f"failed: {t['failure']}" if value is None else (
                f"{value:.4g}" if is_error else f"{100 * value:.1f} %"
            )  # fmt: skip
            lines.append(f"{'*' if t['is_chosen'] else ' '} {t['name']}  {shown}")
        lines.append("")
    counts = " and ".join(f"{len(t)} {mode}" for mode, t in summary["tried"].items())
    chance = f"the interval covers seeds, not the choice among {counts} combinations"
    return "\n".join([*lines, print_table(summary), chance, *probe_lines(summary)])


def search(arguments: Sequence[str], over: dict[str, tuple[str, ...]]) -> Path | None:
    """Train every candidate, choose, compare; the search's folder, or None if asked to stop.

    Raises:
        ConfigError: as ``candidates`` and ``choose``.
        DataError, RunFolderError, CheckpointError: as ``train``.
    """
    todo = candidates(arguments, over)
    folder = todo[0].config.folder.parents[1]
    outcomes = []
    begun, trained = time.monotonic(), 0
    for i, candidate in enumerate(todo):
        is_new = not (candidate.config.folder / "summary.json").exists()
        left = (time.monotonic() - begun) / trained * (len(todo) - i) if trained else None
        told = f", about {duration(left)} left" if left is not None else ""
        print(
            f"search {i + 1}/{len(todo)}: {candidate.mode} {candidate.name}{told}", file=sys.stderr
        )
        outcome = run_candidate(candidate)
        if outcome is None:
            print("the same command continues the search", file=sys.stderr)
            return None
        trained += is_new
        outcomes.append(outcome)
    summary = summarise_search(folder, over, outcomes)
    write_json(folder / "summary.json", summary)
    print(show(summary))
    print(f"report: {write_report(folder)}")
    return folder


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.search``; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or {"-h", "--help"} & {*arguments}:
        print(_USAGE)
        return 0
    search(*read_arguments(arguments))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
