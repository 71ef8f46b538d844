"""The matrix product of Triton kernels, also right in the interpreter.

Triton's interpreter holds bf16 as its bits and multiplies those as integers; there operands go to
fp32 first, which is exact.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uml_fast.kernels.backend import is_interpreted

INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def dot(a, b, total):
    """total + a b, summed in fp32; fp32 operands are not rounded to tf32."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee")
