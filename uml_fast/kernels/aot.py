"""Compile every Triton kernel ahead of time, without a GPU, and say what it needs of the chip.

    python -m uml_fast.kernels.aot --arch 90          prints JSON rows

The ops of all SPECs run forward and backward on the CPU with their real launch configurations, but
each launch compiles its kernel for the chip instead. A process of its own: kernels imported under
TRITON_INTERPRET=1 cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from uml_fast.kernels import SPECS
from uml_fast.kernels.backend import is_interpreted
from uml_fast.kernels.spec import draw
from uml_fast.kernels.triton.launch import launching

PROCESSORS = {80: 108, 90: 132, 100: 148}
"""Streaming multiprocessors of A100, H100/H200 and B200."""
SHARED_LIMIT_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Shared memory a block may have (CUDA programming guide, compute capabilities)."""


class _NoDevice:
    """What Triton asks of a driver to compile without a device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, stack and local bytes of the kernel in a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "stack_bytes": found["STACK"], "local_bytes": found["LOCAL"]}


def compile_all(arch: int, ops: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One row per compiled kernel: op, shape, constants, registers, stack, local and shared bytes.

    Raises:
        RuntimeError: under TRITON_INTERPRET=1.
    """
    if is_interpreted():
        raise RuntimeError("kernels of the interpreter cannot be compiled; unset TRITON_INTERPRET")
    from triton.runtime import driver

    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    where: dict[str, str] = {}

    def compile_kernel(
        kernel: Any, _: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        compiled = kernel.warmup(*args, grid=(1,), **constants)
        if compiled.hash in seen:
            return
        seen.add(compiled.hash)
        rows.append(
            where
            | {"kernel": kernel.fn.__name__, "arch": arch, "constants": constants}
            | _resources(compiled.asm["cubin"])
            | {"shared_bytes": compiled.metadata.shared}
        )

    driver.set_active(_NoDevice(arch))
    with launching(compile_kernel, arch, PROCESSORS[arch]):
        for spec in SPECS:
            if ops and spec.name not in ops:
                continue
            for shape_name, shape in spec.aot.items():
                for dtype in spec.dtypes:
                    where = {
                        "op": spec.name,
                        "shape": shape_name,
                        "dtype": str(dtype).removeprefix("torch."),
                    }
                    out = spec.function(**draw(spec, shape, dtype), backend="triton")
                    outputs = [
                        o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad
                    ]
                    torch.autograd.backward(outputs, [torch.zeros_like(o) for o in outputs])
    return rows


def problems(row: dict[str, Any]) -> list[str]:
    """What is wrong with a compiled kernel: spilled registers, too much shared memory."""
    found = [f"{row[k]} {k} (spills)" for k in ("stack_bytes", "local_bytes") if row[k]]
    limit = SHARED_LIMIT_BYTES[row["arch"]]
    if row["shared_bytes"] > limit:
        found.append(f"{row['shared_bytes']} shared_bytes, the limit is {limit}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Print the rows of one chip; returns 1 where a kernel spills or does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, choices=sorted(PROCESSORS), required=True)
    parser.add_argument("--ops", nargs="*", default=[], help="names of ops; default: all")
    options = parser.parse_args(argv)
    rows = compile_all(options.arch, options.ops)
    print("[" + ",\n".join(json.dumps(row) for row in rows) + "]")
    bad = [(row, found) for row in rows if (found := problems(row))]
    for row, found in bad:
        name = f"{row['op']} {row['shape']} {row['dtype']} {row['kernel']} sm_{row['arch']}"
        print(f"{name}: {'; '.join(found)}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
