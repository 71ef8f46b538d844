"""The build: UML_CUDA asks for a compiler and nothing else; the C++ tests pass."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent


def tool(name: str) -> str:
    """Path of a build tool, looked for beside the interpreter first."""
    found = shutil.which(name, path=f"{TOOLS}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def configure(build: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Configure the source tree into ``build``, without a CUDA compiler to be found."""
    pybind11 = pytest.importorskip("pybind11")
    command = [
        tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options,
    ]  # fmt: skip
    hidden = os.environ | {"CUDACXX": "/nonexistent/nvcc"} | env
    return subprocess.run(command, capture_output=True, text=True, env=hidden)


def test_auto_without_a_compiler_builds_the_rest_and_says_so(tmp_path: Path) -> None:
    done = configure(tmp_path, UML_CUDA="")
    assert done.returncode == 0, done.stderr
    assert "building without the CUDA part (UML_CUDA=AUTO)" in done.stdout
    ninja = (tmp_path / "build.ninja").read_text("utf-8")
    assert "csrc/core" in ninja
    assert "_native_cuda" not in ninja


@pytest.mark.parametrize("by", ["option", "environment"])
def test_on_without_a_compiler_is_an_error_that_names_the_fix(tmp_path: Path, by: str) -> None:
    if by == "option":
        done = configure(tmp_path, "-DUML_CUDA=ON", UML_CUDA="OFF")
    else:
        done = configure(tmp_path, UML_CUDA="ON")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "no CUDA compiler was found" in message
    assert "CUDACXX" in message
    assert "UML_CUDA=OFF" in message


def test_unknown_value_is_an_error(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DUML_CUDA=maybe")
    assert done.returncode != 0
    assert "must be AUTO, ON or OFF" in " ".join(done.stderr.split())


@pytest.mark.parametrize(("value", "is_built"), [("OFF", False), ("ON", True)])
def test_compiler_alone_decides_over_the_cuda_part(
    tmp_path: Path, value: str, is_built: bool
) -> None:
    nvcc = tool("nvcc")
    options = [f"-DUML_CUDA={value}", "-DCMAKE_CUDA_ARCHITECTURES=90"]
    done = configure(tmp_path, *options, CUDACXX=nvcc, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    ninja = (tmp_path / "build.ninja").read_text("utf-8")
    assert ("_native_cuda" in ninja) == is_built
    if is_built:
        assert "compute_90" in ninja
        assert "compute_80" not in ninja


def test_cpp_tests_pass_without_warnings(tmp_path: Path) -> None:
    done = configure(tmp_path, "-DUML_CUDA=OFF", "-DUML_TESTS=ON", "-DUML_WERROR=ON")
    assert done.returncode == 0, done.stderr
    targets = [path.stem for path in (ROOT / "csrc" / "tests").glob("test_*.cpp")]
    command = [tool("cmake"), "--build", str(tmp_path), "--target", *targets]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    command = [tool("ctest"), "--test-dir", str(tmp_path), "--output-on-failure"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
