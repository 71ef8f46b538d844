"""The whole preparation of one folder of shards: list, convert, write, describe."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from uml_fast.data.prepare.items import Converter, Problem
from uml_fast.data.prepare.listing import Listing
from uml_fast.data.prepare.manifest import FORMAT, manifest, versions
from uml_fast.data.prepare.pool import convert_all
from uml_fast.data.prepare.writer import WORK, SplitWriter, clear, exclusive, remove_work
from uml_fast.data.shards.files import MANIFEST, read_manifest
from uml_fast.data.shards.index import ShardIndex
from uml_fast.data.source import DataError
from uml_fast.runtime.files import advice, replace_file
from uml_fast.runtime.progress import StatusLine, duration

PROBLEMS = "problems.jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What to write, and where."""

    kind: str
    """images, audio, text, tokens or features."""
    out: Path
    """Folder of the shards."""
    listing: Listing
    """Inputs in their order."""
    converter: Converter
    """Makes samples of them."""
    options: Mapping[str, Any]
    """What the samples depend on, for the manifest and to know whether a folder is the same."""
    facts: Mapping[str, Any]
    """What holds for every sample, such as the sample rate."""
    shard_bytes: int
    """Size of a shard at most, unless one sample is larger."""
    workers: int
    """Processes that convert."""
    max_errors: float
    """Below 1: part of the inputs that may be unusable; else their number."""
    overwrite: bool
    """Replace other shards in the folder."""

    @property
    def allowed(self) -> int:
        """Inputs that may be unusable."""
        few = self.max_errors < 1
        return int(self.max_errors * len(self.listing)) if few else int(self.max_errors)

    def fingerprint(self) -> str:
        """Checksum of everything the shards depend on: inputs, options and versions."""
        digest = hashlib.sha256()
        parts = [FORMAT, self.kind, self.options, self.facts, versions(self.kind)]
        parts += [self.listing.class_names, self.listing.problems]
        digest.update(json.dumps(parts, sort_keys=True).encode())
        for split, rows in self.listing.splits.items():
            for key, label, item in rows:
                row = (split, key, label, item.name, item.size, item.changed_ns)
                digest.update(repr(row).encode(errors="backslashreplace"))
        return digest.hexdigest()


def build(job: Job, stream: TextIO | None = None) -> dict[str, Any]:
    """Prepare a folder, or finish what a killed run began; returns the manifest.

    Args:
        job: what to write.
        stream: where progress goes; None: standard error.

    Raises:
        DataError: too many inputs cannot be used, or the folder holds something else.
    """
    status = StatusLine(stream)
    fingerprint = job.fingerprint()
    try:
        with exclusive(job.out):
            if (job.out / MANIFEST).exists():
                before = read_manifest(job.out)
                if before.get("fingerprint") == fingerprint:
                    status.note(f"{job.out} is complete already; nothing was done")
                    remove_work(job.out)
                    return before
                if not job.overwrite:
                    raise DataError(
                        f"{job.out} holds shards of other inputs or options; name another folder, "
                        "or replace them with --overwrite"
                    )
            state = job.out / WORK / "fingerprint"
            if not state.exists() or state.read_text() != fingerprint:
                if any(job.out.glob("*.tar")):
                    status.note("what was begun here is of other inputs or options: starting anew")
                clear(job.out)
                replace_file(state, fingerprint)
            made = _write(job, status, fingerprint)
            remove_work(job.out)
            return made
    except OSError as e:
        raise DataError(
            f"cannot write into {job.out}: {e.strerror or e}; {advice(e, 'as OUT')}. "
            "The same command goes on where it stopped"
        ) from e


def _write(job: Job, status: StatusLine, fingerprint: str) -> dict[str, Any]:
    progress = _Progress(job, status)
    writers: list[SplitWriter] = []
    # a problem of an input that was listed is in its shard's record; these have no shard
    problems = list(job.listing.problems)
    try:
        _stop_at(job, problems)
        for split, rows in job.listing.splits.items():
            writer = SplitWriter(job.out, split, job.shard_bytes)
            writers.append(writer)
            start = writer.done
            progress.skip(start)
            known = problems + [p for w in writers for p in w.all_problems()]
            _stop_at(job, known)
            items = [item for _, _, item in rows[start:]]
            with closing(convert_all(items, job.converter, job.workers)) as results:
                for i, result in enumerate(results, start):
                    if isinstance(result, Problem):
                        writer.problems.append(result)
                        known.append(result)
                        _stop_at(job, known)
                    else:
                        key, label, _ = rows[i]
                        writer.add(i, key, label, result)
                    progress.step(len(known))
            writer.finish(len(rows))
    except BaseException:
        for writer in writers:
            writer.abandon()
        _write_problems(job.out, problems, writers)
        raise
    _write_problems(job.out, problems, writers)
    parts: dict[str, tuple[ShardIndex, Sequence[Any]]] = {
        w.split: (w.write_index(job.kind), w.shards) for w in writers if w.shards
    }
    if not parts:
        raise DataError(f"no input can be used; {job.out / PROBLEMS} names what is wrong with each")
    made = manifest(
        kind=job.kind,
        class_names=job.listing.class_names,
        splits=parts,
        facts=job.facts,
        options=job.options,
        fingerprint=fingerprint,
        problems=problems + [p for w in writers for p in w.all_problems()],
        notes=sum((w.all_notes() for w in writers), Counter(job.listing.notes)),
    )
    replace_file(job.out / MANIFEST, json.dumps(made, indent=1, allow_nan=False) + "\n")
    progress.end()
    return made


def _stop_at(job: Job, problems: Sequence[Problem]) -> None:
    """Raise DataError once more inputs are unusable than may be."""
    if len(problems) <= job.allowed:
        return
    last = problems[-1]
    counts = Counter(p.problem for p in problems)
    kinds = ", ".join(f"{n} x {kind}" for kind, n in counts.most_common())
    raise DataError(
        f"{last.file}: {last.problem} ({last.detail}). {len(problems)} of {len(job.listing)} "
        f"inputs cannot be used ({kinds}), {job.allowed} may be; {job.out / PROBLEMS} names them. "
        f"Correct them, or skip them with --max-errors {len(job.listing)}"
    )


def _write_problems(out: Path, listed: list[Problem], writers: list[SplitWriter]) -> None:
    found = listed + [p for w in writers for p in w.all_problems()]
    text = "".join(json.dumps(p._asdict()) + "\n" for p in found)
    replace_file(out / PROBLEMS, text)


class _Progress:
    """Inputs done, their rate and the time left."""

    def __init__(self, job: Job, status: StatusLine) -> None:
        self.kind = job.kind
        self.status = status
        self.total = sum(map(len, job.listing.splits.values()))
        self.done = self.skipped = 0
        self.start = time.monotonic()
        status.is_due(self.start)  # nothing to tell before the first interval is over

    def skip(self, count: int) -> None:
        """``count`` inputs were done by a run before."""
        if count:
            self.status.note(f"going on after {count:,} inputs that are done")
        self.done += count
        self.skipped += count

    def step(self, problems: int) -> None:
        """One more is done."""
        self.done += 1
        now = time.monotonic()
        if not self.status.is_due(now):
            return
        rate = (self.done - self.skipped) / max(now - self.start, 1e-9)
        text = (
            f"{self.kind}  {self.done:,}/{self.total:,}  {rate:,.0f}/s  "
            f"left {duration((self.total - self.done) / rate)}"
        )
        self.status.update(text + (f"  problems {problems}" if problems else ""))

    def end(self) -> None:
        """All are done."""
        took = duration(time.monotonic() - self.start)
        self.status.note(f"{self.kind}  {self.done:,} inputs in {took}")
