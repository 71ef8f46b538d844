"""Fused ops: a readable reference, native CPU kernels and one public function each."""

from uml_fast.kernels.add_layer_norm import add_layer_norm
from uml_fast.kernels.dropout import dropout
from uml_fast.kernels.feed_forward import feed_forward
from uml_fast.kernels.segment_attention import packed_segment_attention, segment_attention
from uml_fast.kernels.segment_mean import segment_mean

__all__ = [
    "add_layer_norm",
    "dropout",
    "feed_forward",
    "packed_segment_attention",
    "segment_attention",
    "segment_mean",
]
