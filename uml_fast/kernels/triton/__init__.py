"""Triton kernels for CUDA devices, one module per op with ``fwd`` and ``bwd``."""

import os

# Products and sums fuse into one rounding, as in CUDA; unset, Triton 3.9 warns at every compile.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
