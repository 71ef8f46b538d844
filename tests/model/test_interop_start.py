"""Runs that start from checkpoints of other libraries, and checkpoints that do not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.model.foreign_models import (
    RNG,
    TEXT,
    VISION,
    embed,
    images,
    run_of,
    save_timm,
    save_transformers,
    shake,
)
from tests.tiny import tiny
from uml_fast.config import ConfigError, RunConfig
from uml_fast.modalities.image import ImageConfig, to_patches
from uml_fast.modalities.text import TextConfig
from uml_fast.model.interop.initialise import init_from_checkpoints
from uml_fast.model.interop.load import load_pretrained
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, Region, pack_samples

BACKBONE = tiny().backbone


def bert_folder(folder: Path) -> Any:
    model: Any = shake(TEXT["BERT"]())
    save_transformers(model, folder, is_image=False)
    return model


def started(config: RunConfig) -> tuple[Uml, Uml]:
    """The model as it is drawn, and as it starts from the checkpoints."""
    models = []
    for reads in (False, True):
        torch.manual_seed(0)
        models.append(Uml(config))
        if reads:
            init_from_checkpoints(models[1], config)
    return models[0], models[1]


def test_shared_network_from_bert_under_new_patches(tmp_path: Path) -> None:
    """Paper 1.5: the stack of BERT for images; texts of its ids have its embedding, others not."""
    model = bert_folder(tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    image = ImageConfig(name="image", height=16, width=16, patch_height=8, patch_width=8)
    texts = [
        dataclasses.replace(pretrained.modality, name="text"),
        TextConfig(name="other", vocabulary=99),
    ]
    drawn, start = started(run_of(image, *texts, backbone=pretrained.backbone))
    own = start.backbone.state_dict()
    up = model.bert.encoder.layer[1].intermediate.dense.weight
    torch.testing.assert_close(own["blocks.1.up.weight"], up.detach())
    table = model.bert.embeddings.word_embeddings.weight
    torch.testing.assert_close(start.modality("text").state_dict()["stem.weight"], table.detach())
    for name in ("image", "other"):
        for key, value in drawn.modality(name).state_dict().items():
            torch.testing.assert_close(start.modality(name).state_dict()[key], value)


def test_own_network_brings_its_embedding(tmp_path: Path) -> None:
    save_timm("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    image = dataclasses.replace(pretrained.modality, encoder=pretrained.backbone, pooled=True)
    shared = dataclasses.replace(BACKBONE, width=192)
    _, start = started(run_of(image, backbone=shared))
    stem = start.modality("image").state_dict()
    for name in ("stem.weight", "position", "class_token", "mean", "deviation"):
        torch.testing.assert_close(stem[name], pretrained.tensors[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 3, "causal": True}, r"layers 3, not 2"),
        ({"heads": 8}, r"heads 8, not 4; heads_of_keys 8, not 4"),
        ({"eps": 1e-5, "activation": "relu"}, r"activation 'relu', not 'gelu'; eps"),
    ],
)
def test_other_architecture_is_named(change: Any, message: str, tmp_path: Path) -> None:
    bert_folder(tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    backbone = dataclasses.replace(pretrained.backbone, **change)
    with pytest.raises(ConfigError, match=message):
        started(run_of(pretrained.modality, backbone=backbone))


def test_other_embedding_is_named(tmp_path: Path) -> None:
    bert_folder(tmp_path)
    encoder = load_pretrained(str(tmp_path)).backbone
    text = TextConfig(name="text", vocabulary=99, encoder=encoder)
    with pytest.raises(ConfigError, match=r"text is texts of 99 ids; .* takes texts of 50 ids"):
        started(run_of(text, backbone=dataclasses.replace(BACKBONE, width=32)))


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bert_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["bert.encoder.layer.7.strange"] = torch.zeros(1)
    del tensors["bert.encoder.layer.0.intermediate.dense.bias"]
    tensors["bert.embeddings.LayerNorm.weight"] = torch.zeros(5)
    save_file(tensors, path)
    with pytest.raises(ConfigError) as e:
        load_pretrained(str(tmp_path))
    assert "missing: encoder.layer.0.intermediate.dense.bias" in str(e.value)
    assert "unexpected: encoder.layer.7.strange" in str(e.value)
    assert "embeddings.LayerNorm.weight [5] make backbone.input_norm.weight [5]" in str(e.value)
    assert "the configuration says [32]" in str(e.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_pickles_are_not_opened(name: str, tmp_path: Path) -> None:
    bert_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ConfigError, match=r"is pickled.*convert it"):
        load_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match="is pickled"):
        load_pretrained(f"vit_tiny_patch16_224={tmp_path / name}")


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder /no/where"):
        load_pretrained("/no/where")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    torch.save({}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"cannot read .* as safetensors"):
        load_pretrained(str(tmp_path))
    bert_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="type 't5'"):
        load_pretrained(str(tmp_path))
    save_timm("vit_base_patch16_siglip_224", {"img_size": 32, "depth": 1}, tmp_path)
    with pytest.raises(ConfigError, match="global_pool 'map'"):
        load_pretrained(str(tmp_path))


def test_timm_file_by_architecture(tmp_path: Path) -> None:
    model = save_timm("vit_tiny_patch16_224", {}, tmp_path)
    found = load_pretrained(f"vit_tiny_patch16_224={tmp_path / 'model.safetensors'}")
    torch.testing.assert_close(
        found.tensors["backbone.final_norm.weight"], model.norm.weight.detach()
    )


def test_class_token_learns_and_is_pooled() -> None:
    """A class token has a gradient, and a sample's embedding depends on no other sample."""
    image = ImageConfig(
        name="image", height=16, width=16, patch_height=8, patch_width=8, class_token=True
    )
    backbone = dataclasses.replace(BACKBONE, pooling="first", dropout=0.0)
    config = run_of(image, TextConfig(name="text", vocabulary=20), backbone=backbone)
    rows = list(to_patches(images(16, 16), 8, 8))
    text = [RNG.integers(0, 20, (5, 1)).astype(np.int32)]
    together = embed(config, {"image": rows, "text": text})["image"]
    alone = embed(config, {"image": rows[1:2], "text": text})["image"]
    torch.testing.assert_close(together[1], alone[0])
    model = Uml(config)
    region = Region(name="image", rows=8, slots=4, row_elems=192, dtype="uint8", max_len=4)
    batch = pack_samples(Layout((region,)), {"image": rows[:2]})
    model(batch).embedding_SE[:2].square().sum().backward()
    token = model.modality("image").class_token
    assert token is not None and token.grad is not None and token.grad.any()
    with pytest.raises(ConfigError, match="class_token"):
        image.build(16, 16, decode=True)


def test_network_without_its_weights(tmp_path: Path) -> None:
    """What a checkpoint is needs its weights' headers at most."""
    model = shake(VISION["CLIP"]())
    save_transformers(model, tmp_path, is_image=True)
    source = f"{tmp_path}#vision"
    known, whole = load_pretrained(source, weights=False), load_pretrained(source)
    assert known.tensors == {} and whole.tensors
    assert (known.backbone, known.modality) == (whole.backbone, whole.modality)
    assert known.backbone.embedding == 24
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot read"):
        load_pretrained(source, weights=False)
