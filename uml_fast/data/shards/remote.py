"""Shards that are elsewhere: names of them, and where on this machine a copy belongs.

What can be fetched is what the webdataset library opens: ``https://``, ``gs://``, ``hf://``, ...,
and ``pipe:`` with a command that prints a shard; besides ``s3://`` through the aws command line.
Each is fetched once, whole, into a folder of the cache, and read there like any other.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from uml_fast.data.shards.fetch import Wanted, fetch_all
from uml_fast.data.source import DataError
from uml_fast.runtime.files import cache_folder, replace_file

_REMOTE = re.compile(r"pipe:|(?!file:)[A-Za-z][A-Za-z0-9+.-]*://")


def is_remote(where: str | Path) -> bool:
    """Whether ``where`` has to be fetched: a URL or a pipe."""
    return isinstance(where, str) and _REMOTE.match(where) is not None


def is_prepared_url(where: str) -> bool:
    """Whether a URL names a folder that ``prepare`` wrote, not tar files."""
    return not where.startswith("pipe:") and not re.search(r"\.tar\b", urlsplit(where).path)


def is_list(where: str) -> bool:
    """Whether a string may stand for several names (``expand``)."""
    return any(mark in where for mark in ("{", "::"))


def expand(where: str) -> list[str]:
    """Every shard that a string names, as the webdataset library reads it.

    Brace ranges (``x-{000..012}.tar``), several of them with ``::`` between, ``${NAME}`` for the
    environment's ``WDS_NAME``.

    Raises:
        DataError: the environment lacks a variable.
    """
    from webdataset.shardlists import expand_urls

    try:
        return [*expand_urls(where)]
    except AssertionError as e:
        raise DataError(f"{where}: {e}; set it, or write the name out") from None


def fetch_shards(urls: Sequence[str], cache: Path | None) -> list[Path]:
    """Copies of tar files on this machine, in their order.

    Raises:
        DataError: one cannot be fetched; names it and says what to do.
    """
    places = [_place(url, cache) for url in urls]
    fetch_all([Wanted(url, place) for url, place in zip(urls, places, strict=True)])
    return places


@functools.cache
def fetch_manifest(url: str, name: str, cache: Path | None) -> Path:
    """The folder for a copy of prepared shards, with their manifest ``name`` in it.

    Another manifest at the same URL gets another folder, so that no copy is ever a mixture. It is
    asked for once in a process.

    Raises:
        DataError: it cannot be fetched.
    """
    base = (cache or cache_folder() / "remote") / _slug(urlsplit(url).path)
    draft = base.with_name(f"{base.name}-{_mark(url)}-{os.getpid()}.json")
    fetch_all([Wanted(_inside(url, name), draft, is_tar=False)])
    content = draft.read_bytes()
    draft.unlink()
    folder = base.with_name(f"{base.name}-{_mark(url + content.decode(errors='replace'))}")
    if not (folder / name).exists():
        folder.mkdir(exist_ok=True)
        replace_file(folder / name, content)
    return folder


def fetch_split(url: str, folder: Path, index: str, shards: Sequence[tuple[str, int, str]]) -> None:
    """Fetch a split of prepared shards: its index and the (file, bytes, sha256) of its shards.

    Raises:
        DataError: a file cannot be fetched, or the manifest names files outside of the folder.
    """
    outside = [file for file, _, _ in shards if Path(file).name != file]
    if outside:
        raise DataError(f"{url}: its manifest names {outside[0]!r}, which is no plain file name")
    fetch_all([Wanted(_inside(url, index), folder / index, is_tar=False)], is_quiet=True)
    fetch_all(
        [
            Wanted(_inside(url, file), folder / file, size, sha256)
            for file, size, sha256 in shards
        ]
    )  # fmt: skip


def _inside(url: str, file: str) -> str:
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path.rstrip('/')}/{file}").geturl()


def _place(url: str, cache: Path | None) -> Path:
    """Where the copy of a tar file is; its last name is kept, the rest of the URL is a hash."""
    root = cache or cache_folder() / "remote"
    if url.startswith("pipe:"):
        return root / "pipe" / f"{_slug(url)}-{_mark(url)}.tar"
    parts = urlsplit(url)
    folder, _, file = parts.path.rpartition("/")
    name = _slug(file)
    if name != file.removesuffix(".tar"):
        name = f"{name}-{_mark(file)}"
    return root / f"{_slug(folder)}-{_mark(parts._replace(path=folder).geturl())}" / f"{name}.tar"


def _slug(text: str) -> str:
    """The end of a name in letters that every file system takes."""
    stem = text.rstrip("/").rpartition("/")[2].removesuffix(".tar")
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[-60:] or "shards"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
