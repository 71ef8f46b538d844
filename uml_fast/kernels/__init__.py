"""Fused ops: a readable reference, native CPU kernels and one public function each (docs/numerics.md)."""

from uml_fast.kernels.add_layer_norm import add_layer_norm
from uml_fast.kernels.dropout import dropout
from uml_fast.kernels.feed_forward import feed_forward
from uml_fast.kernels.segment_attention import segment_attention
from uml_fast.kernels.segment_mean import segment_mean

__all__ = ["add_layer_norm", "dropout", "feed_forward", "segment_attention", "segment_mean"]
