"""Encoders without a checkpoint: what they learn from, leave out and are good for."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from uml_fast.data.decoding.decode import DecodeError
from uml_fast.data.source import DataError, say_once
from uml_fast.encoders.cache import load_features
from uml_fast.encoders.extraction import Sentences
from uml_fast.encoders.patches import PatchEncoder
from uml_fast.encoders.sentences import SentenceEncoder
from uml_fast.encoders.sounds import SoundEncoder
from uml_fast.extract import main as extract
from uml_fast.prepare import main as prepare


class Pictures:
    """PNG images of stripes: class 0 lies down, class 1 stands."""

    kind = "images"
    class_names = ("lying", "standing")

    def __init__(self, count: int, side: int = 12, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.label = np.arange(count, dtype=np.int32) % 2
        self.length = np.full((count, 2), side, np.int32)
        self._payloads = [self._draw(rng, int(c), side) for c in self.label]

    @staticmethod
    def _draw(rng: np.random.Generator, label: int, side: int) -> bytes:
        wave = np.sin(np.arange(side) * 2.1 + rng.uniform(0, 6)) * 60
        plane = np.tile(wave, (side, 1)) if label else np.tile(wave[:, None], (1, side))
        pixels = rng.uniform(80, 170) + plane[..., None] + rng.normal(0, 20, (side, side, 3))
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
        return file.getvalue()

    def __len__(self) -> int:
        return len(self._payloads)

    def key(self, i: int) -> str:
        return str(i)

    def payload(self, i: int) -> bytes:
        return self._payloads[i]


def payloads(pictures: Pictures) -> list[bytes]:
    return [pictures.payload(i) for i in range(len(pictures))]


def tone(hertz: float, seconds: float = 0.5, rate: int = 16000) -> bytes:
    wave = 0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV")
    return file.getvalue()


def test_a_patch_dictionary_tells_textures_apart_that_pixels_do_not() -> None:
    train, test = Pictures(80), Pictures(60, seed=1)
    encoder = PatchEncoder(train, patch=4, words=16, width=6)
    rows = [encoder.encode(encoder.prepare(payloads(p))) for p in (train, test)]
    assert rows[0].shape == (80, 6)
    torch.testing.assert_close(rows[0].norm(dim=1), torch.ones(80))

    def nearest_mean(x: torch.Tensor, y: torch.Tensor) -> float:
        means = torch.stack([x[torch.from_numpy(train.label == c)].mean(0) for c in (0, 1)])
        return float((torch.cdist(y, means).argmin(1).numpy() == test.label).mean())

    pixels = [torch.from_numpy(np.stack(encoder.prepare(payloads(p)))).flatten(1).float()
              for p in (train, test)]  # fmt: skip
    assert nearest_mean(*rows) > 0.95 > 0.7 > nearest_mean(*pixels)


def test_a_patch_dictionary_reads_no_label_and_is_the_same_again() -> None:
    train, others = Pictures(40), Pictures(40)
    others.label = others.label[::-1].copy()
    rows = [
        (e := PatchEncoder(p, patch=4, words=8, width=4)).encode(e.prepare(payloads(train)))
        for p in (train, train, others)
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_ten_images_get_a_smaller_dictionary_which_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    say_once.cache_clear()
    ten = Pictures(10)
    with caplog.at_level(logging.WARNING):
        encoder = PatchEncoder(ten, patch=4)
    assert "100 words and 5 components (512 and 256 take 512 images; there are 10)" in caplog.text
    rows = encoder.encode(encoder.prepare(payloads(ten)))
    assert rows.shape == (10, 5) and rows.isfinite().all()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert PatchEncoder(Pictures(40), patch=4, words=8, width=4).width == 4
    assert not caplog.text


def test_images_that_a_dictionary_cannot_use_are_named() -> None:
    with pytest.raises(DataError, match="3 images are too few to learn from; patches needs 4"):
        PatchEncoder(Pictures(3))
    lost = Pictures(10)
    lost._payloads[2:] = [b"\xff\xd8"] * 8
    with pytest.raises(DataError, match="2 of 10 images can be decoded; 5 components need 5"):
        PatchEncoder(lost).prepare([])
    mixed = Pictures(40)
    mixed._payloads[3] = Pictures(1, side=8).payload(0)
    with pytest.raises(DataError, match=r"2 sizes \(8 x 8, 12 x 12\)"):
        PatchEncoder(mixed, patch=4, words=8, width=4).prepare([])
    encoder = PatchEncoder(Pictures(40), patch=4, words=8, width=4)
    small, broken = encoder.prepare([Pictures(1, side=8).payload(0), b"\xff\xd8"])
    assert "(8, 8) pixels; the encoder was fitted to (12, 12)" in str(small)
    assert "broken JPEG" in str(broken)


def test_sounds_are_described_by_their_bands_wherever_they_lie_in_the_clip() -> None:
    encoder = SoundEncoder(mels=16)
    low, low_again, high = encoder.encode(encoder.prepare([tone(300), tone(305), tone(3000)]))
    assert low.shape == (48,)
    assert (low - low_again).norm() < 0.2 * (low - high).norm()
    assert int(low[:16].argmax()) < int(high[:16].argmax())
    silent, wrong_rate = encoder.prepare([tone(300, 0), tone(300, rate=8000)])
    assert "without samples" in str(silent)
    assert isinstance(wrong_rate, DecodeError)


def test_a_sounds_features_depend_on_that_sound_alone() -> None:
    encoder = SoundEncoder(mels=16)
    sounds = encoder.prepare([tone(300, 0.31), tone(900, 1.2), tone(100, 0.01)])
    together = encoder.encode(sounds)
    for sound, row in zip(sounds, together, strict=True):
        torch.testing.assert_close(encoder.encode([sound])[0], row)


def test_sentences_of_a_class_are_alike() -> None:
    texts = ("a cat has fur", "the fur of a cat", "wings of a plane", "a plane has two wings")
    stored = Sentences(texts, np.array([0, 0, 1, 1], np.int32), ("cat", "plane"))
    encoder = SentenceEncoder(stored, width=3)
    rows = encoder.encode(encoder.prepare([t.encode() for t in (*texts, "nothing known")]))
    like = rows @ rows.T
    assert like[0, 1] > like[0, 2] and like[2, 3] > like[1, 3]
    assert rows.shape == (5, encoder.width)
    assert float(rows[4].norm()) == 0
    with pytest.raises(DataError, match="1 texts with 1 different words"):
        SentenceEncoder(Sentences(("cat",), np.zeros(1, np.int32), ("cat",)))


def test_the_command_learns_an_encoder_from_the_training_split(tmp_path: Path) -> None:
    for split, count in (("train", 30), ("test", 4)):
        pictures = Pictures(count, side=32, seed=len(split))
        for i in range(count):
            folder = tmp_path / "files" / split / pictures.class_names[i % 2]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.png").write_bytes(pictures.payload(i))
    table = tmp_path / "texts.json"
    table.write_text('{"lying": ["a line lies flat", "it lies"], "standing": ["it stands up"]}')
    shards, out = tmp_path / "shards", tmp_path / "features"
    assert prepare(["images", str(tmp_path / "files"), str(shards), "--workers", "1"]) == 0
    assert extract(["image", str(shards), "--encoder", "patches", "--out", str(out)]) == 0
    assert load_features(out / "image-train.safetensors").rows.shape == (30, 15)
    assert extract(["text", str(table), "--encoder", "sentences", "--out", str(out)]) == 0
    found = load_features(out / "text-train.safetensors")
    assert found.class_names == ("lying", "standing")
    assert found.labels.tolist() == [0, 0, 1]
