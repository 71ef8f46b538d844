"""Files from elsewhere, copied to this machine: several at a time, whole or not there, once.

A copy grows in ``<file>.part`` and gets its name when it is whole and its checksum holds. Whoever
holds the lock of that file fetches; other processes that want the same wait for it. What a killed
process left there is continued where the server can (HTTP ranges of an unchanged file).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import re
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple

from uml_fast.data.shards.tar import members
from uml_fast.data.source import DataError
from uml_fast.runtime.files import sha256_of
from uml_fast.runtime.progress import StatusLine, duration

ATTEMPTS = 4
"""Times that a file is asked for."""
BACKOFF_S = 0.5
"""Seconds before the second attempt; each later one waits twice as long."""
_PARALLEL = 8
"""Files that are fetched at a time: hides the latency of object stores."""
_CHUNK = 1 << 20
_TIMEOUT_S = 30.0
"""Seconds without a byte after which a connection counts as cut."""
_POLL_S = 0.1
_JOIN_S = 5.0
"""Seconds that threads have to end; one whose command hangs ends with the process."""
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
"""HTTP status codes after which the same request may succeed."""
_MIB = 1 << 20


class Wanted(NamedTuple):
    """A file to fetch."""

    url: str
    path: Path
    """Where it belongs."""
    size: int | None = None
    """Bytes; None: not known."""
    sha256: str | None = None
    """Checksum; None: not known."""
    is_tar: bool = True


class _Again(Exception):
    """An attempt failed; another one may not."""


def fetch_all(wanted: Sequence[Wanted], *, is_quiet: bool = False) -> None:
    """Fetch the files that are not there yet.

    Raises:
        DataError: one cannot be fetched; names its URL and says what to do.
    """
    missing = [w for w in dict.fromkeys(wanted) if not w.path.exists()]
    if not missing:
        return
    progress = _Progress(missing)
    stop = threading.Event()
    todo: SimpleQueue[Wanted | None] = SimpleQueue()
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    count = min(_PARALLEL, len(missing))
    for item in (*missing, *[None] * count):
        todo.put(item)

    def work() -> None:
        while (item := todo.get()) is not None and not stop.is_set():
            try:
                _fetch(item, progress, stop)
                done.put(None)
            except BaseException as e:
                done.put(e)

    threads = [threading.Thread(target=work, name="uml-fetch", daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        for _ in missing:
            error = done.get()
            if error is not None:
                raise error
            progress.file()
    finally:
        stop.set()
        end = time.monotonic() + _JOIN_S
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
    if not is_quiet and missing[0].is_tar:
        progress.end()


def _fetch(w: Wanted, progress: _Progress, stop: threading.Event) -> None:
    part = w.path.with_name(w.path.name + ".part")
    with _local(w):
        w.path.parent.mkdir(parents=True, exist_ok=True)
        file = part.open("a+b")
    with file:
        _lock(file, stop)
        if w.path.exists():
            part.unlink(missing_ok=True)
            progress.at(w.url, w.path.stat().st_size)
            return
        for attempt in range(ATTEMPTS):
            if stop.is_set():
                return
            try:
                _download(w, file, progress, stop)
                if not stop.is_set():
                    _check(w, part, file)
                    with _local(w):
                        os.fsync(file.fileno())
                        part.replace(w.path)
                        _mark_path(part).unlink(missing_ok=True)
                return
            except _Again as e:
                problem = e
                stop.wait(BACKOFF_S * 2**attempt)
    raise DataError(
        f"{w.url}: {problem} (tried {ATTEMPTS} times); see that it is whole and can be reached. "
        "The same command goes on where it stopped"
    )


def _lock(file: BinaryIO, stop: threading.Event) -> None:
    """Wait until no other process fetches this file; a process that dies lets go of it."""
    while not stop.is_set():
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            stop.wait(_POLL_S)


def _download(w: Wanted, file: BinaryIO, progress: _Progress, stop: threading.Event) -> None:
    """Fill ``file`` with what is at the URL, behind what is in it already where that goes on."""
    with _opened(w, file) as (stream, at, expected):
        with _local(w):
            file.truncate(at)
        progress.at(w.url, at)
        read = getattr(stream, "read1", stream.read)  # what has come, not a whole chunk
        while not stop.is_set():
            try:
                chunk = read(_CHUNK)
            except (OSError, http.client.HTTPException) as e:
                raise _Again(f"it was cut after {at:,} bytes: {_reason(e)}") from e
            if not chunk:
                break
            with _local(w):
                file.write(chunk)
                file.flush()
            at += len(chunk)
            progress.at(w.url, at)
    if expected is not None and at != expected and not stop.is_set():
        raise _Again(f"it was cut after {at:,} of {expected:,} bytes")


@contextlib.contextmanager
def _opened(w: Wanted, file: BinaryIO) -> Iterator[tuple[Any, int, int | None]]:
    """A stream of the URL, the byte it begins at, and the bytes that the whole file has."""
    if w.url.lower().startswith(("http://", "https://")):
        with _opened_http(w, file) as opened:
            yield opened
        return
    from webdataset.gopen import gopen, gopen_schemes

    url, scheme = w.url, w.url.partition(":")[0]
    if scheme == "s3" and "s3" not in gopen_schemes:
        url = f"pipe:aws s3 cp --only-show-errors {shlex.quote(url)} -"
    elif scheme not in gopen_schemes:
        known = ", ".join(sorted({*gopen_schemes, "s3"} - {"__default__"}))
        raise DataError(f"{w.url}: {scheme}: is not known; known are {known}")
    try:
        stream = gopen(url, "rb")
    except FileNotFoundError as e:
        raise DataError(f"{w.url}: needs the program {e.filename}; install it") from None
    try:
        yield stream, 0, None
    except BaseException:
        with contextlib.suppress(OSError):
            stream.close()
        raise
    try:
        stream.close()  # a command's exit status is known only now
    except OSError as e:
        raise _Again(f"it failed after its last byte: {_reason(e)}") from e


@contextlib.contextmanager
def _opened_http(w: Wanted, file: BinaryIO) -> Iterator[tuple[Any, int, int | None]]:
    """By the standard library: unlike webdataset's curl it tells why, how much, and goes on."""
    mark_path = _mark_path(w.path.with_name(w.path.name + ".part"))
    at = file.seek(0, os.SEEK_END)
    mark = mark_path.read_text() if at and mark_path.exists() else ""
    headers = {"Range": f"bytes={at}-", "If-Range": mark} if mark else {}
    headers["Accept-Encoding"] = "identity"
    try:
        request = urllib.request.Request(w.url, headers=headers)
        response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
    except urllib.error.HTTPError as e:
        e.close()
        if e.code == 416:
            mark_path.unlink(missing_ok=True)
        if e.code in _TRANSIENT or e.code == 416:
            raise _Again(f"the server says {e.code} {e.reason}") from e
        allowed = "sign the URL, or fetch it with a command: 'pipe:curl -H ... URL'"
        remedy = allowed if e.code in (401, 403, 407) else "correct the URL, or put the file there"
        raise DataError(f"{w.url}: the server says {e.code} {e.reason}; {remedy}") from e
    except (OSError, http.client.HTTPException) as e:
        raise _Again(f"cannot be reached: {getattr(e, 'reason', e)}") from e
    except ValueError as e:
        raise DataError(f"{w.url} is no URL: {e}") from e
    with response:
        starts = at if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        expected = starts + int(length) if length and length.isdigit() else None
        etag = response.headers.get("ETag", "")
        mark = response.headers.get("Last-Modified", "") if etag[:1] != '"' else etag
        with _local(w):
            mark_path.write_text(mark)
        yield response, starts, expected


def _reason(error: Exception) -> str:
    """What is said of an error; the pipes of webdataset show their whole call."""
    status = re.search(r"exit (-?\d+) \(", str(error))
    return f"its command ended with exit {status[1]}" if status else str(error)


def _mark_path(part: Path) -> Path:
    return part.with_name(part.name + ".mark")


def _check(w: Wanted, part: Path, file: BinaryIO) -> None:
    """Raise _Again, and forget what was fetched, where it is not what it should be."""
    size = file.seek(0, os.SEEK_END)
    problem = ""
    if w.size is not None and size != w.size:
        problem = f"it has {size:,} bytes, the manifest says {w.size:,}"
    elif w.sha256 is not None and sha256_of(part) != w.sha256:
        problem = "its content is not what the manifest says (sha256); upload it again"
    elif w.is_tar and w.sha256 is None:
        try:
            members(part)
        except DataError as e:
            problem = str(e).replace(str(part), "what was fetched", 1)
    if problem:
        file.truncate(0)
        raise _Again(problem)


@contextlib.contextmanager
def _local(w: Wanted) -> Iterator[None]:
    """What the file system refuses is no fault of the network."""
    try:
        yield
    except OSError as e:
        is_full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space" if is_full else "make it writable"
        raise DataError(
            f"{w.url}: cannot write {w.path}: {e.strerror}; {remedy}, or name another folder with "
            "--data.cache"
        ) from e


class _Progress:
    """Files and bytes done, their rate and the time left."""

    def __init__(self, wanted: Sequence[Wanted]) -> None:
        self.status = StatusLine()
        self.folder = wanted[0].path.parent
        self.files, self.done, self.fetched = len(wanted), 0, 0
        sizes = [w.size for w in wanted]
        self.total = None if None in sizes else sum(s or 0 for s in sizes)
        self.start = time.monotonic()
        self._at: dict[str, int] = {}
        self._lock = threading.Lock()
        self.status.is_due(self.start)

    def file(self) -> None:
        """One more file is there."""
        self.done += 1

    def at(self, url: str, count: int) -> None:
        """``count`` bytes of a file are there."""
        with self._lock:
            self.fetched += count - self._at.get(url, 0)
            self._at[url] = count
            now = time.monotonic()
            if not self.status.is_due(now):
                return
            seconds = max(now - self.start, 1e-9)
            part = self.fetched / self.total if self.total else self.done / self.files
            left = duration(seconds * (1 / part - 1)) if 0 < part <= 1 else "?"
            total = f"/{self.total / _MIB:,.0f}" if self.total else ""
            self.status.update(
                f"fetching  {self.done:,}/{self.files:,} files  "
                f"{self.fetched / _MIB:,.0f}{total} MiB  "
                f"{self.fetched / _MIB / seconds:,.1f} MiB/s  left {left}"
            )

    def end(self) -> None:
        """All are there."""
        took = duration(time.monotonic() - self.start)
        files = "1 file" if self.files == 1 else f"{self.files:,} files"
        self.status.note(
            f"fetched {files}, {self.fetched / _MIB:,.1f} MiB in {took}, to {self.folder}"
        )
