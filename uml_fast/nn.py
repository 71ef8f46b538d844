"""The parts of uml_fast as modules for your own PyTorch loop: packs without padding, and on them
stems, attention, a transformer and the shared head.

A ragged batch is a list of tensors (rows, elements) put one behind the other; nothing is padded,
and one call encodes the samples of all modalities::

    stems = torch.nn.ModuleDict({
        "audio": nn.Stem(nn.FeaturesConfig(name="audio", size=40), width=64),
        "text": nn.Stem(nn.TextConfig(name="text", vocabulary=256), width=64),
    })
    config = nn.TransformerConfig(width=64, layers=2, heads=4, feed_forward=128)
    encoder = nn.TransformerEncoder(config)
    head = nn.SharedHead(nn.ObjectiveConfig(classes=3), 64, ("audio", "text"))
    optimizer = torch.optim.AdamW([p for m in (stems, encoder, head) for p in m.parameters()])
    tokens = nn.join([stems["audio"](nn.pack(sounds)), stems["text"](nn.pack(texts))])
    audio, text = encoder(tokens).mean().split([len(sounds), len(texts)])
    loss = cross_entropy(head(audio, "audio"), sound_labels)
    loss = loss + cross_entropy(head(text, "text"), text_labels)
    loss.backward()
    optimizer.step()

Weights are fp32; matrix products take the dtype of the tokens, which ``Stem`` gives (bf16 is what
the kernels are fast in). Dropout follows ``train()`` and ``eval()``, and torch's random state.

Legend: T rows and S samples of a batch, E elements of a row, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uml_fast.config import ModalityConfig, ObjectiveConfig, require
from uml_fast.kernels.segment_attention import packed_segment_attention
from uml_fast.kernels.segment_mean import segment_mean
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.base import Linear
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.head import SharedHead
from uml_fast.model.transformer import Transformer, TransformerConfig
from uml_fast.packing.pack import Layout, PackedBatch, Region, RegionRows

__all__ = [
    "AudioConfig", "FeaturesConfig", "ImageConfig", "ObjectiveConfig", "Ragged", "SegmentAttention",
    "SharedHead", "Stem", "TextConfig", "TransformerConfig", "TransformerEncoder", "join", "pack",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ragged:
    """Samples of any number of rows, one behind the other."""

    rows: Tensor
    """(T, E) rows of all samples."""
    offsets: Tensor
    """int32 (S + 1,) first row of each sample, then T."""
    max_len: int
    """At least the rows of the longest sample."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def with_rows(self, rows: Tensor) -> Ragged:
        """The same samples with other rows (T, any)."""
        return dataclasses.replace(self, rows=rows)

    def to(self, device: torch.device | str) -> Ragged:
        """The same samples on ``device``."""
        return Ragged(self.rows.to(device), self.offsets.to(device), self.max_len)

    def mean(self) -> Tensor:
        """(S, E) mean over each sample's rows, in their dtype."""
        return segment_mean(self.rows, self.offsets)

    def unpack(self) -> list[Tensor]:
        """The samples; the inverse of ``pack``."""
        return list(self.rows.split(self.offsets.diff().tolist()))

    def segment(self) -> Tensor:
        """int32 (T,) sample of each row."""
        index = torch.arange(len(self), dtype=torch.int32, device=self.rows.device)
        return index.repeat_interleave(self.offsets.diff().long(), output_size=len(self.rows))

    def position(self) -> Tensor:
        """int32 (T,) place of each row in its sample."""
        row = torch.arange(len(self.rows), dtype=torch.int32, device=self.rows.device)
        return row - self.offsets[self.segment().long()]


def pack(samples: Sequence[Tensor]) -> Ragged:
    """Samples (rows, E), of one E, dtype and device, as one batch.

    Raises:
        ValueError: no samples, an empty one, or one that is not (rows, E).
    """
    if not samples:
        raise ValueError("pack: no samples")
    for i, x in enumerate(samples):
        if x.ndim != 2 or not len(x):
            raise ValueError(f"pack: sample {i} is {list(x.shape)}; it must be [rows, elements]")
    lengths = [len(x) for x in samples]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int().to(samples[0].device)
    return Ragged(torch.cat(list(samples)), offsets, max(lengths))


def join(batches: Sequence[Ragged]) -> Ragged:
    """Batches of one width one behind the other, as those of several modalities."""
    ends = torch.tensor([len(b.rows) for b in batches]).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    offsets = [b.offsets[1:] + start for b, start in zip(batches, starts, strict=True)]
    return Ragged(
        torch.cat([b.rows for b in batches]),
        torch.cat([batches[0].offsets[:1], *offsets]),
        max(b.max_len for b in batches),
    )


class Stem(nn.Module):
    """Raw rows of one modality to tokens: ``Linear(features(rows)) + position`` in one kernel.

    Image rows are uint8 patches (``modalities.image.to_patches``), audio rows int16 samples, text
    rows int32 token ids (one element), feature rows fp32.
    """

    def __init__(
        self, config: ModalityConfig, width: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """``dtype`` is that of the products and tokens.

        Raises:
            ConfigError: the modality has a network of its own, which ``TransformerEncoder`` is.
        """
        super().__init__()
        require(config.encoder is None, f"{config.name}: a stem has no encoder; put one behind it")
        self.modality = config.build(width, width, decode=False)
        self.dtype = dtype

    def fit(self, raw: Ragged) -> None:
        """Take normalisation statistics (mean, deviation) of training samples."""
        self.modality.fit(raw.rows.cpu().numpy(), raw.offsets.cpu().long().numpy())

    def forward(self, raw: Ragged) -> Ragged:
        """Rows (T, E) to tokens (T, D).

        Raises:
            ConfigError: rows of another size or dtype, or samples longer than the positions.
        """
        dtype = str(raw.rows.dtype).removeprefix("torch.")
        self.modality.check(raw.max_len, raw.rows.shape[1], dtype)
        valid = torch.ones(len(raw.rows), dtype=torch.bool, device=raw.rows.device)
        everything = slice(0, len(raw.rows)), slice(0, len(raw))
        region = RegionRows(raw.rows, raw.position(), raw.segment(), valid, *everything)
        return raw.with_rows(self.modality.embed(region, None, self.dtype, None))


class SegmentAttention(nn.Module):
    """Multi-head self-attention in which a row sees its own sample alone.

    The weights are those of nn.MultiheadAttention: ``qkv`` its in_proj, ``out`` its out_proj.
    """

    def __init__(
        self, width: int, heads: int, *, is_causal: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require(width % heads == 0, f"width {width} is not a multiple of heads {heads}")
        self.heads, self.is_causal, self.dropout = heads, is_causal, dropout
        self.qkv = Linear(width, 3 * width)
        self.out = Linear(width, width)

    def forward(self, x: Ragged) -> Ragged:
        """Rows (T, D) to rows (T, D)."""
        mixed = packed_segment_attention(
            self.qkv(x.rows).view(len(x.rows), 3, self.heads, -1), x.offsets, x.max_len,
            is_causal=self.is_causal, dropout_p=self.dropout if self.training else 0.0,
            rng_key=_rng_key(self, x.rows.device), site=0,
        )  # fmt: skip
        return x.with_rows(self.out(mixed.flatten(1)))


class TransformerEncoder(nn.Module):
    """The transformer of a run (``uml_fast.model.transformer``) on a ragged batch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.network: Transformer = config.build()

    def forward(self, tokens: Ragged) -> Ragged:
        """Tokens (T, D) to hidden rows (T, D)."""
        hidden, _ = self.network(tokens.rows, _batch(tokens), _rng_key(self, tokens.rows.device))
        return tokens.with_rows(hidden)

    def embed(self, tokens: Ragged) -> Tensor:
        """Tokens (T, D) to one vector (S, D) for each sample, pooled as the configuration says."""
        _, embedding = self.network(tokens.rows, _batch(tokens), _rng_key(self, tokens.rows.device))
        return embedding


def _rng_key(module: nn.Module, device: torch.device) -> Tensor | None:
    """A key of dropout from torch's random state; None in evaluation."""
    return torch.randint(1 << 62, (1,), device=device) if module.training else None


def _batch(x: Ragged) -> PackedBatch:
    """The pack that the networks of runs take, with one region of just these rows."""
    region = Region(
        name="ragged", rows=len(x.rows), slots=len(x), row_elems=0, dtype="float32",
        max_len=x.max_len,
    )  # fmt: skip
    zero = torch.zeros_like(x.offsets[1:])
    return PackedBatch(
        Layout((region,)), (), x.offsets, zero, zero - 1, zero.long(), x.position(), x.segment()
    )
