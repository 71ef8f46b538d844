"""Launchers of the C++ kernels in csrc/cpu, one module per op with ``fwd`` and ``bwd``."""
