"""Triton kernels of add_rms_norm: those of add_layer_norm without a bias."""

from uml_fast.kernels.triton.add_layer_norm import bwd, fwd

__all__ = ["bwd", "fwd"]
