"""Start a run's networks from checkpoints of other libraries (paper 1.5)."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from uml_fast.config import BackboneConfig, ModalityConfig, RunConfig, require
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.backbone import Backbone
from uml_fast.model.interop.load import Pretrained, load_pretrained
from uml_fast.model.positions import resample_positions
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import Uml

logger = logging.getLogger("uml_fast")


def init_from_checkpoints(model: Uml, config: RunConfig) -> None:
    """Set the weights of every network that has ``init_from``, and of embeddings that fit it.

    A modality's own network brings the embedding of its checkpoint. The shared network brings it to
    the modalities without a network of their own whose inputs are the same: images of the same
    patches, texts of the same vocabulary; the others start with a new one (paper 1.5).

    Raises:
        ConfigError: a checkpoint that cannot be read, or of another architecture than the run's:
            lists what differs.
    """
    for modality in config.modalities:
        source = source_of(modality.encoder)
        if modality.encoder is not None and source:
            pretrained = load_pretrained(source)
            name = f"{modality.name}.encoder"
            encoder = model.encoders[modality.name]
            assert isinstance(encoder, Backbone)
            _load_network(encoder, modality.encoder, pretrained, name)
            _load_stem(model, modality, pretrained)
    source = source_of(config.backbone)
    if source:
        pretrained = load_pretrained(source)
        _load_network(model.backbone, config.backbone, pretrained, "backbone")
        for modality in config.modalities:
            if modality.encoder is None and _reads_the_same(modality, pretrained.modality):
                _load_stem(model, modality, pretrained)
            elif modality.encoder is None:
                logger.info("%s: its embedding is new, it has none in %s", modality.name, source)


def source_of(config: BackboneConfig | None) -> str | None:
    """The checkpoint that a network starts from, if any."""
    return config.init_from if isinstance(config, TransformerConfig) else None


def _architecture(config: TransformerConfig) -> dict[str, Any]:
    """What must agree for weights of one network to be those of another, by field."""
    fields = (
        "width", "layers", "heads", "heads_of_keys", "feed_forward", "activation", "norm",
        "norm_kind", "eps", "input_norm", "input_projection", "bias",
    )  # fmt: skip
    is_rotary = config.positions == "rotary"
    return {name: getattr(config, name) for name in fields} | {
        "layer_scale": bool(config.layer_scale),
        "rotary": is_rotary and config.rotary_base,
    }


def _load_network(
    network: Backbone, config: BackboneConfig, pretrained: Pretrained, name: str
) -> None:
    """Set all weights but those the run adds: shared positions, or no projection behind pooling."""
    assert isinstance(config, TransformerConfig)
    source = config.init_from
    ours, theirs = _architecture(config), _architecture(pretrained.backbone)
    ours["embedding"], theirs["embedding"] = config.embedding, pretrained.backbone.embedding
    if config.embedding == 0:
        theirs["embedding"] = 0
    differ = [f"{k} {ours[k]!r}, not {theirs[k]!r}" for k in ours if ours[k] != theirs[k]]
    require(
        not differ,
        f"{name} has {'; '.join(differ)} as {source} has; set these fields, or take the whole "
        f"configuration: load_pretrained({source!r}).backbone",
    )
    own = network.state_dict()
    weights = {n.removeprefix("backbone."): t for n, t in pretrained.tensors.items()}
    network.load_state_dict({n: weights.get(n, t) for n, t in own.items()})


def _reads_the_same(ours: ModalityConfig, theirs: ModalityConfig) -> bool:
    """Whether an embedding serves a modality: images of equal patches, texts of equal ids."""
    if isinstance(ours, ImageConfig) and isinstance(theirs, ImageConfig):
        same = ("channels", "patch_height", "patch_width")
        return all(getattr(ours, n) == getattr(theirs, n) for n in same)
    if isinstance(ours, TextConfig) and isinstance(theirs, TextConfig):
        return ours.vocabulary == theirs.vocabulary
    return False


def _load_stem(model: Uml, modality: ModalityConfig, pretrained: Pretrained) -> None:
    theirs, name = pretrained.modality, modality.name
    source = pretrained.backbone.init_from
    require(
        _reads_the_same(modality, theirs),
        f"{name} is {_described(modality)}; {source} takes {_described(theirs)}",
    )
    tensors = {n: t for n, t in pretrained.tensors.items() if not n.startswith("backbone.")}
    if isinstance(modality, ImageConfig) and isinstance(theirs, ImageConfig):
        require(
            modality.class_token == theirs.class_token,
            f"{name}.class_token is {modality.class_token}, in {source} it is {theirs.class_token}",
        )
        tensors["position"] = resample_positions(
            tensors["position"], _grid(theirs), _grid(modality), pretrained.antialias
        )
    if isinstance(modality, TextConfig) and isinstance(theirs, TextConfig):
        require(
            (modality.positions > 0) == (theirs.positions > 0)
            and modality.positions <= theirs.positions,
            f"{name}.positions is {modality.positions}, {source} has {theirs.positions}",
        )
        if theirs.positions:
            tensors["position"] = tensors["position"][: modality.positions]
    _set(model.modality(name), tensors)


@torch.no_grad()
def _set(stem: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    own = stem.state_dict()
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def _grid(config: ImageConfig) -> tuple[int, int]:
    return config.height // config.patch_height, config.width // config.patch_width


def _described(config: ModalityConfig) -> str:
    if isinstance(config, ImageConfig):
        size = f"{config.patch_height} x {config.patch_width}"
        return f"images of {config.channels} channels in patches of {size}"
    if isinstance(config, TextConfig):
        return f"texts of {config.vocabulary} ids"
    return f"a modality of kind {type(config).__name__}"
