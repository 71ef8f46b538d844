"""Train a recipe: every mode for every seed, then the comparison and the report.

``python -m uml_fast.train [recipe] [overrides]``, on several devices or machines
``torchrun --nproc-per-node N -m uml_fast.train [recipe] [overrides]``. With ``--dry-run`` it says
what would be trained, and trains nothing.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":  # ahead of torch's import, so that Ctrl-C is one line then too
    from uml_fast import cli

    raise SystemExit(cli.main(["train", *sys.argv[1:]]))

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uml_fast.cli import parse
from uml_fast.config import RunConfig
from uml_fast.data.data_errors import DATA_ERRORS, DataErrors
from uml_fast.data.folders import FoldersConfig
from uml_fast.distributed.parallel import check_groups
from uml_fast.distributed.ranks import Ranks, join_ranks, one_voice
from uml_fast.experiment.dry_run import dry_run, dry_run_heads
from uml_fast.experiment.run import check_alike, locked, open_run, to_json
from uml_fast.experiment.summary import describe_samples, summarise
from uml_fast.experiment.train_heads import check_alone, train_heads
from uml_fast.grid.run import GridConfig
from uml_fast.report import print_table, write_report
from uml_fast.report.probes import probe_lines
from uml_fast.runtime.profiling import profiled
from uml_fast.runtime.stop import StopSignal
from uml_fast.runtime.trace import Trace
from uml_fast.training.live import PlannedTrial
from uml_fast.training.log import RunLog, SilentLog, write_json
from uml_fast.training.optim import short_warmup
from uml_fast.training.start import resolve
from uml_fast.training.trial import Stopped, Trial
from uml_fast.training.wandb_runs import WandbRuns, check_wandb

logger = logging.getLogger("uml_fast")

_AGAIN = "the same command continues it"


def train(config: RunConfig | GridConfig) -> Path | None:
    """Train (or continue) a run; returns its folder, or None if asked to stop before the end.

    A ``GridConfig`` trains heads on frozen features (``train_heads``).

    Raises:
        ConfigError, DataError: the configuration or the data cannot be used.
        RunFolderError: the run folder cannot be written, or holds another run.
        TrainingError: a loss was not finite.
        CheckpointError: all checkpoints of a trial are broken, or none can be written.
        RanksError: another rank is gone.
    """
    if isinstance(config, GridConfig):
        return train_heads(config)
    with join_ranks(config.device, config.dist.timeout_s) as ranks:
        check_groups(config.dist, ranks.world)
        config = resolve(config)
        check_alike(config, ranks)
        folder = ranks.from_first(lambda: _open(config))
        with locked(folder) if ranks.is_first else contextlib.nullcontext():
            return folder if _train_all(config, folder, ranks) else None


def _open(config: RunConfig) -> Path:
    if config.wandb:
        check_wandb()
    if note := short_warmup(config.steps, config.optim):
        logger.warning(note)
    if not (config.folder / "run.json").exists():
        _check(config)
    return open_run(config)


def _check(config: RunConfig) -> None:
    """Raise what any mode would stop at before its first step, while nothing is written yet."""
    for mode in config.modes:
        Trial(config, mode, config.seed, config.folder / "trials" / f"{mode}-{config.seed}")


def _train_all(config: RunConfig, folder: Path, ranks: Ranks) -> bool:
    """Train what is missing and write the summary; False if asked to stop before the end."""
    seeds = range(config.seed, config.seed + config.seeds)
    trials = [PlannedTrial(mode, seed, config.steps) for seed in seeds for mode in config.modes]
    missing = [t for t in trials if _read_result(_place(folder, t) / "result.json") is None]
    second = config.compared[1]
    traced = next((t for t in missing if t.mode == second), missing[0] if missing else None)
    results = []
    with _log(config, folder, trials, ranks) as run_log, StopSignal() as stop:
        for planned in trials:
            if ranks.any(bool(stop)):
                run_log.note(f"stopped before {planned.mode} seed {planned.seed}; {_AGAIN}")
                return False
            is_traced = planned == traced and ranks.is_first
            result = _finish_trial(config, planned, folder, run_log, stop, is_traced, ranks)
            if result is None:
                return False
            results.append(result)
    if ranks.is_first:
        _finish(config, results, folder)
    return True


def _log(
    config: RunConfig, folder: Path, trials: list[PlannedTrial], ranks: Ranks
) -> RunLog | SilentLog:
    if not ranks.is_first:
        return SilentLog()
    wandb = WandbRuns(config.wandb, folder, to_json(config)) if config.wandb else None
    return RunLog(folder, trials, wandb=wandb)


def _finish(config: RunConfig, results: list[dict[str, Any]], folder: Path) -> None:
    summary = summarise(config, results, folder)
    write_json(folder / "summary.json", summary)
    report = write_report(folder)
    print("\n".join([print_table(summary), *probe_lines(summary)]))
    if (folder / DATA_ERRORS).exists():
        print(_unread(config, folder / DATA_ERRORS))
    print(f"report: {report}")


def _unread(config: RunConfig, named: Path) -> str:
    """How many samples of each modality could not be read, with the share where it is known."""
    parts = []
    for name, count in DataErrors(0, named).by_modality().items():
        part = f"{count:,} samples of {name}"
        if isinstance(config.data, FoldersConfig):
            total = config.data.count(name, is_target=name == config.target)
            part = f"{count:,} of {total:,} ({100 * count / total:.0f} %) samples of {name}"
        parts.append(part)
    return f"{', '.join(parts)} could not be read, named in {named}"


def _finish_trial(
    config: RunConfig,
    planned: PlannedTrial,
    folder: Path,
    run_log: RunLog | SilentLog,
    stop: StopSignal,
    is_traced: bool,
    ranks: Ranks,
) -> dict[str, Any] | None:
    """The result of one trial, trained where it is not there yet; None if it was asked to stop."""
    place = _place(folder, planned)
    finished = place / "result.json"
    if ranks.from_first(lambda: _read_result(finished)) is None:
        trial = Trial(config, planned.mode, planned.seed, place, ranks)
        samples = folder / "samples.json"
        if ranks.is_first and planned.mode == config.compared[1] and not samples.exists():
            write_json(samples, describe_samples(trial.model, trial.task))
        try:
            trace_to, profile_to = (config.trace, config.profile) if is_traced else (None, None)
            with _traced(trace_to, run_log) as trace, profiled(profile_to, run_log.note) as tick:
                result = trial.run(stop, run_log, trace, tick)
        except Stopped:
            run_log.note(
                f"stopped at step {trial.step} of {planned.mode} seed {planned.seed}; {_AGAIN}"
            )
            return None
        if ranks.is_first:
            write_json(finished, result)
    return ranks.from_first(lambda: _read_result(finished))


def _place(folder: Path, planned: PlannedTrial) -> Path:
    return folder / "trials" / f"{planned.mode}-{planned.seed}"


@contextlib.contextmanager
def _traced(path: Path | None, run_log: RunLog | SilentLog) -> Iterator[Trace | None]:
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
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_dry = "--dry-run" in arguments
    with one_voice():
        config = parse([a for a in arguments if a != "--dry-run"], "python -m uml_fast.train")
        if isinstance(config, GridConfig):
            check_alone()
    if not is_dry:
        train(config)
    elif isinstance(config, GridConfig):
        print(dry_run_heads(config))
    elif os.environ.get("RANK", "0") == "0":
        print(dry_run(config, int(os.environ.get("WORLD_SIZE", "1"))))
    return 0
