"""Augmentation: the same for the same visit whatever else happens, and off where it must be."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from tests.data.test_folders import IMAGE, SOUND, run_config, shards
from uml_fast.config import ConfigError, MixConfig
from uml_fast.data.augment import AugmentConfig
from uml_fast.data.augment.audio import AudioAugment, add_noise, without_bands
from uml_fast.data.augment.colour import autocontrast, posterize, recoloured, solarize
from uml_fast.data.augment.draws import Draws, visit_keys
from uml_fast.data.augment.image import ImageAugment, crop_box
from uml_fast.data.augment.randaugment import OPERATIONS, randaugment
from uml_fast.data.augment.text import TextAugment
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.in_memory import in_memory
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.source import Samples
from uml_fast.kernels.log_mel import log_mel
from uml_fast.modalities.audio import AudioConfig
from uml_fast.packing.schedule import hash64, stream_key

__all__ = ["shards"]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
EVERYTHING = AugmentConfig(
    image=ImageAugment(
        scale=(0.3, 1), pad=2, flip=0.5, randaugment_ops=2, brightness=0.4, contrast=0.4,
        saturation=0.4, hue=0.1,
    ),
    audio=AudioAugment(
        shift_s=0.1, gain_db=6, noise=0.5, frequency_masks=2, time_masks=2, time_mask_s=0.05
    ),
    text=TextAugment(delete=0.1, replace=0.1),
)  # fmt: skip


def sources_of(
    folder, augment: AugmentConfig, seed: int = 3, backend: str = "webdataset"
) -> tuple[Samples, ...]:
    config = run_config(folder)
    data = dataclasses.replace(config.data, augment=augment, backend=backend)
    return dataclasses.replace(config, data=data).load(seed, "uml").train


def read(source: Samples, samples: Sequence[int], epochs: Sequence[int] | None) -> list[np.ndarray]:
    lengths = source.lengths_of(np.asarray(samples))
    out = np.empty((int(lengths.sum()), source.row_elems), source.row_dtype)
    assert source.read(np.asarray(samples), out, epochs) == []
    return np.split(out, np.cumsum(lengths)[:-1])


def same(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_visit_is_a_function_of_seed_epoch_and_sample_alone(shards) -> None:
    samples, epochs = [5, 0, 7, 7, 2, 9], [1, 0, 3, 4, 0, 2]
    for source, other_seed in zip(
        sources_of(shards, EVERYTHING), sources_of(shards, EVERYTHING, seed=4), strict=True
    ):
        together = read(source, samples, epochs)
        alone = [read(source, [i], [e])[0] for i, e in zip(samples, epochs, strict=True)]
        assert same(together, alone)
        plain = read(source, samples, None)
        for x, y in zip(together, plain, strict=True):
            assert not np.array_equal(x, y)
        assert not np.array_equal(together[2], together[3]), "two epochs of one sample"
        if source.name != "image":  # its samples of a seed are others
            assert not same(together, read(other_seed, samples, epochs))


def test_a_visit_is_the_same_from_both_backends(shards) -> None:
    pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")
    both = [sources_of(shards, EVERYTHING, backend=b) for b in ("webdataset", "dali")]
    for one, other in zip(*both, strict=True):
        assert same(read(one, [5, 0, 7], [1, 0, 3]), read(other, [5, 0, 7], [1, 0, 3]))


def test_what_is_evaluated_is_never_changed(shards) -> None:
    config = run_config(shards)
    data = dataclasses.replace(config.data, augment=EVERYTHING)
    changed = dataclasses.replace(config, data=data).load(0, "uml")
    plain = config.load(0, "uml")
    for a, b in zip((*changed.train, changed.test, changed.validation),
                    (*plain.train, plain.test, plain.validation), strict=True):  # fmt: skip
        np.testing.assert_array_equal(in_memory(a).rows, in_memory(b).rows)


@pytest.mark.native
def test_packs_are_the_same_after_resuming_and_from_any_threads(shards, monkeypatch) -> None:
    sources = sources_of(shards, EVERYTHING)
    mix = MixConfig(token_budget=400)

    def packs(count: int, skip: int = 0, **options: int) -> list[list[np.ndarray]]:
        with Loader(sources, layouts_of(sources, mix), mix, seed=3, **options) as loader:
            if skip:
                for _ in range(skip):
                    next(loader)
                state = loader.state_dict()
                next(loader)
                loader.load_state_dict(state)
            return [[r.numpy().copy() for r in next(loader)[0].raw] for _ in range(count)]

    want = packs(12)
    assert all(same(a, b) for a, b in zip(packs(12, threads=3, slots=2), want, strict=True))
    assert all(same(a, b) for a, b in zip(packs(5, skip=7), want[7:], strict=True))
    monkeypatch.setattr("uml_fast.runtime.native.module", lambda: None)
    assert all(same(a, b) for a, b in zip(packs(12), want, strict=True))


def test_everything_off_changes_nothing(shards) -> None:
    off = AugmentConfig(
        image=ImageAugment(randaugment_ops=3, randaugment_magnitude=0),
        audio=AudioAugment(time_masks=3, time_mask_s=0, frequency_masks=2, frequency_mask_mels=0),
    )
    for source in sources_of(shards, off):
        assert same(read(source, [1, 4], [0, 1]), read(source, [1, 4], None))
    for augment in (AugmentConfig(), off):
        assert augment.image.is_off and augment.audio.is_off and augment.text.is_off


def test_keys_are_those_of_the_planners_hash_under_another_name() -> None:
    samples = np.arange(50)
    keys = visit_keys(7, "image", np.full(50, 3), samples)
    assert keys == hash64(7, stream_key("image augment"), 3, samples).tolist()
    mixed = visit_keys(7, "image", [3, 4], samples[:2])
    assert mixed[0] == keys[0] and mixed[1] == visit_keys(7, "image", [4], samples[1:2])[0]


def test_draws_are_uniform_and_one_stream() -> None:
    first, second = Draws(11), Draws(11)
    numbers = [first.uniform() for _ in range(2000)]
    np.testing.assert_array_equal(second.array(1500), numbers[:1500])
    np.testing.assert_array_equal(second.array(500), numbers[1500:])
    counts, _ = np.histogram(numbers, 10, (0, 1))
    assert counts.sum() == 2000 and abs(counts - 200).max() < 60
    starts = [Draws(k).uniform() for k in visit_keys(0, "a", np.zeros(2000), np.arange(2000))]
    assert abs(np.mean(starts) - 0.5) < 0.03
    assert abs(np.corrcoef(starts[:-1], starts[1:])[0, 1]) < 0.08
    assert {Draws(k).below(3) for k in range(40)} == {0, 1, 2}


GRADIENT = np.linspace(0, 255, 40 * 30 * 3).astype(np.uint8).reshape(40, 30, 3)


def visits(count: int) -> list[Draws]:
    return [Draws(k) for k in visit_keys(1, "image", np.zeros(count), np.arange(count))]


def test_flip_rate() -> None:
    augment = ImageAugment(flip=0.3)
    flipped = 0
    for draws in visits(1000):
        got = augment.apply(GRADIENT, 40, 30, draws)
        is_flipped = np.array_equal(got, GRADIENT[:, ::-1])
        assert is_flipped or np.array_equal(got, GRADIENT)
        flipped += is_flipped
    assert 250 < flipped < 350


def test_crop_boxes_have_the_areas_and_shapes_that_are_asked() -> None:
    boxes = np.array([crop_box(300, 300, (0.1, 0.6), (0.5, 2), d) for d in visits(2000)])
    left, top, right, bottom = boxes.T
    assert left.min() == top.min() == 0 and right.max() == bottom.max() == 300
    area = (right - left) * (bottom - top) / 300**2
    assert 0.098 < area.min() < 0.11 and 0.59 < area.max() < 0.602
    # boxes too long for the picture are drawn again, so large areas are a little rarer
    assert abs(area.mean() - 0.35) < 0.03
    shape = np.log((right - left) / (bottom - top))
    assert abs(shape.mean()) < 0.04 and abs(shape).max() < np.log(2.05)
    assert crop_box(100, 10, (0.9, 1), (1, 1), Draws(0)) == (0, 45, 10, 55)


def test_a_crop_is_resized_to_the_size_of_the_run() -> None:
    augment = ImageAugment(scale=(0.2, 0.9))
    got = {augment.apply(GRADIENT, 16, 24, d).shape for d in visits(5)}
    assert got == {(16, 24, 3)}
    grey = augment.apply(GRADIENT[:, :, :1], 16, 24, Draws(1))
    assert grey.shape == (16, 24, 1)


def test_padded_moves_stay_within_the_pad_and_mirror_the_border() -> None:
    augment, seen = ImageAugment(pad=2), set()
    big = np.pad(GRADIENT, ((2, 2), (2, 2), (0, 0)), "reflect")
    windows = {big[y : y + 40, x : x + 30].tobytes(): (y, x) for y in range(5) for x in range(5)}
    for draws in visits(300):
        seen.add(windows[np.ascontiguousarray(augment.apply(GRADIENT, 40, 30, draws)).tobytes()])
    assert len(seen) == 25


@pytest.mark.parametrize(
    ("name", "factors"),
    [("Brightness", (0, 1, 2)), ("Contrast", (1, 0, 2)), ("Color", (1, 2, 0))],
)
def test_one_pass_gives_the_colours_of_pillows_enhancers(name: str, factors: tuple) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0])):
        for factor in (0.0, 0.6, 1.0, 1.7):
            if name == "Color" and image.mode == "L":
                continue
            values = [factor if k == 0 else 1.0 for k in factors]
            got = np.asarray(recoloured(image, *values, 0.0)).astype(int)
            want = np.asarray(getattr(ImageEnhance, name)(image).enhance(factor))
            assert abs(got - want).max() <= 1 + round(factor)  # Pillow's mean is a whole number
    whole = np.asarray(recoloured(Image.fromarray(pixels), 1, 1, 1, 1.0)).astype(int)
    assert abs(whole - pixels).max() <= 1


def test_posterize_solarize_and_autocontrast_are_pillows() -> None:
    pixels = np.random.default_rng(0).integers(20, 200, (20, 31, 3)).astype(np.uint8)
    pixels[:, :, 1] = 7  # a channel without contrast
    for image in (Image.fromarray(pixels), Image.fromarray(pixels[:, :, 0])):
        for bits in range(1, 9):
            assert same([posterize(image, bits)], [ImageOps.posterize(image, bits)])
        for threshold in (0, 100, 255, 256):
            assert same([solarize(image, threshold)], [ImageOps.solarize(image, threshold)])
        got, want = (
            np.asarray(x).astype(int) for x in (autocontrast(image), ImageOps.autocontrast(image))
        )
        assert abs(got - want).max() <= 1  # Pillow cuts decimals off


def test_a_hue_turned_by_a_third_moves_red_to_another_colour_of_its_luminance() -> None:
    pixels = np.full((2, 2, 3), (140, 80, 80), np.uint8)
    turned = np.asarray(recoloured(Image.fromarray(pixels), 1, 1, 1, 1 / 3))[0, 0].astype(int)
    assert turned.argmax() != 0
    luma = np.array([0.299, 0.587, 0.114])
    assert abs((turned - pixels[0, 0]) @ luma) < 1.5


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_operations_of_randaugment(name: str) -> None:
    noise = np.random.default_rng(0).integers(30, 225, (40, 30, 3)).astype(np.uint8)
    for pixels in (noise, noise[:, :, 0]):
        image = Image.fromarray(np.ascontiguousarray(pixels))
        got = OPERATIONS[name](image, 0.0)
        assert got.mode == image.mode and got.size == image.size
        if name not in ("solarize", "autocontrast", "equalize"):
            np.testing.assert_array_equal(np.asarray(got), pixels)
        strong = np.asarray(OPERATIONS[name](image, 0.9))
        is_still = name == "identity" or (name == "color" and image.mode == "L")
        assert np.array_equal(strong, pixels) == is_still


def test_randaugment_draws_every_operation() -> None:
    image = Image.fromarray(GRADIENT)
    made = {np.asarray(randaugment(image, 1, 20, d)).tobytes() for d in visits(400)}
    assert len(made) > len(OPERATIONS)  # nine have either sign


WAVE = (np.sin(np.arange(8000) * 2 * np.pi * 440 / 8000) * 8000).astype(np.int16)
PLAIN = dataclasses.replace(SOUND, window=320, mels=20, row_samples=320)


def test_shift_and_gain_of_sounds() -> None:
    shifts = []
    for draws in visits(200):
        got = AudioAugment(shift_s=0.01).apply(np.arange(1000, dtype=np.int16), PLAIN, draws)
        shifts.append(int(np.flatnonzero(got == 0)[0] + 500) % 1000 - 500)
        assert (np.sort(got) == np.arange(1000)).all()
    assert min(shifts) == -80 and max(shifts) == 80
    power = [np.abs(AudioAugment(gain_db=6).apply(WAVE, PLAIN, d)).max() for d in visits(300)]
    decibels = 20 * np.log10(np.array(power) / 8000)
    assert -6.01 < decibels.min() < -5.5 and 5.5 < decibels.max() < 6.01
    loud = AudioAugment(gain_db=40).apply(np.full(10, 30000, np.int16), PLAIN, Draws(4))
    assert abs(loud.astype(int)).max() <= 32767


def test_noise_has_the_asked_level_and_falls_with_the_frequency() -> None:
    wave = WAVE.astype(np.float32)
    noisy = wave.copy()
    add_noise(noisy, 10 ** (-20 / 20), (1 << 20) - 100)
    noise = noisy - wave
    snr_db = 10 * np.log10((wave**2).mean() / (noise**2).mean())
    assert abs(snr_db - 20) < 3
    power = np.abs(np.fft.rfft(noise)) ** 2
    assert power[10:100].mean() > 5 * power[1000:3000].mean()
    silence = np.zeros(100, np.float32)
    add_noise(silence, 1.0, 5)
    assert not silence.any()


def band_energy(wave: np.ndarray, config: AudioConfig) -> np.ndarray:
    rows = torch.from_numpy(wave[: len(wave) // config.row_samples * config.row_samples].copy())
    rows = rows.view(-1, config.row_samples)
    mel = log_mel(
        rows, torch.zeros(len(rows), dtype=torch.bool), frames=config.frames, window=config.window,
        sample_rate=config.sample_rate, mels=config.mels,
    )  # fmt: skip
    return mel.view(-1, config.mels).mean(0).numpy()


def test_a_masked_band_is_at_the_floor_of_the_stems_log_mel() -> None:
    rng = np.random.default_rng(0)
    noise = (rng.normal(0, 3000, 16000)).astype(np.int16)
    config = dataclasses.replace(PLAIN, row_samples=1600, frames=5, window=320)
    before = band_energy(noise, config)
    masked = without_bands(noise.astype(np.float32), [(8, 13)], config)
    after = band_energy(np.rint(masked).astype(np.int16), config)
    drop = before - after
    assert (drop[9:12] > 4).all(), "the middle of the stretch is gone (nepers of power)"
    assert (abs(drop[[0, 1, 2, 3, 4, 5, 16, 17, 18, 19]]) < 0.1).all(), "the rest is as it was"
    assert same([without_bands(noise.astype(np.float32), [(3, 3)], config).round()], [noise])
    for n in (1, 2, 1023, 7919):
        assert len(without_bands(np.ones(n, np.float32), [(0, 2)], config)) == n


def test_time_masks_are_silences_of_the_asked_length() -> None:
    augment = AudioAugment(time_masks=1, time_mask_s=0.1)
    widths = []
    for draws in visits(300):
        got = augment.apply(np.full(2000, 9, np.int16), PLAIN, draws)
        gone = np.flatnonzero(got == 0)
        assert len(gone) == 0 or gone[-1] - gone[0] + 1 == len(gone)
        widths.append(len(gone))
    assert min(widths) < 20 and 780 < max(widths) <= 800


def test_token_dropout_keeps_the_number_of_rows() -> None:
    tokens = (np.arange(200) % 250 + 1).astype(np.uint8)
    deleted = replaced = 0
    for draws in visits(100):
        got = TextAugment(delete=0.2).apply(tokens, 200, draws)
        kept = got[got > 0]
        assert len(got) == 200 and (np.diff(kept.astype(int)) > 0).all()
        assert not got[len(kept) :].any()
        deleted += 200 - len(kept)
        got = TextAugment(replace=0.1).apply(tokens, 200, draws)
        assert ((got == tokens) | (got == 0)).all()
        replaced += int((got == 0).sum())
    assert abs(deleted / 20000 - 0.2) < 0.02 and abs(replaced / 20000 - 0.1) < 0.02
    long = TextAugment(delete=0.2).apply(tokens, 100, Draws(5))
    assert (long > 0).all(), "tokens behind the cut move up"


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (ImageAugment, {"scale": (0.0, 1.0)}, r"image.scale is \(0.0, 1.0\)"),
        (ImageAugment, {"scale": (0.5, 1.1)}, "image.scale"),
        (ImageAugment, {"ratio": (2.0, 1.0)}, "image.ratio"),
        (ImageAugment, {"pad": -1}, "image.pad is -1"),
        (ImageAugment, {"flip": 1.5}, "image.flip is 1.5"),
        (ImageAugment, {"randaugment_ops": -1}, "image.randaugment_ops"),
        (ImageAugment, {"randaugment_magnitude": 31}, "magnitude is 31; it must be in 0..30"),
        (ImageAugment, {"brightness": -0.1}, "image.brightness is -0.1"),
        (ImageAugment, {"hue": 0.6}, "image.hue is 0.6"),
        (AudioAugment, {"shift_s": -1}, "audio.shift_s is -1"),
        (AudioAugment, {"noise": 2}, "audio.noise is 2"),
        (AudioAugment, {"noise_snr_db": (3.0, 1.0)}, "audio.noise_snr_db"),
        (AudioAugment, {"time_masks": -2}, "audio.time_masks"),
        (AudioAugment, {"frequency_mask_mels": -2}, "audio.frequency_mask_mels"),
        (TextAugment, {"delete": -0.1}, "text.delete is -0.1"),
        (TextAugment, {"replace": 1.1}, "text.replace is 1.1"),
    ],
)
def test_bad_values_are_refused_by_name(kind, options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"data.augment\..*{message}|data.augment.{message}"):
        kind(**options)


def test_options_that_do_not_fit_the_modality_are_refused() -> None:
    grey = dataclasses.replace(IMAGE, channels=1)
    for config, augment, message in (
        (IMAGE, AugmentConfig(image=ImageAugment(pad=8)), "image.pad is 8; pictures have 8 pixels"),
        (grey, AugmentConfig(image=ImageAugment(hue=0.1)), "need colours; image is grey"),
        (SOUND, AugmentConfig(audio=AudioAugment(frequency_mask_mels=41)), "audio has 40 bands"),
    ):
        with pytest.raises(ConfigError, match=message):
            rows_of(config, augment)
