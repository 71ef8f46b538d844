"""No speed-up is printed on a red test: the kernels' tests run before anything is timed.

python -m bench.gate               runs them; exit status 1 if one fails
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

from bench.harness import ROOT

TESTS = "tests/kernels"


class RedTests(Exception):
    """A test of the kernels failed, so their speed means nothing."""


def check(tests: str = TESTS) -> None:
    """Run the tests in a process of their own.

    Raises:
        RedTests: one fails, or none ran; with the end of their output.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "auto", "--maxprocesses", "8", "--dist", "worksteal"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
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
