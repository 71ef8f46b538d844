"""The release's padding semantics, for comparison only (paper 1.2 and its authors' code).

The authors' release pads the samples of a batch with zero rows to the longest one and masks
nothing: padded rows are encoded, enter the mean squared error and its denominator, and enter the
mean that makes an embedding, so that a sample's embedding depends on its batch. In terms of packs
that is no other computation: the padding has become rows of the sample. So the release's numbers
are what the model gives on a pack of padded samples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from uml_fast.config import ConfigError, RunConfig
from uml_fast.model.uml import Uml
from uml_fast.objective import losses
from uml_fast.pack import Layout, PackedBatch, Region, pack_samples, unpack_samples

Compat = Literal["none", "release"]


def release_batch(batch: PackedBatch) -> PackedBatch:
    """The pack with every sample padded by zero rows to the longest of its modality in the pack.

    Labels are kept; ``sample_S`` counts the samples of the pack. Regions without a sample are left
    out.

    Raises:
        ConfigError: a modality that is not float features: zero is a pixel, a sound or a token
        there.
    """
    regions, samples, labels = [], {}, {}
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
    device = batch.offsets_S1.device
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
