"""Files that are whole or not there: written beside their place, then moved to it."""

from __future__ import annotations

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
