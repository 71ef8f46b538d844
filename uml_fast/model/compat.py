"""The release's padding semantics, for comparison only (paper 1.2 and its authors' code).

The authors' release pads the samples of a batch with zero rows to the longest one and masks
nothing: padded rows are encoded, enter the mean squared error and its denominator, and enter the
mean that makes an embedding, so that a sample's embedding depends on its batch. In terms of packs
that is no other computation: the padding has become rows of the sample. So the release's numbers
are what the model gives on a pack of padded samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from uml_fast.config import ConfigError, MixConfig, RunConfig
from uml_fast.model.objective import losses
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, PackedBatch, Region, pack_samples, unpack_samples

Compat = Literal["none", "release"]


def release_warmup_epochs(mix: MixConfig) -> float:
    """Epochs of the release's warm-up: ``step_k`` counts from 0 and is included, so one more."""
    return mix.warmup_epochs + 1 if mix.policy == "warmup" else mix.warmup_epochs


def release_batches(
    name: str, samples: Sequence[np.ndarray], labels: Sequence[int], batch: int
) -> Iterator[PackedBatch]:
    """Samples in their order as the release's evaluation sees them: padded batches of ``batch``.

    Args:
        name: modality.
        samples: each (rows, E) float32.
        labels: class of each sample.
        batch: samples of a batch; the last one may have fewer.
    """
    for first in range(0, len(samples), batch):
        given = samples[first : first + batch]
        rows = sum(map(len, given))
        region = Region(
            name=name, rows=rows, slots=len(given), row_elems=given[0].shape[1],
            dtype=given[0].dtype.name, max_len=max(map(len, given)),
        )  # fmt: skip
        chosen = {name: list(labels[first : first + batch])}
        yield release_batch(pack_samples(Layout((region,)), {name: given}, chosen))


def release_batch(batch: PackedBatch) -> PackedBatch:
    """The pack with every sample padded by zero rows to the longest of its modality in the pack.

    Labels are kept; ``sample_S`` counts the samples of the pack. Regions without a sample are left
    out.

    Raises:
        ConfigError: a modality that is not float features: zero is a pixel, a sound or a token
        there.
    """
    regions, samples, labels = [], {}, {}
    device = batch.offsets_S1.device
    batch = batch.to(torch.device("cpu"))
    for m, (region, given) in enumerate(
        zip(batch.layout.regions, unpack_samples(batch).values(), strict=True)
    ):
        if region.dtype != "float32":
            raise ConfigError(
                f"{region.name}: the release pads float features only, this is {region.dtype}"
            )
        if not given:
            continue
        longest = max(len(x) for x in given)
        samples[region.name] = [np.pad(x, ((0, longest - len(x)), (0, 0))) for x in given]
        labels[region.name] = batch.label_S[batch.modality_S == m].tolist()
        regions.append(
            Region(
                name=region.name, rows=longest * len(given), slots=len(given),
                row_elems=region.row_elems, dtype=region.dtype, max_len=longest,
            )
        )  # fmt: skip
    return pack_samples(Layout(tuple(regions)), samples, labels).to(device)


def prediction_losses(
    model: Uml, batch: PackedBatch, config: RunConfig, compat: Compat = "none"
) -> dict[str, Tensor]:
    """Loss () of each modality of a pack, without dropout, padded the way of ``compat``."""
    return losses(model, release_batch(batch) if compat == "release" else batch, config, None)


def embeddings(model: Uml, batch: PackedBatch, compat: Compat = "none") -> dict[str, Tensor]:
    """Embeddings (samples, E) fp32 of each modality of a pack, in packed order.

    ``none``: the mean over a sample's own rows. ``release``: the mean over its padded rows too.
    """
    if compat == "release":
        batch = release_batch(batch)
    embedding_SE = model(batch).embedding_SE
    return {r.name: embedding_SE[batch.modality_S == m] for m, r in enumerate(batch.layout.regions)}
