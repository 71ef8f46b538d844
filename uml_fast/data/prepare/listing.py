"""From a source's inputs to classes, splits, keys and an order that depend on nothing else."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from uml_fast.config import ConfigError
from uml_fast.data.prepare.items import Item, Problem
from uml_fast.data.source import DataError

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""What sources call a split -> what it is called here; other names stay as they are."""

_MAX_KEY = 90
"""Longest key; with an extension it fits into the 100 bytes of a tar header."""


@dataclass(slots=True)
class Found:
    """What a source holds, as it was found."""

    items: list[Item] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    classes: set[str] = field(default_factory=set)
    """Classes known without an input, such as empty folders."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What will be written."""

    splits: dict[str, list[tuple[str, int, Item]]]
    """Split -> (key, class, input) in the order of the shards, training first."""
    class_names: tuple[str, ...]
    problems: tuple[Problem, ...]
    notes: Counter[str]

    def __len__(self) -> int:
        return sum(map(len, self.splits.values())) + len(self.problems)


def parse_split(text: str) -> dict[str, float]:
    """``train=0.8,val=0.1,test=0.1`` as names and parts of one.

    Raises:
        ConfigError: it is written otherwise, or the parts do not sum to one.
    """
    try:
        parts = {
            name.strip(): float(part)
            for name, part in (p.split("=") for p in text.split(","))
        }  # fmt: skip
    except ValueError:
        parts = {}
    if (
        not parts
        or not abs(sum(parts.values()) - 1) <= 1e-6  # NaN is none
        or min(parts.values()) <= 0
        or not all(re.fullmatch(r"[A-Za-z0-9_]+", name) for name in parts)
    ):
        raise ConfigError(
            f"split is {text!r}; write names and parts that sum to 1: train=0.8,val=0.1,test=0.1"
        )
    return parts


def order(found: Found, split: str, seed: int) -> Listing:
    """Give every input its class, split, key and place.

    Split and order come from hashes of seed and name: an input keeps its split when others are
    added, and every shard holds a mixture of classes. Only in a class so small that it would miss a
    split are inputs moved (``_drawn``).

    Raises:
        DataError: there is no input that can be used, or a split's name cannot be a file name.
        ConfigError: ``split`` cannot be read.
    """
    parts = parse_split(split)
    problems = list(found.problems)
    items = []
    seen: set[str] = set()
    for item in found.items:
        if item.name in seen:
            problems.append(
                Problem(item.name, "duplicate key", "named before; the first one is used")
            )
        else:
            seen.add(item.name)
            items.append(item)
    if not items:
        kinds = ", ".join(f"{n} x {k}" for k, n in Counter(p.problem for p in problems).items())
        example = f"; the first: {problems[0].file}: {problems[0].detail}" if problems else ""
        raise DataError(f"no input can be used ({kinds or 'the source is empty'}){example}")
    class_names = natural_order(
        found.classes | {item.label for item in items if item.label is not None}
    )
    number = {name: i for i, name in enumerate(class_names)}
    drawn = _drawn(items, parts, seed)
    splits: dict[str, list[tuple[bytes, str, int, Item]]] = {}
    for key, item in zip(_keys(items), items, strict=True):
        label = -1 if item.label is None else number[item.label]
        name = item.split if item.split is not None else drawn[item.group or item.name]
        name = SPLIT_NAMES.get(name.lower(), name)
        if not re.fullmatch(r"[A-Za-z0-9_]+", name):
            raise DataError(
                f"{item.name} is in the split {name!r}; use letters, digits and _ in its name"
            )
        splits.setdefault(name, []).append((_digest(item.name, seed, "order"), key, label, item))
    first = [name for name in (*SPLIT_NAMES.values(), *parts) if name in splits]
    names = list(dict.fromkeys([*first, *sorted(splits)]))
    ordered = {
        name: [row[1:] for row in sorted(splits[name], key=lambda row: row[:2])] for name in names
    }
    return Listing(ordered, class_names, tuple(sorted(problems)), found.notes)


def natural_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names sorted; as numbers if all of them are, so that class "10" is not number 2."""
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def _digest(name: str, seed: int, purpose: str) -> bytes:
    text = f"{seed}\0{purpose}\0{name}".encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=16).digest()


def _drawn(items: Sequence[Item], parts: dict[str, float], seed: int) -> dict[str, str]:
    """The split of each input (of each group) that has none: its hash decides.

    A class with as many inputs as there are splits gets one into each; a smaller one goes to the
    largest split first, then to test.
    """
    splits: dict[str, str] = {}
    of_class: dict[str | None, dict[str, None]] = {}
    for item in items:
        if item.split is None:
            name = item.group or item.name
            if name not in splits:
                splits[name] = _draw(name, parts, seed)
            of_class.setdefault(item.label, {})[name] = None
    largest = max(parts, key=lambda split: parts[split])
    by_need = sorted(parts, key=lambda split: (split != largest, split != "test"))
    for names in of_class.values():
        count = Counter(splits[name] for name in names)
        for split in by_need[: len(names)]:
            if count[split]:
                continue
            # what is least needed gives first, else the fullest
            spare = [s for s in by_need[len(names) :] if count[s]]
            giver = spare[-1] if spare else max(by_need, key=lambda s: count[s])
            moved = min(
                (n for n in names if splits[n] == giver), key=lambda n: _digest(n, seed, "move")
            )
            splits[moved] = split
            count[giver] -= 1
            count[split] += 1
    return splits


def _draw(name: str, parts: dict[str, float], seed: int) -> str:
    point = int.from_bytes(_digest(name, seed, "split")[:8], "big") / 2**64
    total = 0.0
    for split, part in parts.items():
        total += part
        if point < total:
            return split
    return next(reversed(parts))


def _keys(items: Sequence[Item]) -> list[str]:
    """A unique key for each input: its name without extension, in letters that every tool takes.

    Where that is not unique or changes the name, a hash of the name is appended.
    """
    plain = []
    for item in items:
        folder, slash, file = item.name.rpartition("/")
        stem = file.rpartition(".")[0] or file
        name = (folder + slash + stem) if item.place is not None else item.name
        key = "/".join(
            re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in name.split("/") if part.strip(".")
        )
        plain.append((key, key != name))
    count = Counter(key for key, _ in plain)
    keys = []
    for (key, is_changed), item in zip(plain, items, strict=True):
        if is_changed or count[key] > 1 or not 0 < len(key) <= _MAX_KEY:
            mark = _digest(item.name, 0, "key").hex()[:12]
            key = f"{key[: _MAX_KEY - 13].rstrip('/')}-{mark}"
        keys.append(key)
    return keys
