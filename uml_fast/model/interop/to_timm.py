"""Write an image model as a folder of timm: config.json and model.safetensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.config import require
from uml_fast.modalities.image import ImageConfig
from uml_fast.model.interop.images import timm_entries
from uml_fast.model.interop.names import write_entries
from uml_fast.model.interop.plain import Plain

_BY_EPS = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
"""Architectures of timm by the eps of their norms, which no argument that JSON can hold sets."""
_GATED = "vit_giant_patch14_dinov2"
"""The one with a gated feed-forward network, of eps 1e-6."""


def timm_files(plain: Plain) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json and weights of a timm VisionTransformer.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` loads them, as does
    ``create_model(architecture, checkpoint_path=..., **model_args)`` with what config.json says.

    Raises:
        ConfigError: names what a VisionTransformer of timm has not.
    """
    b, image = plain.backbone, plain.modality
    is_gated = b.activation == "swiglu"
    eps = [e for e in _BY_EPS if abs(e - b.eps) < 1e-12 and not (is_gated and e != 1e-6)]
    token = isinstance(image, ImageConfig) and image.class_token
    reasons = {
        f"inputs of kind {type(image).__name__}": not isinstance(image, ImageConfig),
        "norms behind the blocks' sums (post-norm)": b.norm == "post",
        "RMS norms": b.norm_kind == "rms",
        "no biases": not b.bias,
        "causal attention": b.causal,
        "rotary positions": b.positions == "rotary",
        f"keys of {b.heads_of_keys} of {b.heads} heads": b.heads_of_keys != b.heads,
        f"eps {b.eps} with {b.activation}": not eps,
        f"pooling {b.pooling!r} without a class token": b.pooling == "first" and not token,
        "pooling 'last'": b.pooling == "last",
        "no positions": "position" not in plain.tensors,
    }
    refused = [what for what, is_so in reasons.items() if is_so]
    require(
        not refused,
        f"the model has {'; '.join(refused)}, which a VisionTransformer of timm cannot have; --to "
        "safetensors writes any",
    )
    assert isinstance(image, ImageConfig)
    wide = b.feed_forward * (2 if is_gated else 1)
    arguments: dict[str, Any] = {
        "img_size": [image.height, image.width],
        "patch_size": [image.patch_height, image.patch_width],
        "in_chans": image.channels, "embed_dim": b.width, "depth": b.layers,
        "num_heads": b.heads, "mlp_ratio": (wide + 0.5) / b.width,
        "class_token": image.class_token, "pre_norm": b.input_norm,
        "init_values": 1e-5 if b.layer_scale else None, "fc_norm": False,
        "global_pool": "token" if b.pooling == "first" else "avg",
        "pool_include_prefix": image.class_token and b.pooling == "mean",
    }  # fmt: skip
    if not is_gated:
        arguments["act_layer"] = b.activation
    classes = 0 if plain.head_CD is None else len(plain.head_CD)
    config = {
        "architecture": _GATED if is_gated else _BY_EPS[eps[0]],
        "num_classes": classes,
        "num_features": b.width,
        "model_args": arguments,
        "pretrained_cfg": {
            "mean": plain.tensors["mean"].tolist(),
            "std": plain.tensors["deviation"].tolist(),
            "input_size": [image.channels, image.height, image.width],
            "fixed_input_size": True,
            "num_classes": classes,
            "crop_pct": 1.0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    if plain.classes:
        config["label_names"] = plain.classes
    ours = dict(plain.tensors)
    if b.input_norm:  # timm's patch embedding has no bias where a norm follows
        ours["position"] = ours["position"] + ours["stem.bias"]
    tensors = write_entries(timm_entries(b, image, has_patch_bias=not b.input_norm), ours)
    if plain.head_CD is not None:
        tensors["head.weight"] = plain.head_CD
        tensors["head.bias"] = torch.zeros(classes)
    return config, tensors
