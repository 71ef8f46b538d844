"""Other libraries of models, imported where they are used."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_OPS = ("nms", "qnms")
"""Ops that torchvision's Python part expects its compiled part to have defined."""
_DECLARED: list[torch.library.Library] = []
"""A declaration lasts as long as its library object."""


@cache
def import_timm() -> ModuleType:
    """timm, also where the compiled part of torchvision belongs to another build of torch.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    _declare_ops()
    return importlib.import_module("timm")


@cache
def import_transformers() -> ModuleType:
    """transformers, as ``import_timm``: it imports torchvision where that is installed.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    _declare_ops()
    return importlib.import_module("transformers")


@cache
def _declare_ops() -> None:
    """Declare torchvision's ops without an implementation, where its compiled part cannot load.

    Its wheel on PyPI is built for CUDA on Linux: beside a CPU build of torch its ops do not load,
    and its import fails ("operator torchvision::nms does not exist"). No model needs these ops.
    """
    if lacks_ops():
        library = torch.library.Library("torchvision", "DEF")
        for op in _OPS:
            library.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)


def lacks_ops() -> bool:
    """Whether torchvision's ops do not load here, so that a plain ``import timm`` fails."""
    if torch.version.cuda is not None:
        return False
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    version = (Path(spec.origin).parent / "version.py").read_text("utf-8")
    return "+cu" in version
