"""Modalities: what the stem and the decoder make of raw rows, against values computed by hand."""

from __future__ import annotations

import base64
import io
import wave

import numpy as np
import pytest
import torch

from uml_fast.config import ConfigError, ModalityConfig
from uml_fast.kernels.log_mel import mel_filters
from uml_fast.modalities.audio import AudioConfig, to_rows
from uml_fast.modalities.base import Modality
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig, from_patches, to_patches
from uml_fast.modalities.text import TextConfig
from uml_fast.packing.pack import Layout, PackedBatch, Region, pack_samples

RNG = np.random.default_rng(0)
IMAGE = ImageConfig(name="image", height=8, width=12, channels=3, patch_height=4, patch_width=6)
AUDIO = AudioConfig(name="audio", sample_rate=8000, row_samples=160, frames=2, window=200, mels=12)
TEXT = TextConfig(name="text", vocabulary=11, positions=9)
FEATURES = FeaturesConfig(name="features", size=5, standardise=True, positions=9)


def random_samples(config: ModalityConfig, lengths: list[int]) -> list[np.ndarray]:
    if isinstance(config, ImageConfig):
        return [RNG.integers(0, 256, (config.patches, 72)).astype(np.uint8) for _ in lengths]
    if isinstance(config, AudioConfig):
        return [RNG.integers(-9000, 9000, (n, 160)).astype(np.int16) for n in lengths]
    if isinstance(config, TextConfig):
        return [RNG.integers(0, 11, (n, 1)).astype(np.int32) for n in lengths]
    return [RNG.normal(2, 3, (n, 5)).astype(np.float32) for n in lengths]


def pack(modality: Modality, samples: list[np.ndarray], rows: int = 40) -> PackedBatch:
    region = Region(
        name=modality.name, rows=rows, slots=16, row_elems=modality.row_elems,
        dtype=modality.row_dtype, max_len=9,
    )  # fmt: skip
    return pack_samples(Layout((region,)), {modality.name: samples})


def built(config: ModalityConfig, decode: bool = True) -> Modality:
    return config.build(16, 16, decode)


ALL = pytest.mark.parametrize("config", [IMAGE, AUDIO, TEXT, FEATURES], ids=lambda c: c.name)


@ALL
def test_tokens_of_a_sample_do_not_depend_on_its_neighbours(config: ModalityConfig) -> None:
    modality = built(config)
    samples = random_samples(config, [4, 7, 3])
    together = pack(modality, samples)
    view = together.region(0)
    tokens = modality.embed(view, None, torch.float32, None)
    for i, sample in enumerate(samples):
        alone = pack(modality, [sample]).region(0)
        expected = modality.embed(alone, None, torch.float32, None)[: len(sample)]
        start = int(together.offsets_S1[i])
        torch.testing.assert_close(tokens[start : start + len(sample)], expected)


@ALL
def test_prediction_loss_is_the_mean_over_rows_that_have_a_next_one(config: ModalityConfig) -> None:
    modality = built(config)
    samples = random_samples(config, [4, 1 if config is not IMAGE else 4, 6])
    view = pack(modality, samples).region(0)
    hidden = torch.randn(40, 16)
    loss = modality.prediction_loss(hidden, modality.features(view), view)
    decoder = modality.decoder
    assert decoder is not None
    errors, start = [], 0
    for sample in samples:
        alone = pack(modality, [sample]).region(0)
        target = modality.features(alone)[: len(sample)]
        predicted = decoder(hidden[start : start + len(sample)])
        for t in range(len(sample) - 1):
            if config is TEXT:
                log = torch.log_softmax(predicted[t].double(), 0)
                errors.append(-log[target[t + 1]])
            else:
                errors.append((predicted[t] - target[t + 1]).double().square().mean())
        start += len(sample)
    torch.testing.assert_close(loss.double(), torch.stack(errors).mean(), rtol=1e-5, atol=1e-6)


def test_single_vectors_are_autoencoded() -> None:
    modality = built(FeaturesConfig(name="features", size=5, vector=True))
    samples = random_samples(FEATURES, [1, 1, 1])
    view = pack(modality, samples).region(0)
    hidden = torch.randn(40, 16)
    loss = modality.prediction_loss(hidden, modality.features(view), view)
    assert modality.decoder is not None
    given = torch.from_numpy(np.concatenate(samples))
    torch.testing.assert_close(loss, (modality.decoder(hidden[:3]) - given).square().mean())


def test_prediction_loss_of_a_pack_without_samples_is_zero() -> None:
    modality = built(FEATURES)
    view = pack(modality, []).region(0)
    loss = modality.prediction_loss(torch.randn(40, 16), modality.features(view), view)
    assert loss.item() == 0.0


@ALL
def test_statistics_standardise_the_training_rows(config: ModalityConfig) -> None:
    if config is TEXT:
        pytest.skip("ids have no statistics")
    modality = built(config)
    samples = random_samples(config, [4, 7, 6, 9])
    rows = np.concatenate(samples)
    offsets = np.cumsum([0, *map(len, samples)])
    modality.fit(rows, offsets)
    view = pack(modality, samples).region(0)
    used = modality.features(view)[: len(rows)]
    per_column = used.view(len(rows), -1, len(modality.mean)).flatten(0, 1)  # type: ignore[arg-type]
    torch.testing.assert_close(
        per_column.mean(0), torch.zeros(per_column.shape[1]), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(
        per_column.std(0), torch.ones(per_column.shape[1]), atol=0.03, rtol=0
    )


def test_patches_are_in_reading_order_and_invertible() -> None:
    images = RNG.integers(0, 256, (3, 8, 12, 3)).astype(np.uint8)
    rows = to_patches(images, 4, 6)
    assert rows.shape == (3, 4, 72)
    np.testing.assert_array_equal(rows[1, 1].reshape(4, 6, 3), images[1, :4, 6:])
    np.testing.assert_array_equal(from_patches(rows[2], IMAGE), images[2])


def test_log_mel_of_a_tone_peaks_in_its_band_at_its_power() -> None:
    """A full-scale sine at a bin's centre has 0 dB in a band whose filter is 1 there."""
    config = AudioConfig(
        name="audio", sample_rate=16000, row_samples=400, frames=1, window=400, mels=20
    )
    audio = config.build(16, 16, False)
    filters = mel_filters(16000, 400, 20).float()
    band = 10
    k = int(filters[:, band].argmax())
    t = np.arange(4000)
    wave_form = np.round(32767 * np.sin(2 * np.pi * k * t / 400)).astype(np.int16)
    rows = to_rows(wave_form, 400)
    mel = audio.log_mel(torch.from_numpy(rows), torch.ones(len(rows), dtype=torch.bool))[2:-2]
    assert (mel.argmax(1) == band).all()
    # the Hann window spreads a tone over three bins: 1, 1/4 and 1/4 of the power
    expected = filters[k, band] + (filters[k - 1, band] + filters[k + 1, band]) / 4
    torch.testing.assert_close(mel[:, band].exp(), expected.expand(len(mel)), rtol=1e-3, atol=0)


def test_log_mel_equals_a_direct_fourier_transform() -> None:
    audio = AUDIO.build(16, 16, False)
    samples = random_samples(AUDIO, [4])[0]
    signal = np.concatenate([samples.ravel() / 32768, np.zeros(200)])
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(200) / 200)
    filters = mel_filters(8000, 200, 12).double().numpy()
    expected = []
    for f in range(8):
        power = np.abs(np.fft.rfft(signal[f * 80 : f * 80 + 200] * hann)) ** 2
        expected.append(np.log(power @ filters * (4 / 200) ** 2 + 1e-6))
    continues = torch.tensor([True, True, True, False])
    mel = audio.log_mel(torch.from_numpy(samples), continues).view(-1, 12)
    np.testing.assert_allclose(mel.numpy(), np.stack(expected), rtol=1e-4, atol=1e-4)


def test_mel_filters_cover_every_frequency_between_the_edges_once() -> None:
    filters = mel_filters(16000, 400, 20).float()
    top = int(filters[:, -1].argmax())
    first = int(filters[:, 0].argmax())
    torch.testing.assert_close(filters[first + 1 : top].sum(1), torch.ones(top - first - 1))


def test_described_samples_are_what_went_in() -> None:
    sample = random_samples(AUDIO, [3])[0]
    seen = built(AUDIO).describe(sample)
    with wave.open(io.BytesIO(base64.b64decode(seen["wav"]))) as file:
        assert file.getframerate() == 8000
        heard = np.frombuffer(file.readframes(10**6), np.int16)
    np.testing.assert_array_equal(heard, sample.ravel())
    image = random_samples(IMAGE, [4])[0]
    png = base64.b64decode(built(IMAGE).describe(image)["png"])
    from PIL import Image as Pillow

    np.testing.assert_array_equal(
        np.asarray(Pillow.open(io.BytesIO(png))), from_patches(image, IMAGE)
    )


def test_unusable_configurations_and_data_are_named() -> None:
    with pytest.raises(ConfigError, match="height 9 is not a multiple of the patch's 4"):
        ImageConfig(name="i", height=9, width=8, patch_height=4, patch_width=4)
    with pytest.raises(ConfigError, match=r"window 900 must lie in 160\.\.800"):
        AudioConfig(name="a", row_samples=640, window=900)
    with pytest.raises(ConfigError, match=r"ids run from 0 to 11, the vocabulary has 11"):
        built(TEXT).fit(np.array([[0], [11]], np.int32), np.array([0, 2]))
    with pytest.raises(
        ConfigError, match=r"text: the longest sample has 12 rows, but text\.positions"
    ):
        built(TEXT).check(12, 1, "int32")
