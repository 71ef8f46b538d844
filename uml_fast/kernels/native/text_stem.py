"""CPU kernels of text_stem (csrc/cpu/text_stem.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.kernels.native import index_sum
from uml_fast.kernels.native.library import CODES, library


def fwd(
    ids: Tensor, weight: Tensor, position: Tensor | None, position_index: Tensor | None,
    out: Tensor,
) -> None:  # fmt: skip
    """Write the tokens to ``out``; ids are inside the vocabulary."""
    table = weight if position is None else position
    library().text_stem_fwd(
        torch.get_num_threads(), len(ids), weight.shape[1], CODES[weight.dtype],
        CODES[table.dtype], CODES[out.dtype], ids.data_ptr(), weight.data_ptr(),
        0 if position is None else position.data_ptr(),
        0 if position_index is None else position_index.data_ptr(), len(table), out.data_ptr(),
    )  # fmt: skip


def bwd(grad_out: Tensor, ids: Tensor, size: int) -> Tensor:
    """Gradient of the embedding table fp32 (size, D)."""
    return index_sum.fwd(grad_out, ids, size)
