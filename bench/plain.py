"""The baseline: a training step as the authors' release takes it (paper 1.2).

Padded to the longest sample of the batch, each modality forwarded on its own, eager fp32, stock
``nn.Transformer`` layers, Adam with its defaults, one backward of the summed losses, one
``.item()`` per loss. The batches lie padded in memory, which is kinder than the release's loader.
Every provider computes with the same number of threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.shapes import Samples
from tests.plain_uml import PlainUml, adam, pad

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pad_batch(batch: Samples) -> dict[str, tuple[Tensor, Tensor]]:
    """Each modality padded to its longest sample, on the device, with the lengths."""
    padded = {m: pad(s) for m, s in batch.items()}
    return {m: (x.to(DEVICE), lengths.to(DEVICE)) for m, (x, lengths) in padded.items()}


class PlainStep:
    """One call is one training step on the next batch; returns the summed loss."""

    def __init__(
        self, batches: Sequence[Samples], width: int, dropout: float, seed: int = 0
    ) -> None:
        torch.manual_seed(seed)
        sizes = {m: s[0].shape[1] for m, s in batches[0].items()}
        self.model = PlainUml(sizes, width, dropout=dropout).to(DEVICE).train()
        self.optimizer = adam(self.model)
        self._batches = itertools.cycle([pad_batch(b) for b in batches])

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        total, losses = self.model.total_loss(next(self._batches), "release")
        total.backward()
        self.optimizer.step()
        return sum(v.item() for v in losses.values())
