"""Models written for timm and transformers: their own loaders give the same features and logits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.foreign_models import (
    NORMAL,
    RNG,
    assert_same,
    images,
    normalised,
    pack_of,
    save_transformers,
    shake,
    timm,
    transformers,
)
from tests.tiny import tiny
from uml_fast import export
from uml_fast.config import ConfigError, ModalityConfig, ObjectiveConfig, RunConfig
from uml_fast.experiment.trained import load_model
from uml_fast.modalities.image import ImageConfig, from_patches, to_patches
from uml_fast.modalities.text import TextConfig
from uml_fast.model.interop.load import load_pretrained
from uml_fast.model.interop.plain import plain_model
from uml_fast.model.interop.to_timm import timm_files
from uml_fast.model.interop.to_transformers import transformers_files
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import Uml
from uml_fast.train import train

MEAN, DEVIATION = [0.3, 0.4, 0.5], [0.2, 0.3, 0.4]
CLASSES = ["ant", "bee", "cow"]
PRE = TransformerConfig(width=24, layers=2, heads=3, feed_forward=40, eps=1e-6)
POST = dataclasses.replace(PRE, norm="post", input_norm=True, pooling="first", eps=1e-12)
IMAGE = ImageConfig(name="image", height=16, width=24, patch_height=8, patch_width=4)
TOKEN = dataclasses.replace(IMAGE, class_token=True)
TEXT = TextConfig(name="text", vocabulary=30, positions=12)


def run_of(target: ModalityConfig, backbone: TransformerConfig, **objective: Any) -> RunConfig:
    options = {"classes": 3, "project": (target.name,), "learn_scale": True} | objective
    return dataclasses.replace(
        tiny(), target=target.name, modalities=(target,), backbone=backbone, precision="fp32",
        objective=ObjectiveConfig(**options),
    )  # fmt: skip


def trained(config: RunConfig) -> Uml:
    """A model whose weights are all in use."""
    torch.manual_seed(0)
    model = Uml(config)
    shake(model)
    if isinstance(config.modality(config.target), ImageConfig):
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            model.modality("image").get_buffer(name).copy_(torch.tensor(values))
    return model


def written(folder: Path, files: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    return export._write_folder(folder, files, tensors, {"recipe": "test"})


def outputs(model: Uml, name: str, samples: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Embeddings and logits of samples in one pack."""
    batch = pack_of({name: samples})
    with torch.no_grad():
        embedding = model(batch).embedding_SE[: len(samples)]
        return embedding, model.logits(embedding, name)


def own_network(image: ImageConfig, encoder: TransformerConfig, pooled: bool) -> RunConfig:
    """A network of the image's own in front of a shared head of other width."""
    shared = TransformerConfig(
        width=20, layers=0, heads=1, feed_forward=1, input_projection=True, pooling="mean"
    )
    return run_of(dataclasses.replace(image, encoder=encoder, pooled=pooled), shared)


replace = dataclasses.replace
TIMM = {
    "mean of patches": run_of(IMAGE, PRE),
    "class token, another eps": run_of(TOKEN, replace(PRE, pooling="first", eps=1e-5)),
    "mean with a class token": run_of(TOKEN, PRE),
    "projection, shared positions": run_of(
        TOKEN, replace(PRE, input_projection=True, positions="learned", pooling="first")
    ),
    "sinusoids, no projection of the head": run_of(
        IMAGE, replace(PRE, positions="sinusoid"), project=(), learn_scale=False
    ),
    "factors, gated": run_of(IMAGE, replace(PRE, activation="swiglu", layer_scale=0.5)),
    "CLIP": run_of(
        TOKEN,
        replace(PRE, activation="quick_gelu", input_norm=True, pooling="first", embedding=10,
                eps=1e-5),
    ),
    "grey": run_of(replace(IMAGE, channels=1), replace(PRE, activation="gelu_tanh")),
    "a network of its own, pooled": own_network(
        TOKEN, replace(PRE, pooling="first", embedding=16), pooled=True
    ),
    "a network of its own": own_network(IMAGE, replace(PRE, pooling="first"), pooled=False),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind: str, tmp_path: Path) -> None:
    config = TIMM[kind]
    if config.modality("image").channels == 1:  # type: ignore[attr-defined]
        pixels = images(16, 24)[..., :1].copy()
    else:
        pixels = images(16, 24)
    model = trained(config) if pixels.shape[-1] == 3 else shake(Uml(config))
    assert isinstance(model, Uml)
    plain = plain_model(model, config, CLASSES)
    timm_config, tensors = timm_files(plain)
    folder = written(tmp_path, {"config.json": timm_config}, tensors)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_path = timm.create_model(
        timm_config["architecture"], checkpoint_path=str(folder / "model.safetensors"),
        num_classes=3, **timm_config["model_args"],
    ).eval()  # fmt: skip
    mean, deviation = (list(theirs.pretrained_cfg[k]) for k in ("mean", "std"))
    x = normalised(pixels, mean, deviation)
    embedding, logits = outputs(model, "image", list(to_patches(pixels, 8, 4)))
    for loaded in (theirs, by_path):
        features = loaded.forward_head(loaded.forward_features(x), pre_logits=True)
        assert_same(loaded(x), logits)
        if features.shape[1] == embedding.shape[1]:
            assert_same(features, embedding)
    assert list(theirs.pretrained_cfg["label_names"]) == CLASSES


@pytest.mark.parametrize("layer_scale", [0.0, 0.5])
def test_vit_of_transformers(layer_scale: float, tmp_path: Path) -> None:
    backbone = replace(PRE, pooling="first", layer_scale=layer_scale, eps=3e-5, activation="relu")
    config = run_of(TOKEN, backbone)
    model = trained(config)
    folder = written(tmp_path, *transformers_files(plain_model(model, config, CLASSES)))
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = images(16, 24)
    prepared = processor(list(pixels), return_tensors="pt")["pixel_values"]
    embedding, logits = outputs(model, "image", list(to_patches(pixels, 8, 4)))
    assert_same(theirs(prepared).logits, logits)
    features = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert_same(features(prepared).last_hidden_state[:, 0], embedding)
    assert theirs.config.id2label == dict(enumerate(CLASSES))


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_bert(pooling: Any, tmp_path: Path) -> None:
    config = run_of(TEXT, replace(POST, pooling=pooling))
    model = trained(config)
    folder = written(tmp_path, *transformers_files(plain_model(model, config, CLASSES)))
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    rows = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    ids = [RNG.integers(0, 30, (n, 1)).astype(np.int32) for n in (3, 12, 1)]
    embedding, logits = outputs(model, "text", ids)
    for x, e, y in zip(ids, embedding, logits, strict=True):
        tokens = torch.from_numpy(x[:, 0]).long()[None]
        found, hidden = theirs(tokens).logits[0], rows(tokens).last_hidden_state[0]
        assert_same(found[0] if pooling == "first" else found.mean(0), y)
        assert_same(hidden[0] if pooling == "first" else hidden.mean(0), e)
    assert theirs.config.pooling == pooling


def test_round_trips_give_identical_tensors(tmp_path: Path) -> None:
    cases = [
        (run_of(TOKEN, replace(PRE, pooling="first", layer_scale=0.1)), "timm"),
        (run_of(IMAGE, PRE), "timm"),
        (run_of(TOKEN, replace(PRE, pooling="first")), "transformers"),
        (run_of(TEXT, POST), "transformers"),
    ]
    for i, (config, to) in enumerate(cases):
        plain = plain_model(trained(config), config, CLASSES)
        if to == "timm":
            timm_config, tensors = timm_files(plain)
            files = {"config.json": timm_config}
        else:
            files, tensors = transformers_files(plain)
        back = load_pretrained(str(written(tmp_path / str(i), files, tensors)))
        assert back.tensors.keys() == plain.tensors.keys()
        for name, tensor in plain.tensors.items():
            assert torch.equal(back.tensors[name], tensor), name
        ours = replace(plain.backbone, layer_scale=0.0)
        assert replace(back.backbone, init_from=None, layer_scale=0.0) == ours


@pytest.mark.parametrize(
    ("target", "backbone", "objective", "to", "message"),
    [
        (IMAGE, replace(POST, input_norm=False), {}, "timm", r"post-norm.*without a class token"),
        (IMAGE, replace(PRE, eps=1e-3), {}, "timm", "eps 0.001"),
        (IMAGE, replace(PRE, causal=True, bias=False), {}, "timm", "no biases; causal attention"),
        (IMAGE, replace(PRE, layers=0), {}, "timm", "at least one block"),
        (IMAGE, PRE, {"head_hidden": 8}, "timm", "hidden layer"),
        (TEXT, POST, {}, "timm", "inputs of kind TextConfig"),
        (IMAGE, PRE, {}, "transformers", "no class token that is pooled"),
        (TEXT, PRE, {}, "transformers", "pre-norm blocks; no norm of the embeddings"),
    ],
)
def test_what_cannot_be_expressed_is_named(
    target: Any, backbone: Any, objective: Any, to: str, message: str
) -> None:
    config = run_of(target, backbone, **objective)
    with pytest.raises(ConfigError, match=message):
        plain = plain_model(trained(config), config, CLASSES)
        timm_files(plain) if to == "timm" else transformers_files(plain)


def test_a_run_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a trained run by the command, and read back by the same as what it was."""
    config = replace(tiny(), steps=2, seeds=1, modes=("uml",), out=tmp_path / "run")
    train(config)
    capsys.readouterr()
    assert export.main([str(tmp_path / "run"), "--to", "timm"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == tmp_path / "run" / "image-timm"
    back = load_pretrained(str(folder)).backbone
    assert back.layers == 1 and back.width == 16
    assert json.loads((folder / "config.json").read_text())["num_classes"] == 3
    with pytest.raises(ConfigError, match="no class token"):
        export.main([str(tmp_path / "run"), "--to", "transformers"])


def test_from_transformers_through_a_run_and_back(tmp_path: Path) -> None:
    """A ViT of theirs, trained here beside unpaired text, is a ViT of theirs again."""
    folder = tmp_path / "start"
    size = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    vit = transformers.ViTConfig(**size, intermediate_size=40, image_size=32, patch_size=8)
    save_transformers(shake(transformers.ViTModel(vit)), folder, is_image=True)
    start = load_pretrained(str(folder))
    base = tiny()
    image = replace(start.modality, encoder=start.backbone, pooled=True)
    modalities = (image, *(m for m in base.modalities if m.name != "image"))
    shared = TransformerConfig(width=16, layers=0, heads=1, feed_forward=1)
    config = replace(
        base, modalities=modalities, backbone=shared, steps=4, seeds=1, modes=("uml",),
        out=tmp_path / "run", precision="fp32",
    )  # fmt: skip
    train(config)
    shutil.rmtree(folder)  # a finished run does not need what it started from
    written_to = export.export(tmp_path / "run", "uml", None, None, "transformers")
    model, _, task = load_model(tmp_path / "run", "uml", 0)
    assert not torch.equal(
        model.encoders["image"].state_dict()["blocks.0.up.weight"],
        start.tensors["backbone.blocks.0.up.weight"],
    )
    rows = [task.test.sample(i) for i in range(4)]
    pixels = np.stack([from_patches(r, image) for r in rows])  # type: ignore[arg-type]
    theirs = transformers.AutoModelForImageClassification.from_pretrained(written_to)
    x = normalised(pixels, NORMAL["image_mean"], NORMAL["image_std"])  # type: ignore[arg-type]
    assert_same(theirs(x).logits, outputs(model, "image", rows)[1])
