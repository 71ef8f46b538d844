"""Time of each augmentation of one sample, next to what decoding it takes.

    python -m bench.augment            writes bench/results/augment_<machine>.json

One thread, made-up samples, arrays in and out; conversions to Pillow and back are part of it. The
baseline of the colours is Pillow's enhancers and its HSV, as torchvision calls them on images.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence

import numpy as np
import simplejpeg
import soundfile
from PIL import Image, ImageEnhance

from bench import harness
from uml_fast.data.augment.audio import AudioAugment
from uml_fast.data.augment.draws import Draws, visit_keys
from uml_fast.data.augment.image import ImageAugment
from uml_fast.data.augment.text import TextAugment
from uml_fast.data.decoding.decode import decode_of
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.image import ImageConfig

IMAGES: dict[str, ImageAugment] = {
    "flip": ImageAugment(flip=0.5),
    "pad": ImageAugment(pad=4),
    "random resized crop": ImageAugment(scale=(0.08, 1)),
    "colour jitter": ImageAugment(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "randaugment 2 x 9": ImageAugment(randaugment_ops=2),
    "crop, flip, randaugment": ImageAugment(scale=(0.08, 1), flip=0.5, randaugment_ops=2),
}
SOUNDS: dict[str, AudioAugment] = {
    "shift": AudioAugment(shift_s=1),
    "gain": AudioAugment(gain_db=6),
    "noise": AudioAugment(noise=1),
    "frequency masks": AudioAugment(frequency_masks=2),
    "time masks": AudioAugment(time_masks=2),
}
TEXTS: dict[str, TextAugment] = {
    "delete": TextAugment(delete=0.1),
    "replace": TextAugment(replace=0.1),
}
SOUND = AudioConfig(name="audio", row_samples=1280, frames=8, positions=64)
COUNT = 32
"""Samples of a round, each with its own draws."""


def pictures(side: int) -> list[np.ndarray]:
    """uint8 (side, side, 3), smooth as photographs are."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (COUNT, 8, 8, 3)).astype(np.uint8)
    size = (side, side)
    return [np.asarray(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in coarse]


def enhanced(pixels: np.ndarray, draws: Draws) -> np.ndarray:
    """Colour jitter with Pillow's enhancers, and the hue in its HSV."""
    image = Image.fromarray(pixels)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = kind(image).enhance(draws.uniform(0.6, 1.4))
    hue, saturation, value = image.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(draws.below(25)))
    return np.asarray(Image.merge("HSV", (hue, saturation, value)).convert("RGB"))


def each(
    apply: Callable[[np.ndarray, Draws], np.ndarray], arrays: Sequence[np.ndarray], keys: list[int]
) -> Callable[[], None]:
    """One round: every array with its draws."""

    def step() -> None:
        for array, key in zip(arrays, keys, strict=True):
            apply(array, Draws(key))

    return step


def steps() -> dict[tuple[str, str], Callable[[], object]]:
    """What a round does, by (sample, augmentation)."""
    keys = visit_keys(0, "bench", np.zeros(COUNT), np.arange(COUNT))
    found: dict[tuple[str, str], Callable[[], object]] = {}
    for side in (32, 256):
        name, arrays = f"image {side} x {side}", pictures(side)
        config = ImageConfig(name="image", height=side, width=side)
        jpegs = [simplejpeg.encode_jpeg(np.ascontiguousarray(x), 90) for x in arrays]
        found[name, "decode"] = functools.partial(decode_of(config), jpegs)
        for what, image in IMAGES.items():
            found[name, what] = each(
                lambda x, draws, a=image, s=side: a.apply(x, s, s, draws), arrays, keys
            )
        found[name, "colour jitter, Pillow"] = each(enhanced, arrays, keys)
    rng = np.random.default_rng(0)
    waves = [rng.normal(0, 3000, 80000).astype(np.int16) for _ in range(COUNT)]
    flacs = []
    for wave in waves:
        file = io.BytesIO()
        soundfile.write(file, wave, SOUND.sample_rate, format="FLAC")
        flacs.append(file.getvalue())
    found["sound of 5 s", "decode"] = functools.partial(decode_of(SOUND), flacs)
    for what, sound in SOUNDS.items():
        found["sound of 5 s", what] = each(
            lambda x, draws, a=sound: a.apply(x, SOUND, draws), waves, keys
        )
    texts = [rng.integers(32, 127, 144).astype(np.uint8) for _ in range(COUNT)]
    for what, text in TEXTS.items():
        found["text of 144 bytes", what] = each(
            lambda x, draws, a=text: a.apply(x, len(x), draws), texts, keys
        )
    return found


def main() -> None:
    """Measure and write the rows."""
    load_before = round(os.getloadavg()[0], 2)
    todo = {f"{sample}|{what}": step for (sample, what), step in steps().items()}
    seconds = harness.measure(todo, rounds=dict.fromkeys(todo, 25))
    rows = []
    for name, times in seconds.items():
        sample, what = name.split("|")
        p20, p50, p80 = np.quantile(times, (0.2, 0.5, 0.8)) / COUNT * 1e6
        spread = {"p20_us": round(p20, 2), "p50_us": round(p50, 2), "p80_us": round(p80, 2)}
        rows.append(
            {"sample": sample, "what": what, **spread, "rounds": len(times), "load": load_before}
        )
        print(f"{sample:<20} {what:<26} {p50:>10.1f} us", flush=True)
    harness.write_rows(harness.RESULTS / f"augment_{harness.machine_name()}.json", rows)


if __name__ == "__main__":
    main()
