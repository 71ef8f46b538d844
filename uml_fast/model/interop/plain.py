"""The target of a trained model as one plain network: an embedding, a transformer, a matrix.

Linear maps that follow each other are one: input projections are part of the embedding, and what
lies between the pooled rows and the logits (projections, P, scale and W) is one matrix.

Legend: C classes, D width, P positions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from uml_fast.config import ModalityConfig, RunConfig, require
from uml_fast.modalities.base import Modality
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.head import SharedHead
from uml_fast.model.transformer import Transformer, TransformerConfig
from uml_fast.model.uml import Uml


@dataclass(frozen=True, slots=True)
class Plain:
    """A unimodal model, as other libraries have them."""

    backbone: TransformerConfig
    """The network, without projections or positions of its own."""
    modality: ModalityConfig
    """The embedding in front of it."""
    tensors: dict[str, Tensor]
    """fp32: ``backbone.*``, ``stem.*``, ``position``, ``class_token``, ``mean``, ``deviation``."""
    head_CD: Tensor | None
    """From pooled rows to logits; None where the run had no classes."""
    classes: list[str]
    """Names of the classes."""


@torch.no_grad()
def plain_model(model: Uml, config: RunConfig, classes: list[str]) -> Plain:
    """The target of ``model`` as a plain network.

    Raises:
        ConfigError: names what has no place in one.
    """
    target = config.modality(config.target)
    network, own, after = _network(model, config)
    require(
        isinstance(target, ImageConfig | TextConfig) and own.layers > 0,
        f"{target.name}: other libraries have networks of images and texts with at least one "
        f"block; this is a {type(target).__name__} and {own.layers} blocks. --to safetensors "
        "writes any",
    )
    tensors = _embedding(model.modality(target.name), target, network)
    kept = ("position", "input_projection.weight", "embedding.weight")
    tensors |= {
        f"backbone.{name}": t.detach().cpu().float()
        for name, t in network.state_dict().items()
        if name not in kept
    }
    plain = dataclasses.replace(
        own, input_projection=False, embedding=0,
        positions="rotary" if own.positions == "rotary" else "none",
    )  # fmt: skip
    if network.embedding is not None:
        after = [*after, network.embedding.weight.detach().cpu().float()]
    head = None if model.head is None else _head(model.head, target.name, after)
    return Plain(plain, target, tensors, head, classes if head is not None else [])


def _network(model: Uml, config: RunConfig) -> tuple[Transformer, TransformerConfig, list[Tensor]]:
    """The one network with blocks, and the maps behind its pooling, the last one first."""
    target = config.modality(config.target)
    shared, shared_config = model.backbone, config.backbone
    require(
        isinstance(shared, Transformer) and isinstance(shared_config, TransformerConfig),
        f"the shared network is a {type(shared).__name__}, which other libraries have not; --to "
        "safetensors writes any",
    )
    assert isinstance(shared, Transformer) and isinstance(shared_config, TransformerConfig)
    if target.encoder is None:
        return shared, shared_config, []
    encoder, encoder_config = model.encoders[target.name], target.encoder
    is_linear = (
        shared_config.layers == 0
        and not shared_config.input_norm
        and shared_config.positions in ("none", "rotary")
    )
    require(
        isinstance(encoder, Transformer) and is_linear,
        f"{target.name} runs through two networks, its own and the shared one with "
        f"{shared_config.layers} blocks; a plain model is one of them. Train with "
        "--backbone.layers 0 (a shared head alone), or --to safetensors",
    )
    assert isinstance(encoder, Transformer) and isinstance(encoder_config, TransformerConfig)
    if not target.pooled:
        require(
            encoder_config.embedding == 0,
            f"{target.name}.encoder.embedding needs {target.name}.pooled in a plain model",
        )
        encoder_config = dataclasses.replace(encoder_config, pooling=shared_config.pooling)
    own = [module for name, module in model.projections.items() if name == target.name]
    maps = [shared.embedding, shared.input_projection, *own]
    weights = [m.weight.detach().cpu().float() for m in maps if isinstance(m, nn.Linear)]
    return encoder, encoder_config, weights


def _embedding(
    modality: Modality, config: ModalityConfig, network: Transformer
) -> dict[str, Tensor]:
    """The modality's embedding with the network's own input projection and positions in it."""
    state = modality.state_dict().items()
    own = {n: t.detach().cpu().float() for n, t in state if not n.startswith("decoder.")}
    projection = network.input_projection
    if projection is not None:
        weight_DD = projection.weight.detach().cpu().float()
        for name in ("position", "class_token", "stem.bias"):
            if name in own:
                own[name] = own[name] @ weight_DD.T
        stem = own["stem.weight"]
        own["stem.weight"] = (
            stem @ weight_DD.T if isinstance(config, TextConfig) else weight_DD @ stem
        )
    if network.config.positions in ("learned", "sinusoid"):
        table_PD = network.position.detach().cpu().float()
        if "class_token" in own:
            own["class_token"] = own["class_token"] + table_PD[0]
            table_PD = table_PD[1:]
        if "position" in own:
            rows = min(len(table_PD), len(own["position"]))
            table_PD = own["position"][:rows] + table_PD[:rows]
        own["position"] = table_PD
    return own


def _head(head: SharedHead, name: str, after: list[Tensor]) -> Tensor:
    """Scale, W, P and the maps in front of them as one matrix."""
    require(
        head.hidden is None,
        "the head has a hidden layer, so that no matrix gives its logits; --to safetensors "
        "writes it",
    )
    parts = [head.weight.detach().cpu().float()]
    if name in head.scale:
        parts[0] = parts[0] * head.scale[name].detach().cpu()
    if name in head.project:
        project = head.project[name]
        assert isinstance(project, nn.Linear)
        parts.append(project.weight.detach().cpu().float())
    matrix = parts[0]
    for part in [*parts[1:], *after]:
        matrix = matrix @ part
    return matrix
