"""Train a recipe: every mode for every seed, then the comparison and the report.

``python -m uml_fast.train [recipe] [overrides]``
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uml_fast import log
from uml_fast.checkpoint import StopSignal
from uml_fast.cli import parse, run_main
from uml_fast.config import RunConfig
from uml_fast.report import print_table, write_report
from uml_fast.run import locked, open_run, write_json
from uml_fast.summary import describe_samples, summarise
from uml_fast.trace import Trace
from uml_fast.trial import Stopped, Trial

_AGAIN = "the same command continues it"


def train(config: RunConfig) -> Path | None:
    """Train (or continue) a run; returns its folder, or None if asked to stop before the end.

    Raises:
        ConfigError, DataError: the configuration or the data cannot be used.
        RunFolderError: the run folder cannot be written, or holds another run.
        TrainingError: a loss was not finite.
        CheckpointError: all checkpoints of a trial are broken, or none can be written.
    """
    if not (config.folder / "run.json").exists():
        _check(config)
    folder = open_run(config)
    with locked(folder):
        return folder if _train_all(config, folder) else None


def _check(config: RunConfig) -> None:
    """Raise what any mode would stop at before its first step, while nothing is written yet."""
    for mode in config.modes:
        Trial(config, mode, config.seed, config.folder / "trials" / f"{mode}-{config.seed}")


def _train_all(config: RunConfig, folder: Path) -> bool:
    """Train what is missing and write the summary; False if asked to stop before the end."""
    seeds = range(config.seed, config.seed + config.seeds)
    trials = [log.Trial(mode, seed, config.steps) for seed in seeds for mode in config.modes]
    missing = [t for t in trials if _read_result(_place(folder, t) / "result.json") is None]
    traced = next((t for t in missing if t.mode == "uml"), missing[0] if missing else None)
    results = []
    with log.RunLog(folder, trials) as run_log, StopSignal() as stop:
        for planned in trials:
            if stop:
                run_log.note(f"stopped before {planned.mode} seed {planned.seed}; {_AGAIN}")
                return False
            trace_to = config.trace if planned == traced else None
            result = _finish_trial(config, planned, folder, run_log, stop, trace_to)
            if result is None:
                return False
            results.append(result)
    summary = summarise(config, results, folder)
    write_json(folder / "summary.json", summary)
    report = write_report(folder)
    print(print_table(summary))
    print(f"report: {report}")
    return True


def _finish_trial(
    config: RunConfig,
    planned: log.Trial,
    folder: Path,
    run_log: log.RunLog,
    stop: StopSignal,
    trace_to: Path | None,
) -> dict[str, Any] | None:
    """The result of one trial, trained where it is not there yet; None if it was asked to stop."""
    place = _place(folder, planned)
    finished = place / "result.json"
    if _read_result(finished) is None:
        trial = Trial(config, planned.mode, planned.seed, place)
        if planned.mode == "uml" and not (folder / "samples.json").exists():
            write_json(folder / "samples.json", describe_samples(trial.model, trial.task))
        try:
            with _traced(trace_to, run_log) as trace:
                result = trial.run(stop, run_log, trace)
        except Stopped:
            run_log.note(
                f"stopped at step {trial.step} of {planned.mode} seed {planned.seed}; {_AGAIN}"
            )
            return None
        write_json(finished, result)
    return _read_result(finished)


def _place(folder: Path, planned: log.Trial) -> Path:
    return folder / "trials" / f"{planned.mode}-{planned.seed}"


@contextlib.contextmanager
def _traced(path: Path | None, run_log: log.RunLog) -> Iterator[Trace | None]:
    """A trace that is written to ``path`` however the trial ends; nothing where that is None."""
    if path is None:
        yield None
        return
    trace = Trace()
    try:
        yield trace
    finally:
        try:
            trace.write(path)
            run_log.note(f"trace: {path} (open it in ui.perfetto.dev)")
        except OSError as error:
            run_log.note(f"the trace {path} could not be written: {error.strerror or error}")


def _read_result(path: Path) -> dict[str, Any] | None:
    """A trial's result; None where there is none, or only a torn one."""
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return result


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m uml_fast.train``; returns the exit status."""
    train(parse(argv, "python -m uml_fast.train"))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
