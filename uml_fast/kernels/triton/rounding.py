"""Rounding of results to the working dtype, also right in the interpreter.

Triton's interpreter cuts off the low half of fp32 where a GPU rounds to nearest even, which doubles
the error of bf16 results; there the rounding is added first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from uml_fast.kernels.triton.dot import INTERPRETED


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x as ``dtype``, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, even, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rounded(ptr, x, mask):
    """Store fp32 x in the dtype of ``ptr``."""
    tl.store(ptr, round_to(x, ptr.dtype.element_ty), mask=mask)
