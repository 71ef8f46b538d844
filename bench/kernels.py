"""Speed of every op against the strongest stock PyTorch, on the shapes its SPEC names.

    python -m pytest bench/kernels.py              writes bench/results/kernels_<machine>.json
    python -m pytest bench/kernels.py -k norm      those of some ops alone; the others' rows stay

The tests of the kernels run first; if one is red, nothing is timed. Modes: forward without
gradients, backward alone, and both. On the CPU, pytest-benchmark reports rounds taken in turns; on
a GPU each round is timed by events behind a write that empties the L2 cache, replayed from a CUDA
graph where the provider can be captured, so that no provider pays for its launches.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines, cuda_timing, gate, harness
from uml_fast.kernels import SPECS
from uml_fast.kernels.spec import KernelSpec, Shape, draw

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
MODES = ("fwd", "bwd", "full")
CPU_LIMIT_FLOPS = 1.3e10
CPU_LIMIT_BYTES = 6e8
"""Shapes above either, forward, are timed on a GPU alone."""
SPEC_OF = {spec.name: spec for spec in SPECS}
CLOCK = harness.RecordedClock()
COLLECTED: list[dict[str, Any]] = []
"""Rows of this session."""


@dataclass(frozen=True, slots=True)
class Case:
    """One op at one shape."""

    op: str
    shape_name: str
    dtype: torch.dtype
    mode: str

    @property
    def spec(self) -> KernelSpec:
        """The op's declaration."""
        return SPEC_OF[self.op]

    @property
    def shape(self) -> Shape:
        """Sizes and options."""
        return self.spec.benches[self.shape_name]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{self.shape_name}-{dtype}-{self.mode}"


def cases() -> list[Case]:
    """Every op, shape, dtype and mode that this machine times."""
    out = []
    for spec in sorted(
        SPECS, key=lambda s: s.name != "segment_attention"
    ):  # first what matters most
        for name, shape in spec.benches.items():
            too_large = (
                spec.flops(shape)[0] > CPU_LIMIT_FLOPS or spec.bytes(shape, 2)[0] > CPU_LIMIT_BYTES
            )
            if too_large and not CUDA:
                continue
            modes = MODES if spec.gradients else MODES[:1]
            out += [Case(spec.name, name, torch.bfloat16, mode) for mode in modes]
            if not CUDA:
                out.append(Case(spec.name, name, torch.float32, modes[-1]))
    return out


def timed_call(function: Callable[..., Any], case: Case) -> Callable[[], object]:
    """What one round of a provider does, on inputs of its own."""
    inputs = draw(case.spec, case.shape, case.dtype, DEVICE)
    wanted = [inputs[name] for name in case.spec.gradients]

    def forward() -> list[Tensor]:
        out = function(**inputs)
        return list(out) if isinstance(out, tuple) else [out]

    def forward_only() -> object:
        with torch.no_grad():
            return function(**inputs)

    if case.mode == "fwd":
        return forward_only
    outputs = forward()
    grads = [torch.randn_like(o) for o in outputs]
    if case.mode == "bwd":
        return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), wanted, grads)


@functools.lru_cache(maxsize=1)
def functions_of(op: str, shape_name: str, dtype: torch.dtype) -> dict[str, Callable[..., Any]]:
    """Every provider of an op at a shape; its modes follow each other and share what compiles."""
    torch._dynamo.reset()
    spec = SPEC_OF[op]
    inputs = draw(spec, spec.benches[shape_name], dtype, DEVICE)
    reference = functools.partial(spec.function, backend="reference")
    return {"uml_fast": spec.function, **baselines.providers(op, reference, inputs)}


def measure_case(case: Case) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of each round of each provider, and what else its row says."""
    functions = dict(functions_of(case.op, case.shape_name, case.dtype))
    if not CUDA and (case.mode, case.dtype) != ("full", torch.bfloat16):
        functions.pop("compile", None)  # half a minute each
    calls = {name: timed_call(function, case) for name, function in functions.items()}
    if not CUDA:
        return harness.measure_for(calls, seconds=0.5), {name: {} for name in calls}
    peaks = {name: round(cuda_timing.peak_mib(call), 1) for name, call in calls.items()}
    seconds, from_graph = cuda_timing.measure_cuda(calls)
    return seconds, {n: {"cuda_graph": from_graph[n], "peak_mib": peaks[n]} for n in calls}


def rows_of(case: Case) -> list[tuple[list[float], dict[str, Any]]]:
    """Rounds and row of each provider."""
    load_before = round(os.getloadavg()[0], 2)
    seconds, more = measure_case(case)
    forward_backward = [
        dict(zip(("fwd", "bwd"), pair, strict=True))
        for pair in (case.spec.flops(case.shape), case.spec.bytes(case.shape, case.dtype.itemsize))
    ]
    flops, size = (
        sum(p.values()) if case.mode == "full" else p[case.mode] for p in forward_backward
    )
    ours = harness.quantiles(seconds["uml_fast"])["p50_ms"]
    out = []
    for provider, times in seconds.items():
        spread = harness.quantiles(times)
        row = {
            "op": case.op,
            "shape_name": case.shape_name,
            "shape": {
                k: str(v) if isinstance(v, torch.dtype) else v for k, v in case.shape.items()
            },
            "dtype": str(case.dtype).removeprefix("torch."),
            "mode": case.mode,
            "provider": provider,
            **spread,
            "times_ours": round(spread["p50_ms"] / ours, 3),
            "tflops": round(flops / spread["p50_ms"] / 1e9, 3),
            "gb_per_s": round(size / spread["p50_ms"] / 1e6, 2),
            "rounds": len(times),
            "threads": torch.get_num_threads(),
            "load_before": load_before,
        }
        if CUDA:
            row["roof_pct"] = round(cuda_timing.roof_share(flops, size, spread["p50_ms"]), 1)
        out.append((times, row | more[provider]))
    return out


@pytest.fixture(scope="session")
def green() -> None:
    """The kernels' tests pass."""
    try:
        gate.check()
    except gate.RedTests as error:
        pytest.exit(str(error), returncode=1)


@functools.lru_cache(maxsize=1)
def measured(case: Case) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Rounds and row of each provider; the tests of a case follow each other.

    The rows replace those of the same case in the machine's file at once, so that a session that is
    stopped keeps what it measured.
    """
    found = rows_of(case)
    COLLECTED.extend(row for _, row in found)
    harness.merge_rows(
        harness.RESULTS / f"kernels_{harness.machine_name()}.json",
        COLLECTED,
        ("op", "shape_name", "dtype", "mode"),
    )
    return {row["provider"]: (times, row) for times, row in found}


PARAMETERS = [
    pytest.param(case, provider, id=f"{case}-{provider}")
    for case in cases()
    for provider in ("uml_fast", *baselines.names(case.spec.name, CUDA))
]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(("case", "provider"), PARAMETERS)
def test_kernel(benchmark: Any, green: None, case: Case, provider: str) -> None:
    found = measured(case)
    if provider not in found:
        pytest.skip(f"{provider} cannot do this shape")
    times, row = found[provider]
    CLOCK.load(times)
    benchmark.group = str(case)
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=len(times))
