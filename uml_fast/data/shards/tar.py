"""Tar files as shards: where each member lies, headers that never vary, DALI's text index."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from uml_fast.data.source import DataError

BLOCK = tarfile.BLOCKSIZE
END = b"\0" * (2 * BLOCK)
"""What a whole tar file ends with, at least."""
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PK": "zip",
}  # fmt: skip
"""First bytes -> program that compressed a file."""


class Member(NamedTuple):
    """A regular file in a tar file."""

    name: str
    offset: int
    """First byte of its content in the tar file."""
    size: int
    """Bytes of its content."""


def members(path: Path) -> list[Member]:
    """Every regular file of an uncompressed tar file, in order.

    Raises:
        DataError: the file is missing, is no tar file, is broken or truncated; the message names it
            and the last member that is whole.
    """
    found: list[Member] = []

    def broken(what: str) -> DataError:
        last = f"the last whole member is {found[-1].name}" if found else "no member is whole"
        return DataError(f"{path}: {what}; {last}. Copy or make the file again")

    try:
        total = path.stat().st_size
        _refuse_compressed(path)
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            while (info := tar.next()) is not None:
                start, end = info.offset_data, info.offset_data + info.size
                # tarfile follows sizes it cannot trust: those below zero would never end
                if info.size < 0 or (found and start <= found[-1].offset):
                    raise broken(f"member {info.name!r} has size {info.size}")
                if info.issparse():
                    raise DataError(
                        f"{path}: member {info.name!r} is sparse; make the file without --sparse"
                    )
                if info.isreg() and end > total:
                    raise broken(f"truncated in member {info.name!r}")
                if info.isreg():
                    found.append(Member(info.name, start, info.size))
            # tarfile takes a header it cannot read behind the first member for the end
            file.seek(tar.offset)
            end_mark = file.read(BLOCK)
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; copy it there or leave it out") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, not a tar file; give its tar files") from None
    except OSError as e:
        raise DataError(
            f"{path} cannot be read: {e.strerror or e}; make it readable or leave it out"
        ) from e
    except (tarfile.TarError, ValueError, EOFError, OverflowError) as e:
        raise broken(f"broken or truncated tar file ({e})") from e
    if end_mark != END[:BLOCK]:
        raise broken(f"truncated, or broken at byte {tar.offset}")
    return found


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, program in _COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is compressed ({program}); samples are read from any place of a plain tar "
                "file: unpack it"
            )


def header(name: str, size: int) -> bytes:
    """A header that depends on name and size alone: owner 0, time 0, mode 644.

    Raises:
        ValueError: the name does not fit into a ustar header.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def padded(content: bytes) -> bytes:
    """``content`` filled up with zeros to whole blocks."""
    return content + bytes(-len(content) % BLOCK)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member: a WebDataset key ends at the first dot of the file name."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def dali_index(samples: Iterable[Iterable[Member]]) -> str:
    """The text that DALI's ``wds2idx`` writes, version 1.2.

    A line with the number of samples, then one a sample: for each member extension, offset, size
    and name. Names must be free of spaces.
    """
    lines = [
        " ".join(f"{split_name(m.name)[1]} {m.offset} {m.size} {m.name}" for m in sample)
        for sample in samples
    ]
    return "\n".join([f"v1.2 {len(lines)}", *lines, ""])
