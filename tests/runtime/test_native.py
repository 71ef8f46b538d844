"""Finding the extension: there it is used, missing it is said once with the reason."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest

from uml_fast.runtime import native


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """Forget what was found, before and after the test."""
    for found in (native._native, native._native_cuda):
        found.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for found in (native._native, native._native_cuda):
        found.cache_clear()


@pytest.mark.native
def test_extension_is_found() -> None:
    found = native.module()
    assert found is not None
    assert native.available()
    assert native.reason() == ""
    assert {"Loader", "Planner", "cpu"} <= set(dir(found))


def test_missing_extension_is_said_once_with_reason_and_remedy(fresh, caplog) -> None:
    fresh.setattr(native.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger="uml_fast"):
        assert native.module() is None
        assert not native.available()
        assert native.cuda_module() is None
    assert "uml_fast._native is not installed" in native.reason()
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 1
    assert native.reason() in messages[0]
    assert "pip install ." in messages[0]


def test_broken_extension_is_a_reason_not_a_crash(fresh) -> None:
    def broken(name: str):
        raise ImportError("undefined symbol: x")

    fresh.setattr(native.importlib, "import_module", broken)
    fresh.setattr(native.importlib.util, "find_spec", lambda name: object())
    assert native.module() is None
    assert "undefined symbol: x" in native.reason()


@pytest.mark.native
def test_extension_of_other_sources_is_not_used(fresh, tmp_path) -> None:
    (tmp_path / "module.cpp").write_text("// another version")
    fresh.setattr(native, "_BINDINGS", tmp_path)
    assert native.module() is None
    assert "built from other sources" in native.reason()
    fresh.setattr(native, "_BINDINGS", tmp_path / "absent")  # as installed from a wheel
    native._native.cache_clear()
    assert native.module() is not None


def test_cuda_part_imports_without_a_driver() -> None:
    cuda = native.cuda_module()
    if cuda is None:
        pytest.skip(native.cuda_reason())
    code = (
        "from uml_fast.runtime import native\n"
        "cuda = native.cuda_module()\n"
        "count = cuda.device_count()\n"
        "try:\n    cuda.CudaDevice(count)\n"
        "except RuntimeError as error:\n    print('refused', str(error)[:5])\n"
    )
    env = {"CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout == "refused CUDA:\n", done.stderr
