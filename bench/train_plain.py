"""The strongest plain stack for several unpaired modalities: what a user would write without us.

timm's transformer blocks under ``torch.compile``, scaled-dot-product attention with a mask, bf16
autocast, fused AdamW; a padded batch of each modality in turn and one optimiser step for their
summed loss; a DataLoader with workers that read through an index, decode with simplejpeg and pad.
Lengths are padded to multiples of ``BUCKET``, so that compiling comes to an end.

Legend: B samples, N padded tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.loader_providers import Indexed, Part, tuned_loader
from uml_fast.kernels.log_mel import hann, mel_filters
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import Uml
from uml_fast.runtime.foreign import import_timm

BUCKET = 32
"""Tokens that padded lengths are multiples of."""
Batch = tuple[Tensor, Tensor, Tensor]
"""Padded samples, their tokens (B,) and labels (B,)."""


class PaddedBatches(Indexed):
    """A batch of every modality a call, padded to a whole number of buckets."""

    def __getitems__(self, chosen: Sequence[np.ndarray]) -> list[Batch]:
        return [
            pad(part, [part.decode(shards.payload(i)) for i in index], shards.label[index])
            for part, shards, index in zip(self.parts, self.shards, chosen, strict=True)
        ]


def pad(part: Part, samples: Sequence[np.ndarray], labels: np.ndarray) -> Batch:
    """The batch of one modality; images are of one size."""
    label_B = torch.from_numpy(labels.astype(np.int64))
    if isinstance(part.config, ImageConfig):
        pixels = torch.from_numpy(np.stack(samples)).permute(0, 3, 1, 2).contiguous()
        return pixels, torch.full((len(samples),), part.config.patches), label_B
    per_token = part.config.row_samples if isinstance(part.config, AudioConfig) else 1
    tokens_B = torch.tensor([-(-len(s) // per_token) for s in samples])
    longest = -(-int(tokens_B.max()) // BUCKET) * BUCKET * per_token
    out = torch.zeros(len(samples), longest, dtype=torch.from_numpy(samples[0]).dtype)
    for row, sample in zip(out, samples, strict=True):
        row[: len(sample)] = torch.from_numpy(sample)
    return out, tokens_B, label_B


class PlainStack(nn.Module):
    """Stems, blocks and head; ``modality`` picks the stem."""

    def __init__(self, config: TransformerConfig, parts: Sequence[Part], classes: int) -> None:
        super().__init__()
        block: Any = import_timm().models.vision_transformer.Block
        d = config.width
        self.blocks = nn.ModuleList(
            block(d, config.heads, mlp_ratio=config.feed_forward / d, qkv_bias=True)
            for _ in range(config.layers)
        )
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, classes, bias=False)
        self.stems, self.positions = nn.ModuleDict(), nn.ParameterDict()
        for c in (p.config for p in parts):
            if isinstance(c, ImageConfig):
                self.stems[c.name] = nn.Conv2d(3, d, c.patch_height, c.patch_height)
                rows = c.patches
            elif isinstance(c, AudioConfig):
                self.stems[c.name] = nn.Linear(c.frames * c.mels, d)
                self.audio, rows = c, c.positions
                self.register_buffer("window", hann(c.window).float())
                filters = mel_filters(c.sample_rate, c.window, c.mels, "htk", None)
                self.register_buffer("filters", filters.float() * (4 / c.window) ** 2)
            else:
                self.stems[c.name], rows = nn.Embedding(256, d), c.positions  # type: ignore[attr-defined]
            self.positions[c.name] = nn.Parameter(torch.randn(rows, d) * 0.02)
        for name in ("image_mean", "image_deviation"):
            self.register_buffer(name, torch.full((1, 3, 1, 1), 0.5))
        for name in ("audio_mean", "audio_deviation"):
            self.register_buffer(name, torch.ones(()))

    def tokens(self, raw: Tensor, modality: str) -> Tensor:
        """(B, N, D) fp32 or bf16."""
        stem = self.stems[modality]
        if modality == "image":
            pixels = (raw.float() / 255 - self.image_mean) / self.image_deviation
            x = stem(pixels).flatten(2).transpose(1, 2)
        elif modality == "audio":
            x = stem(self.log_mel(raw))
        else:
            x = stem(raw.int())
        n = x.shape[1]
        position = self.positions[modality]
        at = torch.arange(n, device=x.device).clamp(max=len(position) - 1)
        return x + position[at]

    def log_mel(self, raw: Tensor) -> Tensor:
        """(B, N, frames x mels): log-mel frames, those of a token side by side."""
        c = self.audio
        samples = F.pad(raw.float() / 32768, (0, c.window - c.hop))
        frames = samples.unfold(1, c.window, c.hop) * self.window
        power = torch.fft.rfft(frames).abs().square()
        mel = (power @ self.filters + 1e-6).log()
        mel = (mel - self.audio_mean) / self.audio_deviation
        return mel.reshape(len(raw), -1, c.frames * c.mels)

    def forward(self, raw: Tensor, tokens_B: Tensor, label_B: Tensor, modality: str) -> Tensor:
        """Mean cross-entropy of a batch."""
        x = self.tokens(raw, modality)
        valid = torch.arange(x.shape[1], device=x.device) < tokens_B[:, None]
        mask = None if modality == "image" else valid[:, None, None]
        for block in self.blocks:
            x = block(x, attn_mask=mask)
        pooled = (self.norm(x).float() * valid[..., None]).sum(1) / tokens_B[:, None]
        return F.cross_entropy(self.head(pooled).float(), label_B)


@torch.no_grad()
def copy_weights(model: Uml, plain: PlainStack) -> None:
    """Give the plain stack a model's weights and statistics, so that both compute the same."""
    for ours, theirs in zip(model.backbone.blocks, plain.blocks, strict=True):  # type: ignore[arg-type]
        for a, b in (
            (ours.qkv, theirs.attn.qkv), (ours.out, theirs.attn.proj), (ours.up, theirs.mlp.fc1),
            (ours.down, theirs.mlp.fc2), (ours.norm1, theirs.norm1), (ours.norm2, theirs.norm2),
        ):  # fmt: skip
            b.load_state_dict(a.state_dict())
            if isinstance(b, nn.LayerNorm):
                b.eps = a.eps
    plain.norm.load_state_dict(model.backbone.final_norm.state_dict())  # type: ignore[union-attr]
    assert model.head is not None
    plain.head.weight.copy_(model.head.weight)
    for name, stem in plain.stems.items():
        m = model.modality(name)
        plain.positions[name].copy_(m.position)
        if name == "image":
            d, _, size, _ = stem.weight.shape
            stem.weight.copy_(m.stem.weight.view(d, size, size, 3).permute(0, 3, 1, 2))
            stem.bias.copy_(m.stem.bias)
            plain.image_mean.copy_(m.mean.view(1, 3, 1, 1))
            plain.image_deviation.copy_(m.deviation.view(1, 3, 1, 1))
        elif name == "audio":
            stem.load_state_dict(m.stem.state_dict())
            plain.audio_mean, plain.audio_deviation = m.mean.clone(), m.deviation.clone()
        else:
            stem.weight.copy_(m.stem.weight)


class PlainTraining:
    """Training steps of the plain stack on its DataLoader's batches.

    Args:
        workers: of the DataLoader.
    """

    def __init__(
        self, plain: PlainStack, parts: Sequence[Part], workers: int, device: torch.device
    ) -> None:
        self.model, self.parts, self.device = plain.to(device), parts, device
        self._loader = tuned_loader(PaddedBatches(parts), workers, device.type == "cuda")
        self.batches = iter(self._loader)
        self.optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, fused=True)
        self.loss = torch.compile(self.model, dynamic=False)
        torch._dynamo.config.cache_size_limit = 64
        self.valid = dict.fromkeys((p.config.name for p in parts), 0)
        self.samples, self.padded = 0, 0

    def step(self) -> Tensor:
        """One optimiser step on a batch of every modality; returns the loss on the device."""
        total = torch.zeros((), device=self.device)
        for part, (raw, tokens_B, label_B) in zip(self.parts, next(self.batches), strict=True):
            self.valid[part.config.name] += int(tokens_B.sum())
            self.samples += len(raw)
            self.padded += len(raw) * int(-(-int(tokens_B.max()) // BUCKET) * BUCKET)
            move = [t.to(self.device, non_blocking=True) for t in (raw, tokens_B, label_B)]
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.loss(*move, part.config.name)
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total

    def close(self) -> None:
        """Stop the workers."""
        del self.batches, self._loader
