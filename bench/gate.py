"""No speed-up is printed on a red test: the kernels' tests run before anything is timed.

python -m bench.gate               runs them; exit status 1 if one fails
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bench.harness import ROOT

TESTS = "tests/kernels"
ON_A_GPU = ("-m", "triton and not slow", "--ignore=tests/kernels/test_aot.py")
"""Where a GPU is timed, the tests of its kernels; compiling them for other chips needs none."""
PARTS = min(8, len(os.sched_getaffinity(0)))
_PART = "UML_GATE_PART"


class RedTests(Exception):
    """A test of the kernels failed, so their speed means nothing."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave a process its part of the tests, where this module is its plugin."""
    items[:] = items[int(os.environ[_PART]) :: PARTS]


def _run(part: int, tests: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if torch.cuda.is_available() and tests == TESTS:
        command += ON_A_GPU
    return subprocess.run(
        [*command, "-p", "bench.gate", tests],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, _PART: str(part)},
    )  # fmt: skip


def check(tests: str = TESTS) -> None:
    """Run the tests, dealt out to a few processes: a bare GPU machine has no pytest-xdist.

    Raises:
        RedTests: one fails, or there is none; with the end of their output.
    """
    with ThreadPoolExecutor(PARTS) as pool:
        for part, done in enumerate(pool.map(_run, range(PARTS), [tests] * PARTS)):
            is_empty = done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED
            if done.returncode != 0 and not (is_empty and part):
                tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
                raise RedTests(f"{tests} is red; no speed is measured:\n{tail}")


def main() -> int:
    """Run the gate; returns the exit status."""
    try:
        check()
    except RedTests as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{TESTS} is green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
