"""The classification head shared by all modalities (paper 1.4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uml_fast.config import ObjectiveConfig


class SharedHead(nn.Module):
    """``logits_m = scale_m * W (P_m v)``; P and scales only if the configuration asks for them.

    With a hidden layer: ``scale_m * W gelu(V (P_m v) + b)``.
    """

    def __init__(self, config: ObjectiveConfig, width: int, modalities: tuple[str, ...]) -> None:
        super().__init__()
        embedded = width
        self.hidden: nn.Linear | None = None
        if config.head_hidden:
            self.hidden = nn.Linear(width, config.head_hidden)
            width = config.head_hidden
        self.weight = nn.Parameter(torch.empty(config.classes, width))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.project = nn.ModuleDict(
            {m: nn.Linear(embedded, embedded, bias=False) for m in config.project}
        )
        scaled = modalities if config.learn_scale else ()
        self.scale = nn.ParameterDict({m: nn.Parameter(torch.ones(())) for m in scaled})

    def forward(self, embedding_SE: Tensor, modality: str) -> Tensor:
        """Embeddings (S, E) of one modality to logits (S, classes), fp32."""
        logits = F.linear(self.inputs(embedding_SE, modality), self.weight)
        return logits * self.scale[modality] if modality in self.scale else logits

    def inputs(self, embedding_SE: Tensor, modality: str) -> Tensor:
        """What W is multiplied with: (S, E) embeddings projected, or (S, H) the hidden layer."""
        v = embedding_SE.float()
        if modality in self.project:
            v = self.project[modality](v)
        return v if self.hidden is None else F.gelu(self.hidden(v))

    @torch.no_grad()
    def set_class_means(self, embedding_NE: Tensor, label_N: Tensor) -> None:
        """Set row c to the L2-normalised mean embedding of class c (paper 1.4, "init").

        Rows of classes without a sample keep their random value.
        """
        classes = len(self.weight)
        sums = torch.zeros_like(self.weight).index_add_(
            0, label_N, embedding_NE.to(self.weight.dtype)
        )
        present = torch.bincount(label_N, minlength=classes) > 0
        self.weight[present] = F.normalize(sums, dim=1)[present]
