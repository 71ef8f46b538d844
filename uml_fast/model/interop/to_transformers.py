"""Write a model as a folder of transformers: ViTForImageClassification or a BERT.

A BERT's folder holds BertForTokenClassification: AutoModel gives the rows, and the logits of its
first token, or their mean over tokens (as ``pooling`` in config.json says), are the sample's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uml_fast.config import require
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.interop.images import vit_entries
from uml_fast.model.interop.names import Entry, write_entries
from uml_fast.model.interop.network import ACTIVATIONS
from uml_fast.model.interop.plain import Plain
from uml_fast.model.interop.texts import bert_entries

Files = tuple[dict[str, dict[str, Any]], dict[str, Tensor]]


def transformers_files(plain: Plain) -> Files:
    """JSON files by name, and weights, that ``from_pretrained`` loads.

    Raises:
        ConfigError: names what ViTModel or BertModel has not.
    """
    b = plain.backbone
    is_image = isinstance(plain.modality, ImageConfig)
    name = "ViTModel" if is_image else "BertModel"
    reasons = {
        "RMS norms": b.norm_kind == "rms",
        "no biases": not b.bias,
        "causal attention": b.causal,
        "rotary positions": b.positions == "rotary",
        "gated feed-forward networks": b.activation == "swiglu",
        f"keys of {b.heads_of_keys} of {b.heads} heads": b.heads_of_keys != b.heads,
        "no positions": "position" not in plain.tensors,
        f"{b.norm}-norm blocks": b.norm != ("pre" if is_image else "post"),
    }
    if isinstance(plain.modality, ImageConfig):
        reasons["a norm in front of the blocks"] = b.input_norm
        reasons["no class token that is pooled"] = (
            not plain.modality.class_token or b.pooling != "first"
        )
    else:
        reasons["no norm of the embeddings (backbone.input_norm)"] = not b.input_norm
        reasons["pooling 'last'"] = b.pooling == "last"
    refused = [what for what, is_so in reasons.items() if is_so]
    require(
        not refused,
        f"the model has {'; '.join(refused)}, which {name} of transformers cannot have; --to "
        "safetensors writes any" + (", --to timm more than this" if is_image else ""),
    )
    tensors = _without_layer_scale(plain)
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    config: dict[str, Any] = {
        "hidden_size": b.width, "num_hidden_layers": b.layers, "num_attention_heads": b.heads,
        "intermediate_size": b.feed_forward, "hidden_act": names[b.activation],
        "layer_norm_eps": b.eps, "hidden_dropout_prob": b.dropout,
        "attention_probs_dropout_prob": b.dropout, "dtype": "float32",
    }  # fmt: skip
    if plain.head_CD is not None:
        labels = plain.classes or [str(i) for i in range(len(plain.head_CD))]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    if isinstance(plain.modality, ImageConfig):
        return _vit(plain, plain.modality, config, tensors)
    assert isinstance(plain.modality, TextConfig)
    return _bert(plain, config, tensors)


def _vit(
    plain: Plain, image: ImageConfig, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Files:
    config |= {
        "model_type": "vit", "image_size": _size(image.height, image.width),
        "patch_size": _size(image.patch_height, image.patch_width),
        "num_channels": image.channels, "qkv_bias": True,
        "architectures": ["ViTModel" if plain.head_CD is None else "ViTForImageClassification"],
    }  # fmt: skip
    processor = {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "do_rescale": True,
        "rescale_factor": 1 / 255, "do_normalize": True,
        "size": {"height": image.height, "width": image.width},
        "image_mean": plain.tensors["mean"].tolist(),
        "image_std": plain.tensors["deviation"].tolist(),
    }  # fmt: skip
    files = {"config.json": config, "preprocessor_config.json": processor}
    return files, _named(plain, vit_entries(plain.backbone, image), tensors, "vit.")


def _bert(plain: Plain, config: dict[str, Any], tensors: dict[str, Tensor]) -> Files:
    config |= {
        "model_type": "bert", "vocab_size": len(tensors["stem.weight"]), "type_vocab_size": 1,
        "max_position_embeddings": len(tensors["position"]), "pad_token_id": None,
        "pooling": plain.backbone.pooling,
        "architectures": ["BertModel" if plain.head_CD is None else "BertForTokenClassification"],
    }  # fmt: skip
    return {"config.json": config}, _named(plain, bert_entries(plain.backbone), tensors, "bert.")


def _named(
    plain: Plain, entries: list[Entry], tensors: dict[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Weights by transformers' names, with the head where there is one."""
    out = write_entries(entries, tensors)
    if plain.head_CD is None:
        return out
    out = {f"{prefix}{name}": t for name, t in out.items()}
    head = {"classifier.weight": plain.head_CD, "classifier.bias": torch.zeros(len(plain.head_CD))}
    return out | head


def _without_layer_scale(plain: Plain) -> dict[str, Tensor]:
    """The weights with the factors of each branch multiplied into its last map."""
    out = dict(plain.tensors)
    for i in range(plain.backbone.layers if plain.backbone.layer_scale else 0):
        for scale, layer in (("scale1", "out"), ("scale2", "down")):
            factor_D = out.pop(f"backbone.blocks.{i}.{scale}")
            name = f"backbone.blocks.{i}.{layer}"
            out[f"{name}.weight"] = out[f"{name}.weight"] * factor_D[:, None]
            out[f"{name}.bias"] = out[f"{name}.bias"] * factor_D
    return out


def _size(height: int, width: int) -> int | list[int]:
    return height if height == width else [height, width]
