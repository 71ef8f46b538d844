"""The model: a stem per modality, maybe a network of its own, the shared backbone, and a head.

Legend: T rows and S segment slots of a pack, C rows of a region, D width, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uml_fast.config import RunConfig, require
from uml_fast.kernels.rng import site_key
from uml_fast.modalities.base import Linear, Modality
from uml_fast.model.backbone import Backbone
from uml_fast.model.head import SharedHead
from uml_fast.packing.pack import PackedBatch, RegionRows
from uml_fast.packing.schedule import stream_key
from uml_fast.runtime.profiling import phase

SHARED = ""
"""Name of the shared network where those of modalities have theirs."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A pack after the backbone."""

    regions: tuple[RegionRows, ...]
    """The regions of the pack."""
    features: tuple[Tensor | None, ...]
    """Per region the features of its rows (C, F), where decoders predict them."""
    hidden_TD: Tensor
    """(T, D) what decoders read; one row for each slot where a modality is pooled before."""
    embedding_SE: Tensor
    """(S, E) fp32 embedding of each segment; zero for empty ones."""


class _Join(torch.autograd.Function):
    """The tokens of a pack from the parts that were written into them, without a copy."""

    @staticmethod
    def forward(ctx: Any, tokens_TD: Tensor, *parts: Tensor) -> Tensor:
        ctx.rows = [len(p) for p in parts]
        return tokens_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        return None, *grad_TD.split(ctx.rows)


def _lead(rows_CD: Tensor, batch: PackedBatch, class_token_D: Tensor) -> Tensor:
    """The rows of a pack of one region, with the class token in front of each slot."""
    at_C, first_S = batch.led_rows()
    out = rows_CD.new_empty(len(rows_CD) + len(first_S), rows_CD.shape[1])
    token = class_token_D.to(rows_CD.dtype).expand(len(first_S), -1)
    return out.index_copy(0, at_C, rows_CD).index_copy_(0, first_S.long(), token)


class Uml(nn.Module):
    """The parts of paper 1.1: f_m, the shared backbone h, and decoders g_m or the shared head c.

    f_m is a stem and, where the configuration has one, a network of the modality's own. If that
    gives another width than the shared one, a bias-free projection follows (P of paper 1.4).
    """

    frozen: frozenset[str] = frozenset()
    """Names of the networks that are not trained now: modalities, ``SHARED``."""
    is_sharded = False
    """Whether ranks hold the networks in shards, so that to run one gathers its weights from all.
    Then every pack runs all of them, forward and back, in one order."""

    def __init__(self, config: RunConfig, dtype: torch.dtype = torch.float32) -> None:
        """Build with freshly drawn fp32 weights; ``dtype`` is that of the matrix products."""
        super().__init__()
        self.dtype = dtype
        self.width = config.backbone.width
        require(
            self.width >= 1,
            "backbone.width is 0; uml_fast.training.complete says what it is",
        )
        decode = config.objective.kind == "next_embedding"
        # the parts that every mode has are drawn first, so that the trials of a seed share them
        self.backbone = config.backbone.build()
        self.modalities = nn.ModuleDict()
        self.encoders = nn.ModuleDict()
        self.projections = nn.ModuleDict()
        self.head: SharedHead | None = None
        for m in sorted(config.modalities, key=lambda m: m.name != config.target):
            own = m.encoder
            encoder = None if own is None else own.build()
            self.modalities[m.name] = m.build(
                self.width if own is None else own.width, self.backbone.output_width, decode
            )
            if encoder is not None:
                self.encoders[m.name] = encoder
                given = encoder.embedding_width if m.pooled else encoder.output_width
                if given != self.width:
                    self.projections[m.name] = Linear(given, self.width, bias=False)
            if m.name == config.target and not decode:
                names = tuple(m.name for m in config.modalities)
                self.head = SharedHead(config.objective, self.backbone.embedding_width, names)
        self.led = frozenset(
            name for name in self.modalities if self.modality(name).class_token is not None
        )
        """Modalities with a class token."""
        self.pooled = frozenset(m.name for m in config.modalities if m.pooled)
        self._networks = {m.name: m.encoder for m in config.modalities if m.encoder is not None}
        self._networks[SHARED] = config.backbone
        self._sites = {name: stream_key(name) for name in self._networks}
        self.freeze_for(0)

    def modality(self, name: str) -> Modality:
        """The stem and decoder of one modality."""
        found = self.modalities[name]
        assert isinstance(found, Modality)
        return found

    def units(self) -> tuple[nn.Module, ...]:
        """Parts of the networks that FSDP cuts each for itself."""
        networks = [n for n in self.modules() if isinstance(n, Backbone)]
        return tuple(unit for network in networks for unit in network.units())

    def freeze_for(self, step: int) -> None:
        """Freeze the networks that step ``step`` leaves as they are, and no other."""
        frozen = frozenset(n for n, config in self._networks.items() if config.is_frozen(step))
        for name in frozen ^ self.frozen:
            for parameter in self._part(name):
                parameter.requires_grad_(name not in frozen)
        self.frozen = frozen

    def _part(self, name: str) -> Iterator[nn.Parameter]:
        """What freezes together: the shared network, or a modality's own with its stem."""
        if name == SHARED:
            yield from self.backbone.parameters()
            return
        yield from self.encoders[name].parameters()
        for parameter_name, parameter in self.modality(name).named_parameters():
            if not parameter_name.startswith("decoder."):
                yield parameter

    def forward(self, batch: PackedBatch, rng_key: Tensor | None = None) -> Encoded:
        """Encode a pack. ``rng_key`` int64 (1,) draws a step's dropout; None: no dropout."""
        regions = tuple(batch.region(i) for i in range(len(batch.layout.regions)))
        stems = [self.modality(r.name) for r in batch.layout.regions]
        decodes = self.head is None
        features = tuple(
            stem.features(rows) if decodes else None
            for stem, rows in zip(stems, regions, strict=True)
        )
        if self.encoders or self.led:
            names = [r.name for r in batch.layout.regions]
            parts: dict[str, Tensor] = {}
            for name in self.modalities:
                if name in names:
                    i = names.index(name)
                    parts[name] = self._encode(
                        stems[i], batch.alone(i), regions[i], features[i], rng_key
                    )
                elif self.is_sharded and name in self.encoders:
                    parts[name] = self._encode_none(name, batch.padding(), rng_key)
            tokens_TD = torch.cat([parts.pop(name) for name in names] + list(parts.values()))
            pooled = {i for i, name in enumerate(names) if name in self.pooled}
            led = {i for i, name in enumerate(names) if name in self.led} - pooled
            batch = batch.reshaped(pooled, led)
        else:
            tokens_TD = self._embed(stems, regions, features)
        if self.is_sharded and not tokens_TD.requires_grad and torch.is_grad_enabled():
            tokens_TD.requires_grad_(any(map(self._trains_stem, self.modalities)))
        hidden_TD, embedding_SE = self.backbone(tokens_TD, batch, self._key(rng_key, SHARED))
        return Encoded(regions, features, hidden_TD, embedding_SE.float())

    def _encode(
        self,
        stem: Modality,
        alone: PackedBatch,
        region: RegionRows,
        features: Tensor | None,
        rng_key: Tensor | None,
    ) -> Tensor:
        """What the shared part gets of a region: rows (C, D), or one (S, D) for each slot."""
        rows_CD = stem.embed(region, features, self.dtype, None)
        name = stem.name
        if stem.class_token is not None:
            rows_CD, alone = _lead(rows_CD, alone, stem.class_token), alone.reshaped(led=(0,))
        return self._run_own(name, rows_CD, alone, rng_key) if name in self.encoders else rows_CD

    def _encode_none(self, name: str, padding: PackedBatch, rng_key: Tensor | None) -> Tensor:
        """(0, D): the network of a modality that the pack does not hold runs on padding alone."""
        width = self._networks[name].width
        rows_CD = torch.zeros(1, width, dtype=self.dtype, device=padding.offsets_S1.device)
        rows_CD.requires_grad_(self._trains_stem(name) and torch.is_grad_enabled())
        return self._run_own(name, rows_CD, padding, rng_key)[:0]

    def _trains_stem(self, name: str) -> bool:
        """Whether tokens of a modality take gradients, so that networks behind run backward."""
        parameters = self.modality(name).named_parameters()
        return any(p.requires_grad for n, p in parameters if not n.startswith("decoder."))

    def _run_own(
        self, name: str, rows_CD: Tensor, alone: PackedBatch, rng_key: Tensor | None
    ) -> Tensor:
        """A modality's own network, and the projection to the shared width where they differ."""
        hidden_CD, embedding_SE = self.encoders[name](rows_CD, alone, self._key(rng_key, name))
        given: Tensor = embedding_SE if name in self.pooled else hidden_CD
        return self.projections[name](given) if name in self.projections else given

    def _key(self, rng_key: Tensor | None, name: str) -> Tensor | None:
        """The key of a network's dropout, of which one that is frozen has none."""
        if rng_key is None or name in self.frozen:
            return None
        return rng_key if name == SHARED else site_key(rng_key, self._sites[name])

    def _embed(
        self,
        stems: list[Modality],
        regions: tuple[RegionRows, ...],
        features: tuple[Tensor | None, ...],
    ) -> Tensor:
        """Tokens (T, D) of all regions; in eager mode each stem writes its rows of them."""
        parts = list(zip(stems, regions, features, strict=True))
        if torch.compiler.is_compiling():
            return torch.cat([s.embed(rows, f, self.dtype, None) for s, rows, f in parts])
        rows = regions[-1].rows.stop
        tokens_TD = regions[0].raw.new_empty(rows, self.width, dtype=self.dtype)
        # .data: the parts share memory but no version, so writing one leaves the others valid
        written = []
        for stem, part, given in parts:
            with phase(f"stem {stem.name}"):
                own = tokens_TD[part.rows].data
                written.append(stem.embed(part, given, self.dtype, own))
        joined: Tensor = _Join.apply(tokens_TD, *written)
        return joined

    def logits(self, embedding_SE: Tensor, modality: str) -> Tensor:
        """Logits (S, classes) of the shared head."""
        assert self.head is not None
        logits: Tensor = self.head(embedding_SE, modality)
        return logits
