"""Show what is in shards: ``python -m uml_fast.inspect SHARDS [--verify]``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from uml_fast.cli import run_main
from uml_fast.data.shards.files import ShardSet, manifest_folder, read_manifest
from uml_fast.data.shards.lengths import UNITS
from uml_fast.data.source import DataError

_SHOWN_CLASSES = 20
_SHOWN_TEXT = 60


def main(argv: list[str] | None = None) -> int:
    """Print the report; returns 0, or 1 where something is wrong with the shards."""
    parser = argparse.ArgumentParser(
        prog="python -m uml_fast.inspect",
        description="Show splits, classes, lengths, statistics, first samples and problems.",
        epilog="The exit code is 1 where something is wrong with them.",
    )
    parser.add_argument(
        "shards", metavar="SHARDS",
        help="folder that prepare wrote, or its URL; or tar files: folder, glob, range, URL, pipe",
    )  # fmt: skip
    parser.add_argument("--split", help="only this split")
    parser.add_argument(
        "--verify", action="store_true", help="read everything and compare with the checksums"
    )
    parser.add_argument("--cache", type=Path, help="folder for copies of shards from elsewhere")
    parser.add_argument("--samples", type=int, default=3, help="samples shown of each split (3)")
    args = parser.parse_args(argv)
    faults = list(_report(args.shards, args.split, args.cache, args.samples, args.verify))
    for fault in faults:
        print(f"WRONG: {fault}")
    if not faults:
        print("nothing wrong found" if args.verify else "nothing wrong found (--verify reads all)")
    return 1 if faults else 0


def _report(
    where: str, only: str | None, cache: Path | None, samples: int, verify: bool
) -> Iterator[str]:
    """Print what is there; yields each fault."""
    manifest: dict[str, Any] = {}
    splits: list[str | None] = [only]
    folder = manifest_folder(where, cache)
    if folder is not None:
        manifest = read_manifest(folder)
        splits = [only] if only else list(manifest["splits"])
        _print_manifest(folder, manifest)
    opened: dict[str, ShardSet] = {}
    for split in splits:
        try:
            shards = ShardSet.open(where, split, cache)
        except DataError as e:
            yield str(e)
            continue
        with shards:
            opened[split or "all"] = shards
            yield from _print_split(split or "all", shards, samples)
            if verify:
                yield from shards.verify()
    _print_classes(opened)
    names = next((s.class_names for s in opened.values() if s.class_names), ())
    first = next(iter(opened.items()), None)
    if first:
        present = np.bincount(first[1].label[first[1].label >= 0], minlength=len(names))
        for name in (n for n, count in zip(names, present, strict=False) if count == 0):
            yield f"class {name!r} has no sample in the split {first[0]}"


def _print_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    facts = [f"{k} {manifest[k]}" for k in ("sample_rate", "width", "vocabulary") if k in manifest]
    print(f"{folder}: {', '.join([manifest['kind'], *facts])}")
    for name, value in manifest.get("normalisation", {}).items():
        numbers = value if isinstance(value, list) else [value]
        text = " ".join(f"{v:.4g}" for v in numbers[:6]) + (" ..." if len(numbers) > 6 else "")
        print(f"  training {name}: {text}")
    for title in ("problems", "notes"):
        for name, count in manifest.get(title, {}).items():
            print(f"  {title}: {count} x {name}")
    problems = folder / "problems.jsonl"
    if problems.is_file():
        lines = problems.read_text(encoding="utf-8").splitlines()
        for line in lines[:5]:
            problem = json.loads(line)
            print(f"    {problem['file']}: {problem['problem']} ({problem['detail']})")
        if len(lines) > 5:
            print(f"    ... {len(lines) - 5} more in {problems}")


def _print_split(name: str, shards: ShardSet, samples: int) -> Iterator[str]:
    kinds = "/".join(e.decode() for e in shards.index.extensions.tolist())
    size_mib = int(shards.index.size.sum()) / 2**20
    count = f"{len(shards):,} samples in {len(shards.paths)} shard(s)"
    print(f"{name}: {count}, {size_mib:.1f} MiB of {kinds}")
    for column, unit in enumerate(UNITS[shards.kind]):
        length = shards.length[:, column]
        print(f"  {unit}: {length.min():,} to {length.max():,}, mean {length.mean():,.1f}")
        if (length < 0).any():
            i = int(np.argmin(length))
            yield f"{int((length < 0).sum())} samples cannot be read, such as {shards.key(i)}"
    unlabelled = int((shards.label < 0).sum())
    if unlabelled:
        print(f"  without a class: {unlabelled:,}")
    for i in range(min(samples, len(shards))):
        label = int(shards.label[i])
        known = 0 <= label < len(shards.class_names)
        size = " x ".join(f"{n:,}" for n in shards.length[i])
        text = ""
        if shards.kind == "text":
            text = ": " + shards.payload(i).decode(errors="replace")[:_SHOWN_TEXT]
        print(
            f"  {shards.key(i)}.{shards.extension(i)}  "
            f"{shards.class_names[label] if known else label}  {size}{text}"
        )


def _print_classes(splits: dict[str, ShardSet]) -> None:
    """Samples of each class and split."""
    labels = [s.label[s.label >= 0] for s in splits.values()]
    classes = max((int(x.max()) + 1 for x in labels if len(x)), default=0)
    names = next((s.class_names for s in splits.values() if s.class_names), ())
    classes = max(classes, len(names))
    if not classes:
        return
    counts = np.stack([np.bincount(x, minlength=classes) for x in labels], 1)
    titles = [names[i] if i < len(names) else str(i) for i in range(classes)]
    width = max(len("class"), *(len(t) for t in titles[:_SHOWN_CLASSES]))
    print(f"{'class':<{width}}" + "".join(f"{s:>10}" for s in splits))
    for title, row in list(zip(titles, counts, strict=True))[:_SHOWN_CLASSES]:
        print(f"{title:<{width}}" + "".join(f"{n:>10,}" for n in row))
    if classes > _SHOWN_CLASSES:
        print(f"... {classes - _SHOWN_CLASSES} more classes, {counts.min()} to {counts.max()} each")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
