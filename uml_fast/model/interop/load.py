"""Read a checkpoint of timm or transformers as a configuration and weights of ours."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uml_fast.config import ConfigError, ModalityConfig, require
from uml_fast.modalities.image import ImageConfig
from uml_fast.model.interop.checkpoint import Checkpoint, open_checkpoint
from uml_fast.model.interop.images import clip_vision, timm_network, transformers_vit
from uml_fast.model.interop.names import read_entries, without_prefix
from uml_fast.model.interop.network import Network
from uml_fast.model.interop.texts import bert, clip_text, gpt2, llama
from uml_fast.model.transformer import TransformerConfig
from uml_fast.runtime.foreign import import_transformers

logger = logging.getLogger("uml_fast")

_FAMILIES = {
    "vit": transformers_vit, "dinov2": transformers_vit, "bert": bert, "roberta": bert,
    "gpt2": gpt2, "llama": llama,
}  # fmt: skip
_CLIP = ("clip", "clip_vision_model", "clip_text_model")


@dataclass(frozen=True, slots=True)
class Pretrained:
    """A network of another library."""

    backbone: TransformerConfig
    """The network; its ``init_from`` is where it was read."""
    modality: ModalityConfig
    """The embedding of images (ImageConfig) or texts (TextConfig) in front of it."""
    tensors: dict[str, Tensor]
    """fp32: ``backbone.*``, ``stem.*``, ``position``, ``class_token``, ``mean``, ``deviation``.
    Empty where they were not asked for."""
    antialias: bool
    """Whether its library resamples positions with antialiasing."""


def load_pretrained(source: str, weights: bool = True) -> Pretrained:
    """A network and its weights from a local folder or the Hugging Face hub.

    Args:
        source: what ``open_checkpoint`` takes; behind it ``#vision`` or ``#text`` for a tower of
            CLIP.
        weights: False: what network it is, without reading them.

    Raises:
        ConfigError: no such checkpoint, a pickled one, a network that the transformer cannot be, or
            weights that do not fit: lists names and shapes.
    """
    name, _, tower = source.partition("#")
    found = open_checkpoint(name)
    network = _network(found, tower)
    backbone = dataclasses.replace(network.backbone, init_from=source)
    tensors = _weights(found, network) if weights else {}
    return Pretrained(backbone, network.modality, tensors, network.antialias)


def _weights(found: Checkpoint, network: Network) -> dict[str, Tensor]:
    theirs = without_prefix(found.tensors(), network.prefix)
    theirs = {_modern(name): t for name, t in theirs.items()}
    ours = read_entries(network.entries, theirs, _shapes(network), network.ignored, found.source)
    if isinstance(network.modality, ImageConfig):
        statistics = found.image_statistics()
        if statistics is None:
            logger.warning(
                "%s has no mean and deviation of pixels: those of the data serve", found.source
            )
        else:
            ours["mean"], ours["deviation"] = (torch.tensor(x) for x in statistics)
    return ours


def _network(found: Checkpoint, tower: str) -> Network:
    config, source = found.config, found.source
    kind = config.get("model_type")
    require(not tower or kind in _CLIP, f"{source} is no CLIP model, so it has no tower {tower!r}")
    if "architecture" in config:
        arguments = dict(config.get("model_args", {}))
        arguments["num_classes"] = config.get("num_classes", 0)
        if "global_pool" in config:
            arguments["global_pool"] = config["global_pool"]
        return timm_network(config["architecture"], arguments, source)
    if kind not in _FAMILIES and kind not in _CLIP:
        raise ConfigError(
            f"{source} is a model of type {kind!r}; {', '.join([*_FAMILIES, *_CLIP])} and timm's "
            "VisionTransformer can be read"
        )
    theirs = _transformers_config(config, source)
    if kind in _FAMILIES:
        return _FAMILIES[kind](theirs, source)
    return _clip(theirs, found, tower)


def _clip(theirs: Any, found: Checkpoint, tower: str) -> Network:
    if theirs.model_type == "clip":
        require(
            tower in ("vision", "text"),
            f"{found.source} has two towers; say {found.source}#vision or {found.source}#text",
        )
        theirs = theirs.vision_config if tower == "vision" else theirs.text_config
    is_vision = theirs.model_type == "clip_vision_model"
    name = "visual_projection.weight" if is_vision else "text_projection.weight"
    width = found.shapes().get(name, [0])[0]
    return (clip_vision if is_vision else clip_text)(theirs, found.source, width)


def _transformers_config(config: dict[str, Any], source: str) -> Any:
    """With the defaults that transformers gives what the file leaves out."""
    try:
        transformers = import_transformers()
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"{source} is a model of transformers, which completes its configuration: pip install "
            "'uml-fast[models]'"
        ) from e
    values = dict(config)
    try:
        return transformers.AutoConfig.for_model(values.pop("model_type"), **values)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"{source}: transformers refuses its config.json: {e}") from e


def _modern(name: str) -> str:
    """Names of norms as they have been since BERT's first files."""
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(f"LayerNorm{old}"):
            return name.removesuffix(old) + new
    return name


def _shapes(network: Network) -> dict[str, torch.Size]:
    """Shapes of the weights of the network and its embedding."""
    with torch.device("meta"):
        backbone = network.backbone.build()
        stem = network.modality.build(network.backbone.width, network.backbone.width, False)
    shapes = {f"backbone.{name}": t.shape for name, t in backbone.state_dict().items()}
    return shapes | {name: t.shape for name, t in stem.state_dict().items()}
