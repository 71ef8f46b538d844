"""Image networks of timm and transformers: ViT, DeiT, DINO, DINOv2 and CLIP's vision tower."""

from __future__ import annotations

from typing import Any

import torch

from uml_fast.config import ConfigError, require
from uml_fast.kernels.feed_forward import Activation
from uml_fast.modalities.image import ImageConfig
from uml_fast.model.interop.names import Entry, dense, same, zeros
from uml_fast.model.interop.network import Network, activation, pair
from uml_fast.model.interop.stems import class_and_positions, patches, plain_positions
from uml_fast.model.transformer import TransformerConfig
from uml_fast.runtime.foreign import import_timm

TIMM_IGNORED = r"head\..*|mask_token"
TIMM_ACTIVATIONS: dict[str, Activation] = {
    "GELU": "gelu", "ReLU": "relu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh",
    "SiLU": "swiglu",
}  # fmt: skip


def timm_network(architecture: str, arguments: dict[str, Any], source: str) -> Network:
    """The network of a timm VisionTransformer.

    Raises:
        ConfigError: timm has no such model, or it is none that the transformer here can be.
    """
    try:
        timm = import_timm()
    except ModuleNotFoundError as e:
        raise ConfigError(
            f"{source} is a model of timm, which says what {architecture} is: pip install "
            "'uml-fast[models]'"
        ) from e
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained=False, **arguments)
    except (RuntimeError, TypeError, ValueError) as e:
        raise ConfigError(f"{source}: timm cannot build {architecture}: {e}") from e
    require(
        type(model).__name__ == "VisionTransformer",
        f"{source}: {architecture} is a {type(model).__name__}; of timm's models a "
        "VisionTransformer can be read",
    )
    return timm_vit(model, source)


def timm_vit(model: Any, source: str) -> Network:
    """The network of a timm VisionTransformer, whose weights may be on the meta device."""
    block, tokens = model.blocks[0], model.num_prefix_tokens
    has_token = model.cls_token is not None
    pool = model.global_pool
    is_mean = pool == "avg" and (not has_token or model.pool_include_prefix)
    reasons = {
        "register tokens": model.reg_token is not None,
        f"global_pool {pool!r}": not (is_mean or (pool == "token" and has_token)),
        "a norm behind the pooling (fc_norm)": not isinstance(model.fc_norm, torch.nn.Identity),
        "no norm behind the blocks": not isinstance(model.norm, torch.nn.LayerNorm),
        "no positions": model.pos_embed is None,
        f"blocks of kind {type(block).__name__}": type(block).__name__ != "Block",
    }
    refused = [what for what, is_so in reasons.items() if is_so]
    require(not refused, f"{source} has {', '.join(refused)}, which the transformer has not")
    kind = type(block.mlp.act).__name__
    is_gated = type(block.mlp).__name__ == "GluMlp"
    require(
        kind in TIMM_ACTIVATIONS and is_gated == (kind == "SiLU"),
        f"{source}: activation {kind} of {type(block.mlp).__name__} is none of "
        f"{sorted(TIMM_ACTIVATIONS)}",
    )
    height, width = pair(model.patch_embed.img_size)
    patch_height, patch_width = pair(model.patch_embed.patch_size)
    has_scale = hasattr(block.ls1, "gamma")
    backbone = TransformerConfig(
        width=model.embed_dim, layers=len(model.blocks), heads=block.attn.num_heads,
        feed_forward=block.mlp.fc2.in_features, activation=TIMM_ACTIVATIONS[kind],
        eps=model.norm.eps, input_norm=not isinstance(model.norm_pre, torch.nn.Identity),
        layer_scale=1e-5 if has_scale else 0.0, pooling="mean" if is_mean else "first",
    )  # fmt: skip
    image = ImageConfig(
        name="image", height=height, width=width, channels=model.patch_embed.proj.in_channels,
        patch_height=patch_height, patch_width=patch_width, class_token=has_token,
    )  # fmt: skip
    table = model.pos_embed.shape[1]
    positions = table if table == image.patches else table - tokens
    require(
        positions == image.patches,
        f"{source} has {table} positions for {image.patches} patches and {tokens} tokens",
    )
    entries = timm_entries(
        backbone, image, table > image.patches, model.patch_embed.proj.bias is not None,
        block.attn.qkv.bias is not None,
    )  # fmt: skip
    return Network(backbone, image, entries, TIMM_IGNORED, antialias=True)


def timm_entries(
    backbone: TransformerConfig,
    image: ImageConfig,
    has_position_of_token: bool = True,
    has_patch_bias: bool = True,
    has_qkv_bias: bool = True,
) -> list[Entry]:
    """Weights of a timm VisionTransformer."""
    size = (image.patch_height, image.patch_width, image.channels)
    proj = "patch_embed.proj"
    entries = patches(
        f"{proj}.weight", f"{proj}.bias" if has_patch_bias else None, backbone.width, size
    )
    if not image.class_token:
        entries.append(plain_positions("pos_embed"))
    elif has_position_of_token:
        entries.append(class_and_positions("cls_token", "pos_embed"))
    else:
        entries.append(
            Entry(("class_token",), ("cls_token",), lambda t: (t.float().flatten(),), None)
        )
        entries.append(plain_positions("pos_embed"))
    if backbone.input_norm:
        entries += dense("backbone.input_norm", "norm_pre")
    for i in range(backbone.layers):
        ours, theirs = f"backbone.blocks.{i}", f"blocks.{i}"
        entries += dense(f"{ours}.norm1", f"{theirs}.norm1")
        entries += dense(f"{ours}.qkv", f"{theirs}.attn.qkv", bias=has_qkv_bias)
        if not has_qkv_bias:
            entries.append(zeros(f"{ours}.qkv.bias", 3 * backbone.width))
        entries += dense(f"{ours}.out", f"{theirs}.attn.proj")
        entries += dense(f"{ours}.norm2", f"{theirs}.norm2")
        entries += dense(f"{ours}.up", f"{theirs}.mlp.fc1")
        entries += dense(f"{ours}.down", f"{theirs}.mlp.fc2")
        if backbone.layer_scale:
            entries.append(same(f"{ours}.scale1", f"{theirs}.ls1.gamma"))
            entries.append(same(f"{ours}.scale2", f"{theirs}.ls2.gamma"))
    return entries + dense("backbone.final_norm", "norm")


def transformers_vit(config: Any, source: str) -> Network:
    """The network of transformers' ViT or DINOv2, from its configuration."""
    is_dino = config.model_type == "dinov2"
    height, width = pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    require(
        not is_dino or config.apply_layernorm,
        f"{source}: apply_layernorm is off, but the transformer has a norm behind its blocks",
    )
    hidden = int(config.hidden_size * config.mlp_ratio) if is_dino else config.intermediate_size
    is_gated = is_dino and config.use_swiglu_ffn
    if is_gated:
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    backbone = TransformerConfig(
        width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, feed_forward=hidden,
        activation="swiglu" if is_gated else activation(config.hidden_act, source),
        eps=config.layer_norm_eps, layer_scale=config.layerscale_value if is_dino else 0.0,
        pooling="first",
    )  # fmt: skip
    image = ImageConfig(
        name="image", height=height, width=width, channels=config.num_channels,
        patch_height=patch_height, patch_width=patch_width, class_token=True,
    )  # fmt: skip
    entries = dino_entries(backbone, image) if is_dino else vit_entries(backbone, image)
    if not config.qkv_bias:
        entries = _without_qkv_bias(entries, backbone.width)
    ignored = r"classifier\..*|pooler\..*|embeddings\.mask_token"
    prefix = "dinov2." if is_dino else "vit."
    return Network(backbone, image, entries, ignored, prefix)


def _image_stem(backbone: TransformerConfig, image: ImageConfig) -> list[Entry]:
    size = (image.patch_height, image.patch_width, image.channels)
    proj = "embeddings.patch_embeddings.projection"
    return [
        *patches(f"{proj}.weight", f"{proj}.bias", backbone.width, size),
        class_and_positions("embeddings.cls_token", "embeddings.position_embeddings"),
    ]


def vit_entries(backbone: TransformerConfig, image: ImageConfig) -> list[Entry]:
    """Weights of transformers' ViTModel, by their names in files."""
    entries = _image_stem(backbone, image)
    for i in range(backbone.layers):
        ours, theirs = f"backbone.blocks.{i}", f"encoder.layer.{i}"
        entries += dense(f"{ours}.norm1", f"{theirs}.layernorm_before")
        entries += _split_attention(ours, f"{theirs}.attention")
        entries += dense(f"{ours}.norm2", f"{theirs}.layernorm_after")
        entries += dense(f"{ours}.up", f"{theirs}.intermediate.dense")
        entries += dense(f"{ours}.down", f"{theirs}.output.dense")
    return entries + dense("backbone.final_norm", "layernorm")


def dino_entries(backbone: TransformerConfig, image: ImageConfig) -> list[Entry]:
    """Weights of transformers' Dinov2Model, by their names in files."""
    entries = _image_stem(backbone, image)
    is_gated = backbone.activation == "swiglu"
    up, down = ("weights_in", "weights_out") if is_gated else ("fc1", "fc2")
    for i in range(backbone.layers):
        ours, theirs = f"backbone.blocks.{i}", f"encoder.layer.{i}"
        entries += dense(f"{ours}.norm1", f"{theirs}.norm1")
        entries += _split_attention(ours, f"{theirs}.attention")
        entries += dense(f"{ours}.norm2", f"{theirs}.norm2")
        entries += dense(f"{ours}.up", f"{theirs}.mlp.{up}")
        entries += dense(f"{ours}.down", f"{theirs}.mlp.{down}")
        entries.append(same(f"{ours}.scale1", f"{theirs}.layer_scale1.lambda1"))
        entries.append(same(f"{ours}.scale2", f"{theirs}.layer_scale2.lambda1"))
    return entries + dense("backbone.final_norm", "layernorm")


def _split_attention(ours: str, theirs: str) -> list[Entry]:
    parts = [f"{theirs}.attention.{kind}" for kind in ("query", "key", "value")]
    return dense(f"{ours}.qkv", *parts) + dense(f"{ours}.out", f"{theirs}.output.dense")


def _without_qkv_bias(entries: list[Entry], width: int) -> list[Entry]:
    return [zeros(e.ours[0], 3 * width) if e.ours[0].endswith("qkv.bias") else e for e in entries]


def clip_vision(config: Any, source: str, projection: int) -> Network:
    """CLIP's vision tower; ``projection``: width of its projection in the file, 0 without one."""
    height, width = pair(config.image_size)
    patch_height, patch_width = pair(config.patch_size)
    backbone = TransformerConfig(
        width=config.hidden_size, layers=config.num_hidden_layers,
        heads=config.num_attention_heads, feed_forward=config.intermediate_size,
        activation=activation(config.hidden_act, source), eps=config.layer_norm_eps,
        input_norm=True, pooling="first", embedding=projection,
    )  # fmt: skip
    image = ImageConfig(
        name="image", height=height, width=width, channels=config.num_channels,
        patch_height=patch_height, patch_width=patch_width, class_token=True,
    )  # fmt: skip
    size = (patch_height, patch_width, config.num_channels)
    entries = [
        *patches("embeddings.patch_embedding.weight", None, backbone.width, size),
        class_and_positions("embeddings.class_embedding", "embeddings.position_embedding.weight"),
        *dense("backbone.input_norm", "pre_layrnorm"),
        *clip_blocks(backbone),
        *dense("backbone.final_norm", "post_layernorm"),
    ]
    if projection:
        entries.append(same("backbone.embedding.weight", "visual_projection.weight"))
    ignored = r"logit_scale|text_model\..*|text_projection\..*|.*position_ids"
    return Network(backbone, image, entries, ignored, "vision_model.")


def clip_blocks(backbone: TransformerConfig) -> list[Entry]:
    """Weights of the blocks of either tower of CLIP."""
    entries: list[Entry] = []
    for i in range(backbone.layers):
        ours, theirs = f"backbone.blocks.{i}", f"encoder.layers.{i}"
        attention = f"{theirs}.self_attn"
        parts = [f"{attention}.{kind}_proj" for kind in "qkv"]
        entries += dense(f"{ours}.norm1", f"{theirs}.layer_norm1")
        entries += dense(f"{ours}.qkv", *parts) + dense(f"{ours}.out", f"{attention}.out_proj")
        entries += dense(f"{ours}.norm2", f"{theirs}.layer_norm2")
        entries += dense(f"{ours}.up", f"{theirs}.mlp.fc1")
        entries += dense(f"{ours}.down", f"{theirs}.mlp.fc2")
    return entries
