"""Tables of text: CSV, TSV, JSON lines and JSON, every value as the characters that were there.

Bytes that are not UTF-8 survive as surrogates, so that the row they are in can be named later.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import Any

from uml_fast.data.source import DataError

ALIASES = {
    "file": ("file", "filename", "file_name", "path", "image", "audio"),
    "label": ("label", "class", "category", "target"),
    "split": ("split", "subset", "partition"),
    "text": ("text", "sentence", "caption", "prompt"),
    "id": ("id", "key"),
}
"""Meaning of a column -> what it is usually called, most likely name first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileColumns:
    """Names of the columns of a table of files; empty: the usual ones (``ALIASES``)."""

    file: str = ""
    """Column with the path of each file; empty: file, filename, path, ..."""
    label: str = ""
    """Column with the name of the class; empty: label, class, category, ..."""
    split: str = ""
    """Column with the name of the split; empty: split, subset, ... if there is one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextColumns:
    """Names of the columns of a table of texts; empty: the usual ones (``ALIASES``)."""

    text: str = ""
    """Column with the text; empty: text, sentence, caption, ..."""
    label: str = ""
    """Column with the name of the class; empty: label, class, ... if there is one."""
    split: str = ""
    """Column with the name of the split; empty: split, subset, ... if there is one."""
    id: str = ""
    """Column with a unique name of each row; empty: id or key if there is one."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row."""

    name: str
    """Table and line, for messages."""
    cells: dict[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under named columns."""

    name: str
    columns: tuple[str, ...]
    rows: list[Row]


def column(table: Table, meaning: str, given: str, *, is_required: bool = True) -> str:
    """The column that holds ``meaning``: the one given, or the first usual name; "" for none.

    Raises:
        DataError: it is required or given, and not there.
    """
    for name in (given,) if given else ALIASES[meaning]:
        for present in table.columns:
            if present.strip().lower() == name.lower():
                return present
    if is_required or given:
        raise DataError(
            f"{table.name} has no column {given or meaning!r}; its columns are "
            f"{', '.join(table.columns) or 'none'}. Name the right one with --columns.{meaning}"
        )
    return ""


def read_table(content: bytes, name: str) -> Table:
    """Read a table; the extension of ``name`` says which kind it is.

    JSON is an array of objects, or an object whose keys are classes and whose values are lists of
    texts.

    Raises:
        DataError: the table is empty or not what its extension says; the message names the line.
    """
    kind = name.rpartition(".")[2].lower()
    text = content.decode("utf-8-sig", errors="surrogateescape")
    if kind in ("csv", "tsv"):
        return _separated(text, name, "\t" if kind == "tsv" else ",")
    if kind == "jsonl":
        objects = [
            (f"{name}:{i}", _json(line, f"{name}:{i}"))
            for i, line in enumerate(text.split("\n"), 1) if line.strip()
        ]  # fmt: skip
        return _objects(objects, name)
    if kind != "json":
        raise DataError(f"{name} is no table; give .csv, .tsv, .jsonl or .json")
    value = _json(text, name)
    if isinstance(value, dict):
        return _classes(value, name)
    if not isinstance(value, list):
        raise DataError(f"{name} holds neither an array of objects nor classes with lists of texts")
    return _objects([(f"{name}[{i}]", v) for i, v in enumerate(value)], name)


def _separated(text: str, name: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        header = tuple(next(reader, ()))
        for cells in reader:
            if any(cells):
                where = f"{name}:{reader.line_num}"
                rows.append(Row(where, dict(zip(header, cells, strict=False))))
    except csv.Error as e:
        raise DataError(f"{name}, line {reader.line_num}: {e}; correct that line") from e
    if not header:
        raise DataError(f"{name} is empty; its first line names the columns")
    return Table(name, header, rows)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where} is not JSON: {e}") from e


def _objects(objects: list[tuple[str, Any]], name: str) -> Table:
    columns: dict[str, None] = {}
    rows = []
    for where, value in objects:
        if not isinstance(value, dict):
            raise DataError(f"{where} is not an object such as {{'text': ..., 'label': ...}}")
        cells = {k: _cell(v) for k, v in value.items()}
        columns |= dict.fromkeys(cells)
        rows.append(Row(where, cells))
    return Table(name, tuple(columns), rows)


def _classes(value: dict[str, Any], name: str) -> Table:
    rows = []
    for label, texts in value.items():
        if not isinstance(texts, list):
            raise DataError(f"{name}: class {label!r} has no list of texts")
        rows += [
            Row(f"{name}/{label}[{i}]", {"label": label, "text": _cell(t)})
            for i, t in enumerate(texts)
        ]
    return Table(name, ("text", "label"), rows)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
