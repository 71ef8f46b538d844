"""The compiled extension ``uml_fast._native``, if it is there.

Without it the same code runs on the readable reference path; the log says so once, with the reason.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
from functools import lru_cache
from pathlib import Path
from types import ModuleType

_LOG = logging.getLogger("uml_fast")
_BINDINGS = Path(__file__).parents[2] / "csrc/bind"
"""There where the package runs from its source folder."""


def _load(name: str) -> tuple[ModuleType | None, str]:
    """The extension of that name, or None and why it is not there."""
    try:
        if importlib.util.find_spec(name) is None:
            return (
                None,
                f"{name} is not installed (the package was not built, or without this part)",
            )
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} does not load: {error}"


def _is_of_these_sources(found: ModuleType) -> bool:
    """Whether the extension has the functions that this source folder calls; True without one."""
    hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(_BINDINGS.glob("*.cpp"))]
    whole = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return not hashes or whole == getattr(found, "sources", None)


@lru_cache(maxsize=1)
def _native() -> tuple[ModuleType | None, str]:
    found, why = _load("uml_fast._native")
    if found is not None and not _is_of_these_sources(found):
        found, why = None, "uml_fast._native was built from other sources than those around it"
    if found is None:
        _LOG.warning(
            "the native core is off, the slower reference path runs: %s. "
            "Build it with 'pip install .' in the source folder (needs a C++20 compiler)",
            why,
        )
    return found, why


@lru_cache(maxsize=1)
def _native_cuda() -> tuple[ModuleType | None, str]:
    if _native()[0] is None:
        return None, _native()[1]
    return _load("uml_fast._native_cuda")


def module() -> ModuleType | None:
    """The extension, or None; the first call logs a warning where it is missing."""
    return _native()[0]


def available() -> bool:
    """Whether the extension is there."""
    return module() is not None


def reason() -> str:
    """Why the extension is not there; empty where it is."""
    return _native()[1]


def cuda_module() -> ModuleType | None:
    """The CUDA extension, or None. It may be there without a GPU; ask its ``device_count()``."""
    return _native_cuda()[0]


def cuda_reason() -> str:
    """Why the CUDA extension is not there; empty where it is."""
    return _native_cuda()[1]
