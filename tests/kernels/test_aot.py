"""Every Triton kernel compiles for every chip without spills, and the committed rows say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from uml_fast.kernels import SPECS
from uml_fast.kernels.aot import PROCESSORS, problems

RESULTS = Path(__file__).parents[2] / "bench/results"


@pytest.mark.triton
@pytest.mark.parametrize("arch", PROCESSORS)
def test_kernels_compile_without_spills(arch: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "uml_fast.kernels.aot", "--arch", str(arch)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {r["op"] for r in rows} == {s.name for s in SPECS}
    committed = json.loads((RESULTS / f"aot_sm{arch}.json").read_text())
    keys = ("op", "shape", "dtype", "kernel", "constants")
    assert [[r[k] for k in keys] for r in committed] == [[r[k] for k in keys] for r in rows], (
        f"launches changed: python -m uml_fast.kernels.aot --arch {arch} "
        f"> bench/results/aot_sm{arch}.json"
    )


ROW = {"arch": 90, "stack_bytes": 0, "local_bytes": 0, "shared_bytes": 1024}


def test_a_spill_is_a_problem() -> None:
    assert not problems(ROW)
    assert problems(ROW | {"stack_bytes": 16}) == ["16 stack_bytes (spills)"]
    assert problems(ROW | {"local_bytes": 8}) == ["8 local_bytes (spills)"]


def test_shared_memory_beyond_the_chip_is_a_problem() -> None:
    assert not problems(ROW | {"shared_bytes": 227 * 1024})
    assert problems(ROW | {"shared_bytes": 227 * 1024 + 1})
    assert problems(ROW | {"arch": 80, "shared_bytes": 200 * 1024})
