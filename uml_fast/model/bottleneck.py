"""The shared autoencoder of the linear-Gaussian experiment (paper appendix E.14).

Rows never see each other: the network maps each token by itself, so it takes any pack.

Legend: T rows and S segment slots of a pack, D width, H hidden width, E latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from uml_fast.config import BackboneConfig, require
from uml_fast.kernels.segment_mean import segment_mean
from uml_fast.modalities.base import Linear
from uml_fast.model.backbone import Backbone
from uml_fast.packing.pack import PackedBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class BottleneckConfig(BackboneConfig):
    """A shared encoder to a narrow latent and a shared decoder back, two linear maps each."""

    width: int = 128
    """Features per token at both ends (D)."""
    hidden: int = 128
    """Width between the two linear maps of the encoder and of the decoder (H)."""
    latent: int = 10
    """Width of the latent (E), the embedding of a sample."""

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "latent"):
            value = getattr(self, name)
            require(value >= 1, f"backbone.{name} is {value}; it must be >= 1")

    def given_width(self, pooled: bool) -> int:
        return self.latent if pooled else self.width

    def build(self) -> Bottleneck:
        """The backbone with freshly drawn weights."""
        return Bottleneck(self)


class Bottleneck(Backbone):
    """``z = W2 relu(W1 x)`` and ``hidden = W4 relu(W3 z)``, with biases, for all modalities."""

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__()
        self.output_width = config.width
        self.embedding_width = config.latent
        self.encoder = nn.Sequential(
            Linear(config.width, config.hidden), nn.ReLU(), Linear(config.hidden, config.latent)
        )
        self.decoder = nn.Sequential(
            Linear(config.latent, config.hidden), nn.ReLU(), Linear(config.hidden, config.width)
        )

    def forward(
        self, tokens_TD: Tensor, batch: PackedBatch, rng_key: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Encode and decode every row.

        Args:
            tokens_TD: output of the stems; products are taken in its dtype.
            batch: the pack, whose segments are pooled; rows do not interact.
            rng_key: key of dropout masks; not read, since there is no dropout.

        Returns:
            hidden_TD for the modalities' decoders and embedding_SE, the mean latent of each
            segment, in the dtype of the tokens.
        """
        latent_TE = self.encoder(tokens_TD)
        return self.decoder(latent_TE), segment_mean(latent_TE, batch.offsets_S1)
