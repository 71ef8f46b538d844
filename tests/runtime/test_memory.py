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


def test_limits_of_control_groups_count_those_around_too(tmp_path):
    from uml_fast.runtime import memory

    member, job = tmp_path / "cgroup", tmp_path / "fs" / "job"
    (job / "step").mkdir(parents=True)
    member.write_text("0::/job/step\n")
    (job / "step" / "memory.max").write_text("max\n")
    (job / "memory.max").write_text("4096\n")
    assert memory._group_limits(member, tmp_path / "fs") == [4096]
    member.write_text("0::/\n")  # as a container sees its own
    (tmp_path / "fs" / "memory.max").write_text("8192\n")
    assert memory._group_limits(member, tmp_path / "fs") == [8192]
    member.write_text("7:memory:/job\n")  # version 1
    assert memory._group_limits(member, tmp_path / "fs") == []


def test_a_limit_below_the_machines_memory_is_what_ranks_share(monkeypatch):
    import torch

    from uml_fast.runtime import memory

    monkeypatch.setattr(memory, "_group_limits", lambda *_: [1 << 30])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory.memory_bytes(torch.device("cpu")) == 1 << 29
