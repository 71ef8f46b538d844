"""The interface of a network over packs: the shared one, or a modality's own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from uml_fast.packing.pack import PackedBatch


class Backbone(nn.Module):
    """Maps the tokens of a pack to hidden rows and pools them; subclasses set both widths."""

    output_width: int
    """Features of a hidden row, which decoders read."""
    embedding_width: int
    """Features of an embedding, which heads and probes read."""

    def units(self) -> Sequence[nn.Module]:
        """Parts that every pack calls, in turn, each with weights of its own: FSDP's units."""
        return ()

    def forward(
        self, tokens_TD: Tensor, batch: PackedBatch, rng_key: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden rows (T, output_width), and one embedding (S, embedding_width) per segment slot.

        Embeddings are zero for empty segments. ``rng_key`` int64 (1,) draws the dropout masks of a
        training step; None: no dropout.
        """
        raise NotImplementedError
