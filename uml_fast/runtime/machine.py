"""What a number was measured on: machine, versions and commit, for run.json and summary.json."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import uml_fast

_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def machine_info() -> dict[str, Any]:
    """Keys ``machine`` (what the numbers depend on), ``versions``, ``commit`` and ``dirty``.

    ``commit`` and ``dirty`` (uncommitted changes) are those of the git repository uml_fast is
    imported from, and None where it is installed or git cannot tell.
    """
    commit, dirty = _commit(Path(__file__).resolve())
    return {"machine": _machine(), "versions": _versions(), "commit": commit, "dirty": dirty}


def _machine() -> dict[str, Any]:
    cpu = {}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        cpu = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = cpu.get("flags", cpu.get("Features", "")).split()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [f for f in _FEATURES if f in flags],
        "cores": usable,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "os": platform.platform(),
        "gpu": None,
        "gpu_count": 0,
        "driver": None,
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
        machine["gpu_count"] = torch.cuda.device_count()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        machine["driver"] = (_output(query) or "").split("\n")[0] or None
    return machine


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str | None]:
    def installed(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "uml_fast": uml_fast.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "numpy": installed("numpy"),
        "scikit-learn": installed("scikit-learn"),
    }


def _commit(file: Path) -> tuple[str | None, bool | None]:
    git = ["git", "-C", str(file.parent)]
    # an environment inside someone else's repository must not report that repository's commit
    if _output([*git, "ls-files", "--error-unmatch", file.name]) is None:
        return None, None
    commit = _output([*git, "rev-parse", "HEAD"])
    status = _output([*git, "status", "--porcelain", "--untracked-files=no"])
    return commit, None if status is None else bool(status)


def _output(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip()
