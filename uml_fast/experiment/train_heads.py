"""Train a grid of heads on frozen features: all of them, the choice by validation, the table."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from uml_fast.config import ConfigError, require
from uml_fast.data.source import say_once
from uml_fast.experiment.heads import baselines, summarise_heads
from uml_fast.experiment.run import locked, open_run
from uml_fast.grid import HeadData, train_grid
from uml_fast.grid.data import GridData, LoadedData
from uml_fast.grid.results import Results
from uml_fast.grid.run import GridCell, GridConfig
from uml_fast.grid.train import CellResult
from uml_fast.report import print_table, write_report
from uml_fast.runtime.progress import StatusLine, duration
from uml_fast.runtime.stop import StopSignal
from uml_fast.training.log import write_json

_MATRICES_BYTES = 1 << 29
"""Memory for the matrices of heads that are trained in one call."""
_FLUSH_S = 5.0
"""Seconds of work that a kill may lose, at most, beside the heads in training."""


class _Stopped(Exception):
    """The run was asked to stop; all that was finished is kept."""


def check_alone() -> None:
    """Raise ConfigError where torchrun started several processes."""
    require(
        int(os.environ.get("WORLD_SIZE", "1")) == 1,
        "a grid of heads trains in one process; start it without torchrun",
    )


def train_heads(config: GridConfig) -> Path | None:
    """Train (or continue) a grid; returns its folder, or None if asked to stop before the end.

    Raises:
        ConfigError, DataError: the configuration or the features cannot be used.
        RunFolderError: the run folder cannot be written, or holds another run.
    """
    check_alone()
    cells = list(config.cells())
    data = LoadedData(config.data, config.modalities)
    if not (config.folder / "run.json").exists():
        data.of(config.seed, config.shots[0])  # while nothing is written yet
    folder = open_run(config)
    with locked(folder), StopSignal() as stop:
        results = Results(folder, cells)
        status = StatusLine()
        started = time.monotonic()
        try:
            taker = _Taker(config.recipe, len(cells), results, status, stop)
            _train(config, cells, data, results, folder, taker)
        except _Stopped:
            status.note(
                f"stopped: {len(results.done):,} of {len(cells):,} heads are kept; the same "
                "command goes on there"
            )
            return None
        status.note(f"{len(cells):,} heads, {duration(time.monotonic() - started)}")
        summary = summarise_heads(config, results.chosen(), baselines(config, data), len(cells))
        write_json(folder / "summary.json", summary)
        report = write_report(folder)
        print(print_table(summary))
        print(f"report: {report}")
    return folder


def _datasets(
    loaded: LoadedData, cells: Sequence[GridCell], numbers: Sequence[int]
) -> Iterator[tuple[str, GridData, list[int]]]:
    """Name of some features, the features, and the cells among ``numbers`` trained on them."""
    groups: dict[tuple[int, int], dict[bool, list[int]]] = {}
    for number in numbers:
        cell = cells[number].cell
        key = loaded.key(cell.seed, cell.shots)
        groups.setdefault(key, {}).setdefault(cells[number].is_averaged, []).append(number)
    for (seed, shots), parts in groups.items():
        data = loaded.of(seed, shots)
        for is_averaged, chosen in parts.items():
            name = f"seed {seed}, {shots} shots" if (seed, shots) != (0, 0) else "all"
            if is_averaged:
                yield f"{name}, averaged", data.averaged(), chosen
            else:
                yield name, data, chosen


class _Taker:
    """Keeps the results of heads as they end, and says how far it is."""

    def __init__(
        self, name: str, heads: int, results: Results, status: StatusLine, stop: StopSignal
    ) -> None:
        self._name, self._heads, self._results = name, heads, results
        self._status, self._stop = status, stop
        self._begun = self._flushed = time.monotonic()
        self._before = len(results.done)

    def take(self, number: int, result: CellResult, metadata: dict[str, str]) -> None:
        """Keep the result of the run's head ``number``.

        Raises:
            _Stopped: a signal asked for it.
        """
        self._results.add(number, result)
        now = time.monotonic()
        if self._stop or now - self._flushed > _FLUSH_S:
            self._results.flush(metadata)
            self._flushed = now
        if self._stop:
            raise _Stopped
        if self._status.is_due(now):
            done = len(self._results.done)
            rate = (done - self._before) / (now - self._begun)
            self._status.update(
                f"{self._name}: {done:,} of {self._heads:,} heads, {rate:,.1f} a second, "
                f"{duration((self._heads - done) / rate)} left"
            )


def _say_few(data: GridData, shots: set[int]) -> None:
    """Say where a class has fewer samples than shots."""
    target = data.heads.target
    labels = data.heads.train[target].labels
    present, counts = labels.unique(return_counts=True)
    fewest = int(counts.argmin())
    for k in sorted(shots):
        if int(counts[fewest]) < k:
            say_once(
                f"{target}: {k} shots take all of class {data.class_names[int(present[fewest])]}, "
                f"which has {int(counts[fewest])} training samples"
            )


def _train(
    config: GridConfig, cells: Sequence[GridCell], loaded: LoadedData, results: Results,
    folder: Path, taker: _Taker,
) -> None:  # fmt: skip
    """Train every head that has no result yet."""
    missing = [i for i in range(len(cells)) if i not in results.done]
    for name, data, numbers in _datasets(loaded, cells, missing):
        _check_same_features(folder, name, data.heads)
        _say_few(data, {cells[n].cell.shots for n in numbers})
        metadata = {
            "classes": json.dumps(data.class_names), "target": config.target,
            "encoder": json.dumps(data.encoder),
        }  # fmt: skip
        matrix_bytes = 4 * data.heads.classes * data.heads.validation.width
        together = max(32, _MATRICES_BYTES // matrix_bytes)
        for at in range(0, len(numbers), together):
            part = numbers[at : at + together]

            def take(
                place: int, result: CellResult, part: Sequence[int] = part,
                metadata: dict[str, str] = metadata,
            ) -> None:  # fmt: skip
                taker.take(part[place], result, metadata)

            try:
                train_grid(
                    data.heads, [cells[i].cell for i in part], config.schedule,
                    device=config.device, keep_weights=True, on_result=take,
                )  # fmt: skip
            finally:
                results.flush(metadata)


def _check_same_features(folder: Path, name: str, data: HeadData) -> None:
    """Keep a digest of the features in the run folder.

    Raises:
        ConfigError: the run began with other ones.
    """
    digest = hashlib.sha256()
    splits = {**data.train, "validation of": data.validation, "test of": data.test}
    for split in sorted(splits):
        digest.update(split.encode())
        for tensor in (splits[split].rows, splits[split].labels):
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    path = folder / "features.json"
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    if known.setdefault(name, digest.hexdigest()) != digest.hexdigest():
        raise ConfigError(
            f"{folder} was begun with other features than those there now ({name}); use --resume "
            "never to set it aside, or another --out"
        )
    write_json(path, known)
