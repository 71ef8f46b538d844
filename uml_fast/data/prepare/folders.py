"""Sources that are files of one sample each: class folders, tar files of them, tables of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from uml_fast.data.prepare.items import Item, Problem
from uml_fast.data.prepare.listing import SPLIT_NAMES, Found
from uml_fast.data.prepare.tables import FileColumns, Table, column, read_table
from uml_fast.data.shards.tar import members
from uml_fast.data.source import DataError

TABLES = (".csv", ".tsv")
_LITTER = {"Thumbs.db", "desktop.ini", "__MACOSX"}
_PAPERS = {".txt", ".md", ".rst", ".pdf", ".html", ".xml", ".yaml", ".yml", ".log", ".ini", ".db"}
"""Extensions of what people keep beside their data; noted, but no fault of the data."""


def find_files(source: Path, extensions: Collection[str], columns: FileColumns) -> Found:
    """Every file of a source with its class and split.

    Args:
        source: folder, tar file of a folder, or CSV whose paths are relative to its own folder. A
            folder has a folder for each class, or files and one CSV, or files alone (no classes);
            all of that may lie in folders called train, val and test.
        extensions: those of usable files, lower case, with the dot.
        columns: names of the table's columns.

    Raises:
        DataError: the source is not there or cannot be read, or its table lacks a column.
    """
    if source.suffix.lower() in TABLES and source.is_file():
        table = read_table(source.read_bytes(), source.name)
        return _from_table(table, _on_disk(source.parent), extensions, columns)
    entries, folders = _entries(source)
    if not entries and not folders:
        raise DataError(f"{source} holds no files")
    entries, folders = _without_common_folders(entries, folders)
    tops = {path.split("/")[0] for path in (*entries, *folders) if "/" in path or path in folders}
    has_splits = bool(tops) and all(top.lower() in SPLIT_NAMES for top in tops)
    depth = 1 if has_splits else 0
    found = Found()
    found.classes = {f.split("/")[depth] for f in folders if f.count("/") == depth}
    files = {p: e for p, e in entries.items() if Path(p).suffix.lower() in extensions}
    if not any(path.count("/") > depth for path in files) and not found.classes:
        tables = [e for e in entries.values() if Path(e.name).suffix.lower() in TABLES]
        if len(tables) > 1:
            names = ", ".join(e.name for e in tables)
            raise DataError(f"{source} holds several tables ({names}); name one as the source")
        if tables:
            table = read_table(tables[0].read(), tables[0].name)
            return _from_table(table, entries.get, extensions, columns, others=len(files))
    for path, item in entries.items():
        parts = path.split("/")
        split = parts[0] if has_splits and len(parts) > 1 else None
        inner = parts[depth:] if split is not None or not has_splits else parts
        label = inner[0] if len(inner) > 1 else None
        suffix = Path(path).suffix.lower()
        if suffix in _PAPERS and path not in files:
            found.notes[f"{suffix} file left out"] += 1
        elif path not in files:
            found.problems.append(_unknown_extension(path, extensions))
        elif item.size == 0:
            found.problems.append(Problem(path, "empty file", "0 bytes; take it out"))
        elif (found.classes and label is None) or (has_splits and split is None):
            found.problems.append(
                Problem(path, "missing label", "lies outside of the folders of the classes")
            )
        else:
            found.items.append(replace(item, label=label, split=split))
    return found


def _unknown_extension(path: str, extensions: Collection[str]) -> Problem:
    known = ", ".join(sorted(extensions))
    return Problem(path, "unknown extension", f"{Path(path).suffix or 'none'}; known are {known}")


def _from_table(
    table: Table,
    lookup: Callable[[str], Item | None],
    extensions: Collection[str],
    columns: FileColumns,
    others: int = 0,
) -> Found:
    """The files that a table names; ``others`` is the number of usable files in the folder."""
    found = Found()
    file_column = column(table, "file", columns.file)
    label_column = column(table, "label", columns.label)
    split_column = column(table, "split", columns.split, is_required=False)
    missing = 0
    for row in table.rows:
        path, label = row.cells.get(file_column, ""), row.cells.get(label_column, "").strip()
        path = path.strip().removeprefix("./")
        split = row.cells.get(split_column, "").strip() if split_column else ""
        item = lookup(path) if path else None
        if item is None:
            missing += 1
            found.problems.append(Problem(path or row.name, "missing file", f"named in {row.name}"))
        elif Path(path).suffix.lower() not in extensions:
            found.problems.append(_unknown_extension(path, extensions))
        elif item.size == 0:
            found.problems.append(Problem(path, "empty file", "0 bytes; take it out"))
        elif not label:
            found.problems.append(Problem(path, "missing label", f"no label in {row.name}"))
        elif split_column and not split:
            found.problems.append(Problem(path, "missing split", f"no split in {row.name}"))
        else:
            found.items.append(replace(item, label=label, split=split or None))
    if table.rows and missing == len(table.rows):
        raise DataError(
            f"{table.name}: none of its {missing} files exists, such as "
            f"{found.problems[0].file!r}; paths are relative to the table's folder"
        )
    if others > len(table.rows):
        found.notes["files that the table does not name"] = others - len(table.rows)
    return found


def _on_disk(folder: Path) -> Callable[[str], Item | None]:
    def lookup(path: str) -> Item | None:
        try:
            return _item(path, folder / path)
        except OSError:
            return None

    return lookup


def _item(name: str, place: Path) -> Item:
    stat = place.stat()
    return Item(name, None, None, place, 0, stat.st_size, stat.st_mtime_ns)


def _entries(source: Path) -> tuple[dict[str, Item], set[str]]:
    """Files by path inside the source, without what begins with a dot; and folders."""
    if source.is_dir():
        return _walk(source)
    if not source.exists():
        raise DataError(f"{source} does not exist; give a folder, a tar file or a CSV")
    if source.suffix.lower() != ".tar":
        raise DataError(f"{source} is no folder, .tar or .csv; unpack it and give the folder")
    changed = source.stat().st_mtime_ns
    entries = {}
    for member in members(source):
        name = member.name.removeprefix("./")
        if not _is_litter(name):
            entries[name] = Item(name, None, None, source, member.offset, member.size, changed)
    return dict(sorted(entries.items())), set()


def _walk(source: Path) -> tuple[dict[str, Item], set[str]]:
    entries, folders = {}, set()

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; make the folder readable") from error

    for here, inner, names in os.walk(source, onerror=refuse, followlinks=True):
        inner[:] = sorted(d for d in inner if not _is_litter(d))
        base = Path(here).relative_to(source)
        folders |= {(base / d).as_posix() for d in inner}
        for name in names:
            if _is_litter(name):
                continue
            path = (base / name).as_posix()
            try:
                entries[path] = _item(path, Path(here) / name)
            except OSError:
                # a link to nowhere: named when its bytes are asked for
                entries[path] = Item(path, None, None, Path(here) / name, 0, 1)
    return dict(sorted(entries.items())), folders


def _is_litter(path: str) -> bool:
    return any(part.startswith(".") or part in _LITTER for part in path.split("/"))


def _without_common_folders(
    entries: dict[str, Item], folders: set[str]
) -> tuple[dict[str, Item], set[str]]:
    """Drop folders around everything, down to the splits or classes."""
    while True:
        tops = {path.split("/")[0] for path in entries}
        if len(tops) != 1 or any(path.count("/") < 2 for path in entries):
            return entries, folders
        top = next(iter(tops))
        if top.lower() in SPLIT_NAMES:
            return entries, folders
        cut = len(top) + 1
        entries = {p[cut:]: replace(item, name=p[cut:]) for p, item in entries.items()}
        folders = {f[cut:] for f in folders if f.startswith(f"{top}/")}
