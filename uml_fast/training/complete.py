"""What a configuration leaves to its checkpoints and its data, filled in before a run begins."""

from __future__ import annotations

import dataclasses
import logging

from uml_fast.config import BackboneConfig, ModalityConfig, RunConfig, require
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.interop.initialise import source_of
from uml_fast.model.interop.load import Pretrained, load_pretrained

logger = logging.getLogger("uml_fast")

_BLOCKS = (
    "width", "layers", "heads", "key_heads", "feed_forward", "activation", "norm", "norm_kind",
    "eps", "input_norm", "input_projection", "bias", "layer_scale",
)  # fmt: skip
"""Fields that the weights of a shared network decide."""
_OF_THE_RUN = ("freeze", "unfreeze_at", "dropout", "recompute")
"""Fields of a modality's own network that its checkpoint does not decide."""


def complete(config: RunConfig) -> RunConfig:
    """The configuration with nothing left open.

    A network with ``init_from`` is that of the checkpoint: of the shared one its blocks; of a
    modality's own all but the fields of the run (``freeze``, ``dropout``, ...), with patches or
    vocabulary of its embedding. ``size`` 0 of feature rows is that of the data. ``width`` 0 of the
    shared part is that of features that enter as they are, else of what the last modality's own
    network gives.

    Raises:
        ConfigError: a checkpoint that cannot be read, or mode ``pretrained`` without one.
    """
    modalities = tuple(_modality(m, config) for m in config.modalities)
    backbone = _shared(config.backbone)
    if backbone.width == 0:
        backbone = dataclasses.replace(backbone, width=_width(modalities))
    networks = (backbone, *(m.encoder for m in modalities))
    require(
        "pretrained" not in config.modes or any(source_of(n) for n in networks),
        "mode 'pretrained' needs weights to start from: --backbone.init-from FOLDER, or "
        "--modalities.0.encoder.init-from FOLDER",
    )
    return dataclasses.replace(config, modalities=modalities, backbone=backbone)


def _shared(backbone: BackboneConfig) -> BackboneConfig:
    source = source_of(backbone)
    if not source:
        return backbone
    theirs = load_pretrained(source, weights=False).backbone
    logger.info("backbone: %d layers of width %d, as in %s", theirs.layers, theirs.width, source)
    fields = {name: getattr(theirs, name) for name in _BLOCKS}
    if theirs.positions == "rotary":
        fields |= {"positions": "rotary", "rotary_base": theirs.rotary_base}
    return dataclasses.replace(backbone, **fields)


def _modality(m: ModalityConfig, config: RunConfig) -> ModalityConfig:
    source = source_of(m.encoder)
    if source:
        return _with_network(m, load_pretrained(source, weights=False))
    if isinstance(m, FeaturesConfig) and m.size == 0:
        return dataclasses.replace(m, size=config.data.feature_size(m.name))
    return m


def _with_network(m: ModalityConfig, theirs: Pretrained) -> ModalityConfig:
    kept = {name: getattr(m.encoder, name) for name in _OF_THE_RUN}
    encoder = dataclasses.replace(theirs.backbone, **kept)
    source, embedding = encoder.init_from, theirs.modality
    logger.info("%s: %d layers of width %d, as in %s", m.name, encoder.layers, encoder.width,
                source)  # fmt: skip
    if isinstance(m, ImageConfig) and isinstance(embedding, ImageConfig):
        return dataclasses.replace(
            m, encoder=encoder, channels=embedding.channels, class_token=embedding.class_token,
            patch_height=embedding.patch_height, patch_width=embedding.patch_width,
        )  # fmt: skip
    if isinstance(m, TextConfig) and isinstance(embedding, TextConfig):
        return dataclasses.replace(
            m, encoder=encoder, vocabulary=embedding.vocabulary,
            positions=min(m.positions, embedding.positions),
        )  # fmt: skip
    require(False, f"{m.name}: {source} is a network of {embedding.name}s, which it is not of")
    return m


def _width(modalities: tuple[ModalityConfig, ...]) -> int:
    for m in modalities:
        if isinstance(m, FeaturesConfig) and m.identity:
            return m.size
    last = modalities[-1]
    require(
        last.encoder is not None,
        "backbone.width is 0, which takes feature rows that enter as they are (identity) or a "
        f"network of {last.name}'s own; give a width",
    )
    assert last.encoder is not None
    return last.encoder.given_width(last.pooled)
