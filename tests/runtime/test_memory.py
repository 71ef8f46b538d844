"""Freed memory stays in the process."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

FAULTS = """
import resource, torch
from uml_fast.runtime.memory import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
def step():
    held = [torch.ones(10 << 20) for _ in range(3)]
    while held:
        held.pop()
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    code = FAULTS.format(keep=keep)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)


def test_a_repeated_step_faults_few_of_its_30_000_pages_again():
    assert faults(keep=True) < 5_000 < faults(keep=False)


def test_thresholds_of_the_environment_are_left(monkeypatch):
    from uml_fast.runtime.memory import keep_freed_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
