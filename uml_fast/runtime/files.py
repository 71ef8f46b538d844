"""Files that are whole or not there, and the folder of what can be made again."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Write the file whole or not at all; text is stored as UTF-8.

    Raises:
        OSError: it cannot be written; what was there before is untouched.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def advice(error: OSError, how: str = "with --out") -> str:
    """What to do where a file cannot be written, by the reason; ``how`` another folder is named."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"free some space, or name a folder on another disk {how}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"make it writable for you, or name another folder {how}"
    return f"name another folder {how}"


def sha256_of(path: Path) -> str:
    """Checksum of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/uml_fast``, or ``~/.cache/uml_fast``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "uml_fast"
