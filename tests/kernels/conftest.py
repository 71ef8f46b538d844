"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from uml_fast.kernels.native.library import library

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


@pytest.fixture(params=[pytest.param(s, marks=pytest.mark.native) for s in INSTRUCTION_SETS])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with the kernels of each instruction set this processor has."""
    cpu = library()
    default = cpu.instruction_set()
    try:
        cpu.use_instruction_set(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    cpu.use_instruction_set(default)


@pytest.fixture
def rng_key() -> Tensor:
    """The key of a step; its high half is not zero."""
    return torch.tensor([0x1234_5678_9ABC_DEF0])


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Runs the test with two threads, also where there is one core."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
