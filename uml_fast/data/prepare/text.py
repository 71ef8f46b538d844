"""Texts: one sample a row of a CSV, JSON lines or JSON table, as UTF-8 or as token ids."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from uml_fast.data.prepare.items import BadSample, Converter, Item, Problem, Sample
from uml_fast.data.prepare.listing import Found
from uml_fast.data.prepare.tables import TextColumns, column, read_table
from uml_fast.data.source import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class TextConverter(Converter):
    """Stores a text without the white space around it."""

    def convert(self, item: Item) -> Sample:
        """See ``Converter``."""
        try:
            content = item.value.strip().encode("utf-8")
        except UnicodeEncodeError as e:
            raise BadSample(
                "invalid UTF-8", f"at character {e.start}; store the table as UTF-8"
            ) from e
        if not content:
            raise BadSample("empty text", "no characters; take the row out")
        return Sample(content, "txt", (len(content),))


@dataclass(frozen=True, slots=True)
class TokenConverter(Converter):
    """Stores the ids that a tokenizer gives, special tokens among them."""

    tokenizer: Path
    """A file tokenizer.json."""
    max_tokens: int
    """Longer texts are cut; the special tokens stay."""

    def convert(self, item: Item) -> Sample:
        """See ``Converter``."""
        ids = load_tokenizer(self.tokenizer, self.max_tokens).encode(item.value.strip()).ids
        if not item.value.strip() or not ids:
            raise BadSample("empty text", "no tokens; take the row out")
        content = np.array(ids, "<i4").tobytes()
        return Sample(content, "ids", (len(ids),))


@functools.cache
def load_tokenizer(path: Path, max_tokens: int) -> Tokenizer:
    """The tokenizer of a file or of a model's folder, without padding.

    Raises:
        DataError: there is none, or it cannot be read.
        ModuleNotFoundError: tokenizers is not installed.
    """
    from tokenizers import Tokenizer

    file = tokenizer_file(path)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare exceptions
        raise DataError(f"{file} cannot be read as a tokenizer: {e}") from e
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def tokenizer_file(path: Path) -> Path:
    """The file tokenizer.json at or in ``path``.

    Raises:
        DataError: there is none.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"there is no {file}; give a tokenizer.json, or the folder of a model with one "
            "(save_pretrained of a fast tokenizer writes it)"
        )
    return file


def find_texts(source: Path, columns: TextColumns) -> Found:
    """Every text of a table, or of all tables in a folder.

    A text is known by its id, else by its class and a hash of its characters, so that it keeps its
    split when rows are added; equal texts of a class fall into the same split.

    Raises:
        DataError: the source is not there or cannot be read as a table.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist; give a .csv, .tsv, .jsonl or .json file")
    paths = [source]
    if source.is_dir():
        kinds = (".csv", ".tsv", ".jsonl", ".json")
        paths = sorted(p for p in source.iterdir() if p.suffix.lower() in kinds)
        if not paths:
            raise DataError(f"{source} holds no .csv, .tsv, .jsonl or .json file")
    found = Found()
    seen: Counter[str] = Counter()
    for path in paths:
        _add(found, seen, path, columns, split=path.stem if len(paths) > 1 else None)
    if repeated := seen.total() - len(seen):
        found.notes["texts that occur again in their class"] = repeated
    return found


def _add(
    found: Found, seen: Counter[str], path: Path, columns: TextColumns, split: str | None
) -> None:
    table = read_table(path.read_bytes(), path.name)
    text_column = column(table, "text", columns.text)
    label_column = column(table, "label", columns.label, is_required=False)
    split_column = column(table, "split", columns.split, is_required=False)
    id_column = column(table, "id", columns.id, is_required=False)
    changed = path.stat().st_mtime_ns
    for row in table.rows:
        text = row.cells.get(text_column, "")
        label = row.cells.get(label_column, "").strip() if label_column else None
        given = row.cells.get(split_column, "").strip() if split_column else (split or "")
        identity = row.cells.get(id_column, "").strip() if id_column else ""
        if label == "":
            found.problems.append(Problem(row.name, "missing label", f"column {label_column}"))
            continue
        if split_column and not given:
            found.problems.append(Problem(row.name, "missing split", f"column {split_column}"))
            continue
        if id_column and not identity:
            found.problems.append(Problem(row.name, "missing id", f"column {id_column}"))
            continue
        group = name = identity
        if not id_column:
            raw = text.encode("utf-8", errors="surrogatepass")
            group = f"{label or 'text'}/{hashlib.blake2b(raw, digest_size=8).hexdigest()}"
            count = seen[group] = seen[group] + 1
            name = group if count == 1 else f"{group}-{count}"
        found.items.append(
            Item(
                name, label, given or None, size=len(text), changed_ns=changed, value=text,
                group=group,
            )
        )  # fmt: skip
