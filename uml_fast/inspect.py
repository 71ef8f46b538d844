"""Show what is in shards: ``python -m uml_fast.inspect SHARDS [--verify]``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from uml_fast.cli import options, run_main
from uml_fast.config import require
from uml_fast.data.shards import remote
from uml_fast.data.shards.files import ShardSet, manifest_folder, read_manifest
from uml_fast.data.shards.lengths import UNITS
from uml_fast.data.source import DataError

_SHOWN_CLASSES = 20
_SHOWN_TEXT = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """Show what is in shards: splits, classes, lengths, statistics, first samples and problems.

      uml-fast inspect shards/photos
      uml-fast inspect shards/photos --verify --split train
      uml-fast inspect 'https://host/train-{000000..000031}.tar' --samples 0

    The exit code is 1 where something is wrong with them.
    """

    shards: Annotated[str, tyro.conf.arg(metavar="SHARDS")]
    """Folder that prepare wrote, or its URL; or tar files: a folder, glob, range, URL or pipe."""
    split: str | None = None
    """Only this split."""
    verify: bool = False
    """Read everything and compare it with the checksums."""
    cache: Path | None = None
    """Folder for copies of shards from elsewhere."""
    samples: int = 3
    """Samples shown of each split."""

    def __post_init__(self) -> None:
        require(self.samples >= 0, f"--samples is {self.samples}; it must not be negative")


def main(argv: list[str] | None = None) -> int:
    """Print the report; returns 0, or 1 where something is wrong with the shards."""
    given = options(InspectConfig, "inspect", argv)
    require(
        remote.is_remote(given.shards) or not (Path(given.shards) / "run.json").is_file(),
        f"{given.shards} is a run folder, not shards: uml-fast evaluate {given.shards} measures "
        f"its models again, uml-fast analyse {given.shards} looks into them; report.html there "
        "shows its results",
    )
    faults = list(_report(given.shards, given.split, given.cache, given.samples, given.verify))
    for fault in faults:
        print(f"WRONG: {fault}")
    if not faults:
        print("nothing wrong found" if given.verify else "nothing wrong found (--verify reads all)")
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
