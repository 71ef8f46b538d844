"""The choice of kernels and the threads they run on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from uml_fast.kernels.backend import choose
from uml_fast.kernels.dropout import dropout
from uml_fast.kernels.native.library import _gomp_parallel, library

pytestmark = pytest.mark.native


def test_widest_instruction_set_is_used() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    name = library().instruction_set()
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        bf16 = "avx512_bf16" in flags
        tiles = bf16 and "amx_bf16" in flags and torch.cpu._init_amx()
        assert name == ("amx_bf16" if tiles else "avx512_bf16" if bf16 else "avx512")
    elif {"avx2", "fma"} <= flags:
        assert name == "avx2"
    else:
        assert name == "baseline"


def test_unknown_instruction_set_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for instruction set 'sse9'"):
        library().use_instruction_set("sse9")


def test_kernels_are_for_their_dtypes_alone() -> None:
    assert choose("op", "auto", torch.ones(1), torch.ones(1).bfloat16()) == "native"
    assert choose("op", "auto", torch.ones(1), torch.ones(1).double()) == "reference"
    assert choose("op", "reference", torch.ones(1)) == "reference"
    with pytest.raises(RuntimeError, match=r"op: no native kernel for \['torch.float64 on cpu'\]"):
        choose("op", "native", torch.ones(1).double())


@pytest.fixture
def own_pool() -> Iterator[None]:
    """Runs the test on the extension's own threads instead of PyTorch's."""
    library().use_openmp(0)
    yield
    library().use_openmp(_gomp_parallel())


def _sum_in_child(x: Tensor, queue: multiprocessing.Queue) -> None:
    queue.put(dropout(x, 0.5, torch.tensor([3]), 0, backend="native").sum().item())


def test_own_pool(own_pool: None, two_threads: None) -> None:
    x = torch.ones(4096, 64)
    outs = [dropout(x, 0.5, torch.tensor([3]), 0, backend="native") for _ in range(200)]
    assert all(torch.equal(o, outs[0]) for o in outs)
    torch.set_num_threads(1)
    assert torch.equal(dropout(x, 0.5, torch.tensor([3]), 0, backend="native"), outs[0])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_forked_child_gets_its_own_pool(own_pool: None, two_threads: None) -> None:
    """A child has none of its parent's threads: waiting for them would hang.

    The tensor is too small for PyTorch's own threads, which do hang after a fork.
    """
    x = torch.ones(256, 64)
    want = dropout(x, 0.5, torch.tensor([3]), 0, backend="native").sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(x, queue))
    child.start()
    assert queue.get(timeout=30) == want
    child.join(timeout=30)
    assert child.exitcode == 0


def test_wrong_openmp_address_is_never_guessed() -> None:
    """On Linux with PyTorch from a wheel its OpenMP is found; elsewhere the answer is 0."""
    maps = Path("/proc/self/maps")
    loaded = maps.exists() and "libgomp" in maps.read_text()
    assert (_gomp_parallel() != 0) or not loaded
