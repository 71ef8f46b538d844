"""What every test runs under: one thread, deterministic algorithms, poisoned empty memory."""

from __future__ import annotations

import os
import random
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

if torch.cuda.is_available():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
else:
    # Triton reads this when a kernel is decorated, so set it before the first import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read by pytest-timeout; in pyproject.toml it would be an error where the plugin is missing.
os.environ.setdefault("PYTEST_TIMEOUT", "300")

torch.set_num_threads(1)
# Deterministic mode also fills torch.empty with NaN, so a kernel that leaves a row unwritten shows.
torch.use_deterministic_algorithms(True, warn_only=True)

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
"""CPU kernels that a build may have."""

CAPABILITIES = {"gpu": "cuda", "native": "native", "triton": "triton"}
"""Marker of a test -> what it needs; UML_REQUIRE=cuda,native,triton makes skips failures."""

PACKAGES = ("soundfile", "tyro")
"""Imported by test files at their top; where one is missing (a bare GPU machine) those skip."""


def missing(capability: str) -> str | None:
    """Why a capability is not here, or None where it is."""
    if capability == "cuda":
        return None if torch.cuda.is_available() else "no CUDA device"
    if capability == "native":
        from uml_fast.runtime import native

        return None if native.available() else f"no native extension: {native.reason()}"
    try:
        import triton  # noqa: F401
    except ModuleNotFoundError:
        return "triton is not installed"
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "native: needs the native extension")
    config.addinivalue_line("markers", "triton: needs Triton")
    config.addinivalue_line("markers", "slow: more than about ten seconds")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a file that imports a package of ``PACKAGES`` which is not installed."""
    report = yield
    absent = [p for p in PACKAGES if f"No module named '{p}'" in str(report.longrepr)]
    if report.failed and absent:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {absent[0]} is not installed")
    return report


def pytest_runtest_setup(item: pytest.Item) -> None:
    required = os.environ.get("UML_REQUIRE", "").split(",")
    for marker, capability in CAPABILITIES.items():
        if item.get_closest_marker(marker) is None:
            continue
        reason = missing(capability)
        if reason is not None and capability in required:
            pytest.fail(f"UML_REQUIRE names {capability}, but: {reason}", pytrace=False)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """An empty folder for one run."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(params=[pytest.param(s, marks=pytest.mark.native) for s in INSTRUCTION_SETS])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of each instruction set this processor has."""
    from uml_fast.kernels.native.library import library

    cpu = library()
    default = cpu.instruction_set()
    try:
        cpu.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.use_instruction_set(default)


@pytest.fixture(params=["webdataset", "dali"])
def backend(request: pytest.FixtureRequest) -> str:
    """What decodes: each backend of ``uml_fast.data.decoding.decode``."""
    if request.param == "dali":
        pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
    return str(request.param)
