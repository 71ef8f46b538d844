"""Networks of other libraries read as ours give the same features, lengths mixed in one pack."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.foreign_models import (
    NORMAL,
    RNG,
    TEXT,
    VISION,
    assert_same,
    embed,
    images,
    normalised,
    run_of,
    save_timm,
    save_transformers,
    shake,
)
from uml_fast.modalities.image import ImageConfig, to_patches
from uml_fast.modalities.text import TextConfig
from uml_fast.model.interop.load import Pretrained, load_pretrained


def two_sizes(pretrained: Pretrained) -> tuple[ImageConfig, ImageConfig]:
    """The checkpoint's images, and others of another shape."""
    image = pretrained.modality
    assert isinstance(image, ImageConfig)
    other = dataclasses.replace(
        image, name="other", height=3 * image.patch_height, width=5 * image.patch_width
    )
    return image, other


TIMM = {
    "ViT": ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8}),
    "DeiT without classes": ("deit_tiny_patch16_224", {"img_size": 32, "num_classes": 0}),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 56}),
    "DINOv2 giant's swiglu": (
        "vit_giant_patch14_dinov2", {"img_size": 56, "embed_dim": 96, "num_heads": 4},
    ),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {"img_size": 32, "num_classes": 0}),
    "mean of the patches": (
        "vit_tiny_patch16_224",
        {"img_size": 32, "class_token": False, "global_pool": "avg", "fc_norm": False},
    ),
    "no biases of queries": ("vit_tiny_patch16_224", {"img_size": 32, "qkv_bias": False}),
    "class token without position": (
        "vit_tiny_patch16_224", {"img_size": 32, "no_embed_class": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind: str, tmp_path: Path) -> None:
    name, arguments = TIMM[kind]
    arguments = {"depth": 2, "dynamic_img_size": True} | arguments
    model = save_timm(name, arguments, tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    sizes = two_sizes(pretrained)
    pixels = {m.name: images(m.height, m.width) for m in sizes}
    rows = {m.name: list(to_patches(pixels[m.name], m.patch_height, m.patch_width)) for m in sizes}
    found = embed(run_of(*sizes, backbone=pretrained.backbone), rows)
    for m in sizes:
        x = normalised(pixels[m.name], NORMAL["image_mean"], NORMAL["image_std"])  # type: ignore[arg-type]
        assert_same(found[m.name], model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("kind", VISION)
def test_images_of_transformers(kind: str, tmp_path: Path) -> None:
    model: Any = shake(VISION[kind]())
    save_transformers(model, tmp_path, is_image=True)
    tower = "#vision" if kind == "CLIP" else ""
    pretrained = load_pretrained(f"{tmp_path}{tower}")
    sizes = two_sizes(pretrained)
    pixels = {m.name: images(m.height, m.width) for m in sizes}
    rows = {m.name: list(to_patches(pixels[m.name], m.patch_height, m.patch_width)) for m in sizes}
    found = embed(run_of(*sizes, backbone=pretrained.backbone), rows)
    for m in sizes:
        x = normalised(pixels[m.name], NORMAL["image_mean"], NORMAL["image_std"])  # type: ignore[arg-type]
        if kind == "DINOv2" or "giant" in kind:
            expected = model(x).last_hidden_state[:, 0]
        elif kind == "ViT":
            expected = model.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        elif kind == "CLIP":
            pooled = model.vision_model(x, interpolate_pos_encoding=True).pooler_output
            expected = model.visual_projection(pooled)
        else:
            expected = model(x, interpolate_pos_encoding=True).pooler_output
        assert_same(found[m.name], expected)


@pytest.mark.parametrize("kind", TEXT)
def test_texts_of_transformers(kind: str, tmp_path: Path) -> None:
    model: Any = shake(TEXT[kind]())
    save_transformers(model, tmp_path, is_image=False)
    pretrained = load_pretrained(str(tmp_path))
    text = pretrained.modality
    assert isinstance(text, TextConfig)
    ids = [RNG.integers(4, 49, (n, 1)).astype(np.int32) for n in (7, 1, 16, 3)]
    for x in ids:
        x[-1] = 49
    found = embed(run_of(text, backbone=pretrained.backbone), {"text": ids})["text"]
    base = model.base_model
    for row, x in zip(found, ids, strict=True):
        tokens = torch.from_numpy(x[:, 0]).long()[None]
        if kind == "CLIP":
            expected = model(tokens).text_embeds[0]
        else:
            hidden = base(tokens).last_hidden_state[0]
            expected = hidden[0] if "BERT" in kind.upper() else hidden.mean(0)
        assert_same(row, expected)
