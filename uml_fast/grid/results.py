"""What became of a run's heads, kept as they end: a line each, and the best matrix of each group.

A group is a (variant, row of the table, shots, seed). The head with the best validation accuracy
stands for it, the first of equal ones.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from uml_fast.data.source import DataError
from uml_fast.grid.run import GridCell
from uml_fast.grid.train import CellResult
from uml_fast.runtime.files import advice, replace_file

CELLS = "cells.jsonl"
"""File of a run folder with a line for every head that was trained."""
HEADS = "heads"
"""Folder in a run folder with the matrices of the chosen heads."""


@dataclass(slots=True)
class Best:
    """The best head of a group so far."""

    number: int
    """Place among the run's cells."""
    validation: float
    weight: Tensor | None
    """(D, C) where it is not in its file yet."""


class Results:
    """Results of a run's heads, those of earlier processes too.

    Args:
        folder: run folder.
        cells: every head of the run.

    Raises:
        DataError: the file cannot be read.
    """

    def __init__(self, folder: Path, cells: Sequence[GridCell]) -> None:
        self._path, self._heads = folder / CELLS, folder / HEADS
        self._cells = cells
        self._numbers = {_key(c.record()): i for i, c in enumerate(cells)}
        self.done: dict[int, dict[str, Any]] = {}
        self._best: dict[tuple[Any, ...], Best] = {}
        self._waiting: list[str] = []
        for record in self._read():
            number = self._numbers.get(_key(record))
            if number is not None:
                self._take(number, record, None)

    def _read(self) -> list[dict[str, Any]]:
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        except OSError as e:
            raise DataError(f"{self._path} cannot be read: {e.strerror}") from e
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:  # a killed process leaves the beginning of a line
                continue
        if len(records) < len(lines):
            logging.getLogger("uml_fast").warning(
                "%s: %d damaged line(s); their heads are trained again",
                self._path, len(lines) - len(records),
            )  # fmt: skip
        return records

    def _take(self, number: int, record: dict[str, Any], weight: Tensor | None) -> None:
        self.done[number] = record
        group, validation = self._cells[number].group, record["validation"]
        best = self._best.get(group)
        if best is None or (-validation, number) < (-best.validation, best.number):
            self._best[group] = Best(number, validation, weight)

    def add(self, number: int, result: CellResult) -> None:
        """Take the result of a head; ``flush`` writes it."""
        record = self._cells[number].record() | {
            "validation": result.validation, "test": result.test, "step": result.step,
            "steps": result.steps,
        }  # fmt: skip
        self._take(number, record, result.weight)
        self._waiting.append(json.dumps(record) + "\n")

    def flush(self, metadata: dict[str, str]) -> None:
        """Write what was taken: matrices first, so that no line is there without its matrix.

        Raises:
            DataError: the disk is full.
        """
        from safetensors.torch import save

        try:
            for group, best in self._best.items():
                if best.weight is None:
                    continue
                self._heads.mkdir(parents=True, exist_ok=True)
                record = json.dumps(self.done[best.number])
                content = save({"weight": best.weight.cpu().contiguous()},
                               {"format": "pt", "head": record, **metadata})  # fmt: skip
                replace_file(self._heads / head_name(group), content)
                best.weight = None
            if self._waiting:
                with self._path.open("ab") as file:
                    # a killed process may have left the beginning of a line
                    is_torn = file.tell() > 0 and self._path.read_bytes()[-1:] != b"\n"
                    file.write((b"\n" if is_torn else b"") + "".join(self._waiting).encode())
                self._waiting.clear()
        except OSError as e:
            raise DataError(
                f"cannot write to {self._heads.parent}: {e.strerror or e}; {advice(e)}. The same "
                "command goes on"
            ) from e

    def chosen(self) -> list[dict[str, Any]]:
        """The best head of every group, in the order of the run's cells."""
        best = sorted(self._best.values(), key=lambda b: b.number)
        return [self.done[b.number] for b in best]


def head_name(group: tuple[Any, ...]) -> str:
    """Name of the file of a group's best head."""
    variant, row, shots, seed = group
    parts = [f"{name}{value}" for name, value in row]
    several = [variant, f"{shots}shots" if shots else "all", *parts, f"seed{seed}"]
    return "-".join(several) + ".safetensors"


def _key(record: dict[str, Any]) -> str:
    parts = [record[k] for k in ("variant", "row", "is_averaged", "cell")]
    return json.dumps(parts, sort_keys=True)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A chosen head as it is stored."""

    path: Path
    record: dict[str, Any]
    """variant, row, cell, validation, test."""
    weight: Tensor
    """fp32 (D, C): logits are ``rows @ weight``."""
    metadata: dict[str, str]
    """classes, target and encoder as JSON."""


def load_heads(folder: Path) -> list[Head]:
    """The chosen heads of a run folder.

    Raises:
        DataError: there is none, or a file is torn.
    """
    from safetensors import SafetensorError, safe_open

    heads = []
    for path in sorted((folder / HEADS).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                metadata, weight = file.metadata(), file.get_tensor("weight")
            heads.append(Head(path, json.loads(metadata["head"]), weight, metadata))
        except (OSError, SafetensorError, KeyError, ValueError) as e:
            raise DataError(f"{path} is no whole head: {e}; take it away and train again") from e
    if not heads:
        raise DataError(f"{folder} holds no finished head; train it first")
    return sorted(heads, key=lambda h: (h.record["cell"]["seed"], h.record["cell"]["shots"]))
