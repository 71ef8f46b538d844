"""Encoders give the features that timm and transformers give, and refuse what they cannot read."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.encoders import local_models
from tests.encoders.local_models import smooth_pixels, transformers
from uml_fast.data.decoding.decode import DecodeError
from uml_fast.data.source import DataError, say_once
from uml_fast.encoders.audio import AudioEncoder
from uml_fast.encoders.image import ImageEncoder, crop
from uml_fast.encoders.text import TextEncoder
from uml_fast.runtime.foreign import import_timm

CPU = torch.device("cpu")
TEXTS = ["a photo of a cat .", "dog", "the big dog has wings and fur ."]
PAYLOADS = [t.encode() for t in TEXTS]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("bert", "gpt2", "llama", "clip", "dinov2"):
        getattr(local_models, name)(root / name)
    options = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    local_models.timm_folder(root / "timm", **options)
    return root


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("height, width", [(60, 97), (97, 60), (40, 40), (20, 333), (31, 30)])
def test_crop_is_resize_then_centre_crop(height: int, width: int) -> None:
    pixels, size = smooth_pixels(1, height, width), 32
    short = min(height, width)
    new = (size * width // short, size * height // short)
    whole = np.asarray(Image.fromarray(pixels).resize(new, Image.Resampling.BICUBIC)).astype(int)
    top, left = round((new[1] - size) / 2), round((new[0] - size) / 2)
    expected = whole[top : top + size, left : left + size]
    assert np.abs(crop(pixels, size).astype(int) - expected).max() <= 1


def timm_features(folder: Path, payloads: list[bytes], size: int) -> torch.Tensor:
    """What timm's own inference gives."""
    timm = import_timm()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=size).eval()
    model.reset_classifier(0)
    transform = timm.data.create_transform(
        (3, size, size), interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0
    )
    images = [transform(Image.open(io.BytesIO(p))) for p in payloads]
    with torch.inference_mode():
        return model(torch.stack(images))


@pytest.mark.parametrize("size", [32, 48])
def test_timm_images(models: Path, size: int) -> None:
    payloads = [png(smooth_pixels(i, 60, 50 + i)) for i in range(3)]
    encoder = ImageEncoder(str(models / "timm"), CPU, torch.float32, size=size)
    got = encoder.encode(encoder.prepare(payloads))
    expected = timm_features(models / "timm", payloads, size)
    assert got.shape == (3, encoder.width) == expected.shape
    # a pixel may be rounded the other way
    assert (got - expected).norm() < 2e-3 * expected.norm()
    half = ImageEncoder(str(models / "timm"), CPU, torch.bfloat16, size=size)
    in_bf16 = half.encode(half.prepare(payloads))
    assert in_bf16.dtype == torch.float32
    assert (torch.cosine_similarity(in_bf16, expected) > 0.999).all()


def test_transformers_images(models: Path) -> None:
    pixels = [smooth_pixels(i, 32, 32) for i in range(3)]
    payloads = [png(p) for p in pixels]
    x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    for name, kind, pool, pick in (
        ("clip", "CLIPModel", "auto", lambda m, x: m.visual_projection(
            m.vision_model(pixel_values=x).pooler_output)),
        ("dinov2", "Dinov2Model", "auto", lambda m, x: m(x).last_hidden_state[:, 0]),
        ("dinov2", "Dinov2Model", "mean", lambda m, x: m(x).last_hidden_state[:, 1:].mean(1)),
    ):  # fmt: skip
        encoder = ImageEncoder(str(models / name), CPU, torch.float32, size=32, pool=pool)
        mean, std = (torch.tensor(encoder.facts["transform"][k]) for k in ("mean", "std"))
        model = getattr(transformers, kind).from_pretrained(models / name).eval()
        with torch.inference_mode():
            expected = pick(model, (x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(encoder.encode(encoder.prepare(payloads)), expected)


def test_statistics_that_nobody_names_are_asked_for(models: Path, tmp_path: Path) -> None:
    bare = local_models.dinov2(tmp_path / "bare")
    for path in bare.glob("*processor_config.json"):
        path.unlink()
    with pytest.raises(DataError, match="choose with --norm clip"):
        ImageEncoder(str(bare), CPU, torch.float32, size=32)
    encoder = ImageEncoder(str(bare), CPU, torch.float32, size=32, norm="clip")
    other = ImageEncoder(str(bare), CPU, torch.float32, size=32, norm="imagenet")
    assert encoder.facts["weights"] == other.facts["weights"] and encoder.facts != other.facts


def test_broken_images_are_named_one_by_one(models: Path) -> None:
    encoder = ImageEncoder(str(models / "timm"), CPU, torch.float32, size=32)
    good = png(smooth_pixels(0, 40, 40))
    found = encoder.prepare([good, b"\xff\xd8 no image", good])
    assert isinstance(found[1], DecodeError) and "broken JPEG" in str(found[1])
    assert np.array_equal(found[0], found[2]) and found[0].shape == (32, 32, 3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "clip"])
def test_texts(models: Path, name: str) -> None:
    """Pooling is the paper's, and a text's features do not depend on its neighbours."""
    encoder = TextEncoder(str(models / name), CPU, torch.float32)
    got = encoder.encode(encoder.prepare(PAYLOADS))
    tokens = transformers.AutoTokenizer.from_pretrained(models / name)
    kind = "CLIPTextModelWithProjection" if name == "clip" else "AutoModel"
    options = {}
    if name == "clip":
        options["config"] = transformers.CLIPConfig.from_pretrained(models / name).text_config
        options["config"].projection_dim = 16
    model = getattr(transformers, kind).from_pretrained(models / name, **options).eval()
    for i, text in enumerate(TEXTS):
        with torch.inference_mode():
            out = model(**tokens(text, return_tensors="pt", return_token_type_ids=False))
        if name == "clip":
            expected = out.text_embeds[0]
        elif name == "bert":
            expected = out.last_hidden_state[0, 0]
        else:
            expected = out.last_hidden_state[0].mean(0)
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-5)
    half = TextEncoder(str(models / name), CPU, torch.bfloat16)
    assert (torch.cosine_similarity(half.encode(half.prepare(PAYLOADS)), got) > 0.99).all()


def test_long_texts_are_cut_and_counted(models: Path) -> None:
    encoder = TextEncoder(str(models / "bert"), CPU, torch.float32)
    assert encoder.cut == 0
    ids = encoder.prepare([b"dog " * 100, b"cat"])
    assert encoder.cut == 1 and len(ids[0]) == 32 and ids[0][0] == 2 and ids[0][-1] == 3
    assert encoder.encode(ids).shape == (2, 24)


def test_poolings_that_a_network_does_not_have(models: Path) -> None:
    with pytest.raises(DataError, match="--pool eot is CLIP's"):
        TextEncoder(str(models / "bert"), CPU, torch.float32, pool="eot")
    mean = TextEncoder(str(models / "bert"), CPU, torch.float32, pool="mean")
    assert mean.facts["pool"] == "mean"


def test_no_pickle_and_no_other_network_is_loaded(tmp_path: Path) -> None:
    pickled = local_models.bert(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"holds no \.safetensors; pickled weights are not read"):
        TextEncoder(str(pickled), CPU, torch.float32)
    wrong = local_models.bert(tmp_path / "wrong")
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataError, match=r"another network: 16 are missing \(encoder\.layer\.2\."):
        TextEncoder(str(wrong), CPU, torch.float32)
    timm = local_models.timm_folder(tmp_path / "timm", depth=1, img_size=32)
    config = json.loads((timm / "config.json").read_text())
    config["model_args"] |= {"depth": 2}
    (timm / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match=r"timm cannot load .*Missing key.*blocks\.1"):
        ImageEncoder(str(timm), CPU, torch.float32, size=32)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no model of timm or transformers"):
        ImageEncoder(str(tmp_path / "empty"), CPU, torch.float32)


def test_sounds(tmp_path: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    config = transformers.Wav2Vec2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8), conv_stride=(5, 4), conv_kernel=(10, 8), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    )  # fmt: skip
    folder = local_models.saved(tmp_path / "wav2vec2", "Wav2Vec2Model", config)
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=8000).save_pretrained(folder)
    encoder = AudioEncoder(str(folder), CPU, torch.float32)
    wave = np.sin(np.arange(4000) / 5).astype(np.float32) / 2

    def wav(rate: int) -> bytes:
        file = io.BytesIO()
        soundfile.write(file, wave, rate, format="WAV", subtype="FLOAT")
        return file.getvalue()

    good, wrong_rate, broken = encoder.prepare([wav(8000), wav(16000), b"RIFF"])
    assert "prepare with --sample-rate 8000" in str(wrong_rate) and "broken" in str(broken)
    np.testing.assert_array_equal(good, wave)
    model = transformers.Wav2Vec2Model.from_pretrained(folder).eval()
    x = torch.from_numpy((wave - wave.mean()) / wave.std())[None]
    with torch.inference_mode():
        expected = model(x).last_hidden_state.mean(1)
    torch.testing.assert_close(encoder.encode([good]), expected, rtol=1e-3, atol=1e-4)
    assert encoder.same_length


def test_a_hub_that_does_not_answer_is_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    http = pytest.importorskip("huggingface_hub.utils._http")

    def unreachable(*_: object, **__: object) -> None:
        for tried in range(1, 6):
            http.logger.warning(f"Retrying in 8s [Retry {tried}/5].")
        raise OSError("no connection")

    monkeypatch.setattr(import_timm(), "create_model", unreachable)
    say_once.cache_clear()
    with pytest.raises(DataError, match="timm cannot load timm/vit_tiny: no connection"):
        ImageEncoder("timm/vit_tiny", CPU, torch.float32, size=32)
    (said,) = caplog.records
    assert "timm/vit_tiny: the Hugging Face hub does not answer" in said.message
    http.logger.warning("heard again")
    assert not http.logger.filters
