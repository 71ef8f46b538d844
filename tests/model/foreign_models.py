"""Small models of timm and transformers with random weights, saved as those libraries do."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import tiny
from uml_fast.config import ModalityConfig, RunConfig
from uml_fast.model.interop.initialise import init_from_checkpoints
from uml_fast.model.uml import Uml
from uml_fast.packing.pack import Layout, PackedBatch, Region, pack_samples
from uml_fast.runtime.foreign import import_timm, import_transformers

if missing := [n for n in ("timm", "transformers") if importlib.util.find_spec(n) is None]:
    pytest.skip(f"not installed: {missing}", allow_module_level=True)


class _WhenUsed:
    """A library that is imported when a test uses it, not when tests are collected."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self._load = load

    def __getattr__(self, name: str) -> Any:
        return getattr(self._load(), name)


timm, transformers = _WhenUsed(import_timm), _WhenUsed(import_transformers)
RNG = np.random.default_rng(0)
SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
IMAGE = SMALL | {"image_size": 32, "patch_size": 8}
NORMAL = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3], "do_normalize": True}


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that are far from their initial zeros and ones, so that none can be left out."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.3 if p.ndim == 1 else 0.05))
    return model.eval()


def run_of(*modalities: ModalityConfig, backbone: Any) -> RunConfig:
    base = tiny()
    return dataclasses.replace(
        base, target=modalities[0].name, modalities=modalities, backbone=backbone, precision="fp32"
    )


def embed(config: RunConfig, samples: dict[str, list[np.ndarray]]) -> dict[str, Tensor]:
    """Embeddings of samples of each modality, all in one pack with padding."""
    torch.manual_seed(0)
    model = Uml(config)
    init_from_checkpoints(model, config)
    batch = pack_of({m.name: samples[m.name] for m in config.modalities})
    with torch.no_grad():
        found = model.eval()(batch).embedding_SE
    return {
        r.name: found[batch.layout.slot_slice(i)][: len(samples[r.name])]
        for i, r in enumerate(batch.layout.regions)
    }


def pack_of(samples: dict[str, list[np.ndarray]]) -> PackedBatch:
    """A pack of all samples, with some padding behind each modality."""
    regions = [
        Region(
            name=name, rows=sum(map(len, given)) + 5, slots=len(given) + 8,
            row_elems=given[0].shape[1], dtype=given[0].dtype.name, max_len=max(map(len, given)),
        )
        for name, given in samples.items()
    ]  # fmt: skip
    return pack_samples(Layout(tuple(regions)), samples)


def images(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (3, height, width, 3)).astype(np.uint8)


def normalised(pixels: np.ndarray, mean: list[float], deviation: list[float]) -> Tensor:
    x = torch.from_numpy(pixels).float() / 255
    return ((x - torch.tensor(mean)) / torch.tensor(deviation)).permute(0, 3, 1, 2)


def save_transformers(model: Any, folder: Path, is_image: bool) -> Path:
    model.save_pretrained(folder)
    if is_image:
        (folder / "preprocessor_config.json").write_text(json.dumps(NORMAL))
    return folder


def save_timm(name: str, arguments: dict[str, Any], folder: Path) -> Any:
    from safetensors.torch import save_file

    model = shake(timm.create_model(name, pretrained=False, **arguments))
    config = {
        "architecture": name, "num_classes": model.num_classes, "model_args": arguments,
        "pretrained_cfg": {"mean": NORMAL["image_mean"], "std": NORMAL["image_std"]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def assert_same(found: Tensor, expected: Tensor) -> None:
    scale = expected.detach().abs().max()
    torch.testing.assert_close(found / scale, expected.detach() / scale, rtol=1e-4, atol=1e-5)


TEXT = {
    "BERT": lambda: transformers.BertForMaskedLM(
        transformers.BertConfig(**SMALL, vocab_size=50, max_position_embeddings=20)
    ),
    "RoBERTa": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SMALL, vocab_size=50, max_position_embeddings=20)
    ),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=20)
    ),
    "Llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SMALL, vocab_size=50, num_key_value_heads=2)
    ),
    "Llama with biases": lambda: transformers.LlamaModel(
        transformers.LlamaConfig(**SMALL, vocab_size=50, attention_bias=True, mlp_bias=True)
    ),
    "CLIP": lambda: transformers.CLIPTextModelWithProjection(
        transformers.CLIPTextConfig(
            **SMALL, vocab_size=50, max_position_embeddings=20, eos_token_id=49, projection_dim=24
        )
    ),
}  # fmt: skip

VISION = {
    "ViT": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)),
    "DINOv2": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(**{k: v for k, v in IMAGE.items() if k != "intermediate_size"})
    ),
    "DINOv2 giant's swiglu": lambda: transformers.Dinov2Model(
        transformers.Dinov2Config(
            **{k: v for k, v in IMAGE.items() if k != "intermediate_size"}, use_swiglu_ffn=True
        )
    ),
    "CLIP": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config=SMALL | {"vocab_size": 50, "eos_token_id": 49}, vision_config=IMAGE,
            projection_dim=24,
        )
    ),
    "CLIP's tower alone": lambda: transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(**IMAGE)
    ),
}  # fmt: skip
