"""Tiny networks of timm and transformers with random weights, saved in a folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from uml_fast.runtime.foreign import import_timm, import_transformers

pytest.importorskip("tokenizers")
transformers = import_transformers()
WORDS = ["a", "photo", "of", "cat", "dog", "the", "big", "small", ".", "has", "wings", "fur"]


def timm_folder(folder: Path, name: str = "vit_tiny_patch16_224", **options: object) -> Path:
    """A timm model."""
    pytest.importorskip("timm")
    timm = import_timm()
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    save_for_hf(model, folder, model_args=options, safe_serialization=True)
    return folder


def saved(folder: Path, kind: str, config: object, **processor: object) -> Path:
    """A model of transformers, with its image statistics where they are given."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config)
    model.save_pretrained(folder)
    if processor:
        transformers.CLIPImageProcessor(**processor).save_pretrained(folder)
    return folder


def tokenizer(folder: Path, special: tuple[str, ...] = ("[CLS]", "[SEP]")) -> Path:
    """A tokenizer of words beside a model: [CLS] words [SEP], or words alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        made.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", eos_token="[SEP]", model_max_length=32
    ).save_pretrained(folder)
    return folder


def bert(folder: Path) -> Path:
    """A BERT with its tokenizer."""
    config = transformers.BertConfig(
        vocab_size=16, hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return tokenizer(saved(folder, "BertModel", config))


def gpt2(folder: Path) -> Path:
    """A GPT-2 with a head over its vocabulary, and its tokenizer."""
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=24, n_layer=2, n_head=2, n_positions=32, eos_token_id=3,
        bos_token_id=3,
    )  # fmt: skip
    return tokenizer(saved(folder, "GPT2LMHeadModel", config), special=())


def llama(folder: Path) -> Path:
    """A Llama with its tokenizer."""
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return tokenizer(saved(folder, "LlamaForCausalLM", config), special=())


def clip(folder: Path) -> Path:
    """A CLIP of two towers, 16 wide in common."""
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": 16, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "max_position_embeddings": 32, "eos_token_id": 3,
            "bos_token_id": 2, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 32, "image_size": 32, "patch_size": 8,
        },
        projection_dim=16,
    )  # fmt: skip
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    return tokenizer(saved(folder, "CLIPModel", config, image_mean=mean, image_std=std))


def dinov2(folder: Path) -> Path:
    """A DINOv2."""
    config = transformers.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
    )  # fmt: skip
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    return saved(folder, "Dinov2Model", config, image_mean=mean, image_std=std)


def smooth_pixels(seed: int, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): an image whose neighbouring pixels are alike."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    planes = [
        127 + 120 * np.sin(rng.uniform(2, 12) * x + rng.uniform(2, 12) * y + c) for c in range(3)
    ]
    return np.stack(planes, 2).astype(np.uint8)
