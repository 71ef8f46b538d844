"""Fused ops: a readable reference, CPU and CUDA kernels, and one public function each."""

from importlib import import_module

from uml_fast.kernels.add_layer_norm import add_layer_norm
from uml_fast.kernels.add_rms_norm import add_rms_norm
from uml_fast.kernels.dropout import dropout
from uml_fast.kernels.feature_stem import feature_stem
from uml_fast.kernels.feed_forward import feed_forward
from uml_fast.kernels.image_stem import image_stem
from uml_fast.kernels.linear_cross_entropy import linear_cross_entropy
from uml_fast.kernels.log_mel import log_mel
from uml_fast.kernels.next_embedding_loss import next_embedding_loss
from uml_fast.kernels.segment_attention import packed_segment_attention, segment_attention
from uml_fast.kernels.segment_mean import segment_mean
from uml_fast.kernels.text_stem import text_stem

OPS = (
    "add_layer_norm",
    "add_rms_norm",
    "dropout",
    "feature_stem",
    "feed_forward",
    "image_stem",
    "linear_cross_entropy",
    "log_mel",
    "next_embedding_loss",
    "segment_attention",
    "segment_mean",
    "text_stem",
)
"""Modules of the ops, each with a ``SPEC``."""

SPECS = tuple(import_module(f"uml_fast.kernels.{op}").SPEC for op in OPS)

__all__ = [
    "OPS",
    "SPECS",
    "add_layer_norm",
    "add_rms_norm",
    "dropout",
    "feature_stem",
    "feed_forward",
    "image_stem",
    "linear_cross_entropy",
    "log_mel",
    "next_embedding_loss",
    "packed_segment_attention",
    "segment_attention",
    "segment_mean",
    "text_stem",
]
