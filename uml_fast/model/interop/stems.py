"""The embeddings of images and texts in front of a network, read from other libraries' weights.

Legend: D width, P patches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from uml_fast.model.interop.names import Entry, Tensors, same, zeros


def patches(weight: str, bias: str | None, width: int, size: tuple[int, int, int]) -> list[Entry]:
    """A patch embedding kept as a convolution (D, channels, height, width).

    Rows of ours are in the order (row, column, channel). ``size``: height, width and channels.
    """
    height, across, channels = size

    def read(w: Tensor) -> Tensors:
        return (w.float().permute(0, 2, 3, 1).flatten(1),)

    def write(w: Tensor) -> Tensors:
        return (w.unflatten(1, (height, across, channels)).permute(0, 3, 1, 2),)

    entry = Entry(("stem.weight",), (weight,), read, write)
    return [entry, same("stem.bias", bias) if bias else zeros("stem.bias", width)]


def class_and_positions(class_token: str, positions: str) -> Entry:
    """A class token, and a table whose first row is added to it."""

    def read(token: Tensor, table: Tensor) -> Tensors:
        rows = table.float().flatten(0, -2)
        return token.float().flatten() + rows[0], rows[1:]

    def write(token_D: Tensor, position_PD: Tensor) -> Tensors:
        rows = torch.cat((torch.zeros_like(token_D)[None], position_PD))
        return token_D[None, None], rows[None]

    return Entry(("class_token", "position"), (class_token, positions), read, write)


def plain_positions(positions: str) -> Entry:
    """A table (1, P, D) without a row for a class token."""
    return Entry(
        ("position",), (positions,), lambda t: (t.float().flatten(0, -2),), lambda p: (p[None],)
    )


def words(table: str, positions: str, types: str, first: int = 0) -> list[Entry]:
    """Embeddings of BERT: ids, positions from row ``first`` on, and the first token type."""

    def read(position: Tensor, kinds: Tensor) -> Tensors:
        return (position[first:].float() + kinds[0].float(),)

    def write(position_PD: Tensor) -> Tensors:
        return position_PD, position_PD.new_zeros(1, position_PD.shape[1])

    return [same("stem.weight", table), Entry(("position",), (positions, types), read, write)]
