"""Transfer by initialisation and fine-tuning, on small checkpoints that are made here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from torch import Tensor

from tests.data.made_files import image, run, write
from tests.model.foreign_models import IMAGE, TEXT, save_timm, shake, transformers
from uml_fast import export, train
from uml_fast.cli import parse
from uml_fast.config import ConfigError, RunConfig
from uml_fast.data.loading.loader import Loader
from uml_fast.model.interop.load import load_pretrained
from uml_fast.model.transformer import TransformerConfig
from uml_fast.model.uml import Uml
from uml_fast.training import checkpoint
from uml_fast.training.start import build_model, plan_mix, resolve, shares_of

tokenizers = pytest.importorskip("tokenizers")

CLASSES = ("cat", "dog", "owl")
SMALL_IMAGES = [
    "--modalities.0.height", "32", "--modalities.0.width", "32",
    "--modalities.0.patch-height", "8", "--modalities.0.patch-width", "8",
]  # fmt: skip
SHORT = [
    "--mix.batch", "8", "--steps", "6", "--seeds", "2", "--eval.every", "3", "--precision", "fp32",
    "--checkpoint.every", "3", "--optim.warmup-steps", "2", "--log-every", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of images, text features and token ids of three classes, and small checkpoints."""
    root = tmp_path_factory.mktemp("transfer")
    for c, name in enumerate(CLASSES):
        for i in range(12):
            split = ("train", "train", "train", "train", "val", "test")[i % 6]
            write(root / f"photos/{split}/{name}/{i}.jpg", image(100 * c + i, (32, 32)))
    run("images", root / "photos", root / "images")
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(3), 7)
    features = (rng.normal(size=(21, 24)) + label[:, None]).astype(np.float32)
    names = np.array(CLASSES)[label]
    np.savez(root / "text.npz", features=features, labels=names)
    run("features", root / "text.npz", root / "features", "--split", "train=1")
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", *CLASSES])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(root / "tokenizer.json"))
    prompts = {c: [f"a {c}", f"the very {c}", c] for c in CLASSES}
    write(root / "prompts.json", json.dumps(prompts))
    more = ("--tokenizer", str(root / "tokenizer.json"), "--split", "train=1")
    run("tokens", root / "prompts.json", root / "tokens", *more)
    for name, make in TEXT.items():
        shake(make()).save_pretrained(root / name)
    shake(transformers.ViTModel(transformers.ViTConfig(**IMAGE))).save_pretrained(root / "ViT")
    (root / "timm").mkdir()
    save_timm(
        "vit_tiny_patch16_224",
        {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3},
        root / "timm",
    )
    return root


def asked(name: str, place: Path, *more: str) -> RunConfig:
    config = parse([name, "--data.image", str(place / "images"), *SMALL_IMAGES, *SHORT, *more], "t")
    assert isinstance(config, RunConfig)
    return config


def transfer(place: Path, kind: str, *more: str) -> RunConfig:
    start = ("--backbone.init-from", str(place / kind), "--objective.head-hidden", "16")
    return asked("transfer", place, *start, *more)


def built(config: RunConfig, mode: str) -> Uml:
    given = config.for_mode(mode)
    return build_model(given, config.load(0, mode), 0)


def weights(folder: Path, trial: str, step: int) -> dict[str, Tensor]:
    """Of the network in a checkpoint, by the names that it has there."""
    path = folder / f"trials/{trial}/checkpoints/step-{step:09d}.safetensors"
    tensors = checkpoint.load(path).tensors
    head = "model/backbone."
    return {n.removeprefix(head): t for n, t in tensors.items() if n.startswith(head)}


@pytest.mark.parametrize("kind", ["BERT", "GPT-2", "Llama", "ViT"])
def test_blocks_are_the_checkpoints_and_all_else_is_the_same_draw(place: Path, kind: str) -> None:
    config = resolve(transfer(place, kind))
    ours, random = built(config, "pretrained"), built(config, "random")
    theirs = {
        n.removeprefix("backbone."): t
        for n, t in load_pretrained(str(place / kind)).tensors.items()
        if n.startswith("backbone.")
    }
    state = ours.backbone.state_dict()
    assert len(theirs) > 12 and all(torch.equal(state[n], t) for n, t in theirs.items())
    drawn = random.backbone.state_dict()
    assert drawn.keys() == state.keys()
    assert not any(torch.equal(drawn[n], t) for n, t in theirs.items() if n.endswith("qkv.weight"))
    assert not config.backbone.causal  # type: ignore[attr-defined]
    own, other = ours.state_dict(), random.state_dict()
    new = [n for n in own if n.startswith(("modalities.", "head."))]
    if kind == "ViT":  # its embedding of patches comes along
        new = [n for n in new if n.startswith("head.")]
    assert len(new) >= 3 and all(torch.equal(own[n], other[n]) for n in new)


def test_one_command_compares_pretrained_with_random_blocks(place: Path, tmp_path: Path) -> None:
    """Frozen until step 3: the paper's regimes (a) and (b)."""
    config = transfer(place, "BERT", "--backbone.unfreeze-at", "3", "--out", str(tmp_path / "run"))
    train.train(config)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["compared"] == ["random", "pretrained"]
    (row,) = summary["comparison"]
    assert row["n"] == 2 and "pretrained" in row["verdict"] and "random" in row["verdict"]
    assert "UML" not in row["verdict"]
    page = (tmp_path / "run/report.html").read_text()
    assert "Random against pretrained" in page
    out = tmp_path / "image.safetensors"
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    with safetensors.safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["trial"])["mode"] == "pretrained"
    bert = load_pretrained(str(place / "BERT")).tensors
    for trial in ("pretrained-0", "random-0"):
        before, after = (weights(tmp_path / "run", trial, step) for step in (3, 6))
        start = built(resolve(config), trial[:-2]).backbone.state_dict()
        assert all(torch.equal(before[n], t) for n, t in start.items())
        assert not any(torch.equal(after[n], t) for n, t in start.items() if "weight" in n)
        from_bert = [n for n in before if torch.equal(before[n], bert[f"backbone.{n}"])]
        assert (len(from_bert) == len(before)) == (trial == "pretrained-0")


def test_pretrained_needs_weights(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"--backbone\.init-from FOLDER"):
        resolve(asked("transfer", place))
    with pytest.raises(ConfigError, match="unimodal, uml or both; else random, pretrained"):
        dataclasses.replace(transfer(place, "BERT"), modes=("uml", "random"))


def finetune(place: Path, *more: str) -> RunConfig:
    text = ("--data.text", str(place / "features"))
    start = ("--modalities.0.encoder.init-from", str(place / "timm"))
    return asked("finetune", place, *text, *start, *more)


def test_fine_tuning_starts_as_the_paper_says(place: Path) -> None:
    """logits = W P v with v of the image network; W rows: normalised class means of the texts."""
    config = resolve(finetune(place))
    assert config.backbone.width == 24 and config.modalities[0].share == 16.0
    model = built(config, "uml")
    table = np.load(place / "text.npz")
    labels, features = table["labels"], torch.from_numpy(table["features"])
    means = torch.stack([features[torch.from_numpy(labels == c)].mean(0) for c in CLASSES])
    assert model.head is not None
    torch.testing.assert_close(model.head.weight, torch.nn.functional.normalize(means, dim=1))
    assert model.projections["image"].weight.shape == (24, 48)
    assert not list(model.modality("text").parameters())
    alone = built(config, "unimodal")
    assert alone.head is not None and not alone.projections
    assert alone.head.weight.shape == (3, 48)
    theirs = load_pretrained(str(place / "timm")).tensors
    for found in (model, alone):
        state = found.encoders["image"].state_dict()
        assert all(torch.equal(t, theirs[f"backbone.{n}"]) for n, t in state.items())
        assert torch.equal(found.modality("image").stem.weight, theirs["stem.weight"])


@pytest.mark.parametrize(("ratio", "texts"), [("1", 8), ("0.5", 4), ("2", 16)])
def test_ratio_is_of_texts_to_images(place: Path, ratio: str, texts: int) -> None:
    config = resolve(finetune(place, "--modalities.1.share", ratio))
    task = config.load(0, "uml")
    mix, layouts = plan_mix(config, "uml", task, 0)
    loader = Loader(task.train, layouts, mix, 0, shares=shares_of(config), target="image")
    seen = np.zeros(2)
    with loader:
        for _ in range(16):
            batch, _ = next(loader)
            modality = batch.modality_S[batch.sample_S >= 0]
            seen += [int((modality == m).sum()) for m in (0, 1)]
    assert seen[0] / 16 == 8 and seen[1] / 16 == pytest.approx(texts, rel=0.05)


def test_fine_tuning_trains_the_image_network_and_keeps_the_best(
    place: Path, tmp_path: Path
) -> None:
    train.train(finetune(place, "--out", str(tmp_path / "run"), "--seeds", "1", "--seed", "0"))
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {r["mode"] for r in summary["results"]} == {"unimodal", "uml"}
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["lr"] for line in lines if '"uml"' in line]
    assert rates[:3] == pytest.approx([1e-5, 2.5e-5, 5e-5])
    path = tmp_path / "run/trials/uml-0/checkpoints/step-000000006.safetensors"
    tensors = checkpoint.load(path).tensors
    theirs = load_pretrained(str(place / "timm")).tensors
    assert any(n.startswith("best/encoders.image.") for n in tensors)
    name = "blocks.0.qkv.weight"
    assert not torch.equal(tensors[f"model/encoders.image.{name}"], theirs[f"backbone.{name}"])


@pytest.mark.parametrize("frozen", [True, False])
def test_text_network_is_trained_or_left_as_it_is(
    place: Path, tmp_path: Path, frozen: bool
) -> None:
    """Table 29: BERT on token ids beside the images, its class token is the text's vector."""
    more = ("--modalities.1.encoder.freeze",) if frozen else ()
    config = asked(
        "finetune-text", place, "--data.text", str(place / "tokens"), "--modes", "uml",
        "--modalities.0.encoder.init-from", str(place / "timm"), "--seeds", "1", "--seed", "0",
        "--modalities.1.encoder.init-from", str(place / "BERT"), "--out", str(tmp_path / "run"),
        *more,
    )  # fmt: skip
    whole = resolve(config)
    text: Any = whole.modalities[1]
    assert (whole.backbone.width, text.vocabulary, text.positions) == (32, 50, 20)
    assert isinstance(text.encoder, TransformerConfig) and text.encoder.pooling == "first"
    train.train(config)
    path = tmp_path / "run/trials/uml-0/checkpoints/step-000000006.safetensors"
    tensors = checkpoint.load(path).tensors
    theirs = load_pretrained(str(place / "BERT")).tensors
    same = [
        torch.equal(tensors[f"model/{ours}"], theirs[name])
        for ours, name in (
            ("encoders.text.blocks.1.up.weight", "backbone.blocks.1.up.weight"),
            ("modalities.text.stem.weight", "stem.weight"),
        )
    ]
    assert same == [frozen, frozen]


def test_what_does_not_fit_is_named(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"text: .*tokens holds tokens; features are wanted"):
        resolve(finetune(place, "--data.text", str(place / "tokens")))
    with pytest.raises(ConfigError, match=r"image: .*BERT is a network of texts"):
        resolve(finetune(place, "--modalities.0.encoder.init-from", str(place / "BERT")))
