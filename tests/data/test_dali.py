"""The DALI backend gives the samples of the default one: same arrays, same packs, same refusals."""

from __future__ import annotations

import dataclasses
import gc
import io
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from tests.data import made_files
from tests.real_files import DATA, needs_real_files
from uml_fast.config import ConfigError, MixConfig, ModalityConfig
from uml_fast.data.decoding.dali import Batched
from uml_fast.data.decoding.decode import Decode, DecodeError, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.source import DataErrors, ShardSource
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig

pytest.importorskip("nvidia.dali", reason="pip install nvidia-dali-cuda130")

COLOUR = ImageConfig(name="image", height=8, width=12, patch_height=4, patch_width=4)
GRAY = dataclasses.replace(COLOUR, channels=1)
SOUND = AudioConfig(
    name="audio", sample_rate=8000, row_samples=160, frames=2, window=160, positions=30
)
WORDS = TextConfig(name="text", vocabulary=256, positions=40)


def picture(width: int = 37, height: int = 53, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth with a little noise, so that chroma upsampling and clipping have something to do."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 4), np.uint8)
    smooth = Image.fromarray(coarse, "RGBA").resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(smooth).astype(int) + rng.integers(-9, 10, (height, width, 4))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8), "RGBA").convert(mode)


def stored(image: Image.Image, form: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def sound(samples: int, rate: int = 8000, form: str = "FLAC", channels: int = 1, **options: str):
    wave = np.random.default_rng(samples).normal(0, 0.4, (samples, channels)).clip(-1, 1)
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=form, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # a reader that heeds it turns the picture by 90 degrees
    return exif


def refuse(payloads: Sequence[bytes]) -> list:
    assert not payloads, "DALI was to decode these"
    return []


def assert_alike(config: ModalityConfig, payloads: Sequence[bytes], by_dali: bool = True) -> None:
    """Both backends give the same, and DALI does (or does not) have a part in it."""
    want = decode_of(config)(payloads)
    decode = decode_of(config, "dali")
    assert isinstance(decode, Batched)
    assert [decode.graph.takes(p) for p in payloads] == [by_dali] * len(payloads)
    if by_dali:
        decode = dataclasses.replace(decode, plain=refuse)
    for a, b in zip(decode(payloads), want, strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype and a.shape == b.shape  # type: ignore[union-attr]


JPEGS: dict[str, Callable[[], bytes]] = {
    "full chroma": lambda: stored(picture(), subsampling=0),
    "half chroma": lambda: stored(picture(), subsampling=1),
    "quarter chroma": lambda: stored(picture(), subsampling=2),
    "progressive": lambda: stored(picture(), progressive=True),
    "restart markers": lambda: stored(picture(), restart_marker_blocks=2),
    "worst quality": lambda: stored(picture(), quality=1),
    "256 x 256": lambda: stored(picture(256, 256)),
    "1 x 1": lambda: stored(picture(1, 1)),
    "1 x 31": lambda: stored(picture(1, 31)),
    "17 x 8": lambda: stored(picture(17, 8)),
    "gray": lambda: stored(picture(mode="L")),
    "turned by EXIF": lambda: stored(picture(), exif=turned()),
    "bytes behind its end": lambda: stored(picture()) + b"abc",
}


@pytest.mark.parametrize("config", [COLOUR, GRAY], ids=["colour", "gray"])
def test_jpeg_pixels(config: ImageConfig) -> None:
    assert_alike(config, [make() for make in JPEGS.values()])
    assert_alike(config, [stored(picture(mode="CMYK"))], by_dali=False)


def test_a_jpeg_that_promises_gigabytes_is_not_for_dali() -> None:
    payload = bytearray(stored(picture()))
    size = payload.index(b"\xff\xc0") + 5
    payload[size : size + 4] = (60_000).to_bytes(2, "big") * 2
    decode = decode_of(COLOUR, "dali")
    assert isinstance(decode, Batched) and not decode.graph.takes(bytes(payload))
    assert isinstance(decode([bytes(payload)])[0], DecodeError)


def test_pixels_of_other_formats() -> None:
    alpha = picture(mode="RGBA")
    assert_alike(COLOUR, [
        stored(picture(), "PNG"), stored(alpha, "PNG"), stored(picture(mode="L"), "PNG"),
        stored(picture(mode="LA"), "PNG"), stored(picture().quantize(16), "PNG"),
        stored(picture().quantize(4), "PNG", transparency=3), stored(picture(mode="1"), "PNG"),
        stored(picture(), "PNG", exif=turned()), stored(picture(), "WEBP"),
        stored(alpha, "WEBP"), stored(alpha, "WEBP", lossless=True), stored(picture(), "BMP"),
    ])  # fmt: skip
    assert_alike(GRAY, [stored(picture(mode="L"), "PNG"), stored(picture(mode="LA"), "PNG")])
    deep = Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(40, 100) * 16)
    assert_alike(COLOUR, [stored(deep, "PNG"), stored(picture(), "GIF")], by_dali=False)
    colour = [stored(picture(), form) for form in ("PNG", "WEBP", "BMP")]
    assert_alike(GRAY, [*colour, stored(deep, "PNG")], by_dali=False)


@needs_real_files
def test_real_jpeg_pixels() -> None:
    import tarfile

    assert DATA is not None
    with tarfile.open(DATA / "cifar10_jpeg.tar") as file:
        names = [m for m in file if m.name.endswith(".jpg")][::40]
        assert_alike(COLOUR, [file.extractfile(m).read() for m in names])  # type: ignore[union-attr]


def test_samples_of_sounds() -> None:
    forms = [("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_16"), ("WAV", "PCM_24"),
             ("WAV", "FLOAT"), ("WAV", "PCM_U8")]  # fmt: skip
    assert_alike(SOUND, [
        sound(n, form=form, subtype=subtype)
        for form, subtype in forms for n in (1, 160, 3001, 4800, 4801, 9000)
    ])  # fmt: skip
    assert len(decode_of(SOUND, "dali")([sound(9000)])[0]) == 4800  # type: ignore[arg-type]
    assert_alike(SOUND, [sound(3001, form="OGG"), sound(300_000, form="WAV")], by_dali=False)


def test_text_and_features_are_the_same_code() -> None:
    for config in (WORDS, FeaturesConfig(name="features", size=3)):
        assert decode_of(config, "dali") == decode_of(config)


GOOD_JPEG = [stored(picture(seed=i)) for i in range(5)]
GOOD_SOUND = [sound(n) for n in (500, 600, 700, 800, 900)]
BROKEN: dict[str, tuple[ModalityConfig, bytes, str]] = {
    "truncated JPEG": (COLOUR, GOOD_JPEG[0][:-30], "broken JPEG: Premature end"),
    "half a JPEG": (COLOUR, GOOD_JPEG[0][: len(GOOD_JPEG[0]) // 2], "broken JPEG"),
    "JPEG, head only": (COLOUR, GOOD_JPEG[0][:20], "broken JPEG"),
    "no bytes": (COLOUR, b"", "broken image"),
    "zeros": (COLOUR, bytes(60), "broken image"),
    "truncated PNG": (COLOUR, stored(picture(), "PNG")[:-200], "broken image"),
    "truncated WebP": (COLOUR, stored(picture(), "WEBP")[:-200], "broken image"),
    "truncated FLAC": (SOUND, GOOD_SOUND[4][:-100], "broken sound"),
    "no sound": (SOUND, b"", "broken sound"),
    "head of a WAV": (SOUND, b"RIFF", "broken sound"),
    "another rate": (SOUND, sound(500, 44100), "44100 Hz with 1 channels; the run takes 8000 Hz"),
    "stereo": (SOUND, sound(500, channels=2), "8000 Hz with 2 channels; the run takes 8000 Hz"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_samples_alone_are_refused_in_the_words_of_the_other_backend(case: str) -> None:
    config, broken, message = BROKEN[case]
    good = GOOD_JPEG if config is COLOUR else GOOD_SOUND
    want = decode_of(config)([*good, broken])
    decode = decode_of(config, "dali")
    for _ in range(3):  # a pipeline that raised is of no use: the next call needs another
        got = decode([*good[:2], broken, *good[2:], broken])
        errors = [got.pop(6), got.pop(2)]
        for error in errors:
            assert isinstance(error, DecodeError) and message in str(error)
            assert str(error).split(" at 0x")[0] == str(want[-1]).split(" at 0x")[0]
        for a, b in zip(got, want, strict=False):
            np.testing.assert_array_equal(a, b)
    assert isinstance(decode, Batched)
    last = dataclasses.replace(decode, plain=refuse)(good)
    for a, b in zip(last, want, strict=False):
        np.testing.assert_array_equal(a, b)


FLIPPED: dict[str, tuple[ModalityConfig, Callable[[int], bytes]]] = {
    "JPEG": (COLOUR, lambda i: stored(picture(seed=i))),
    "PNG": (COLOUR, lambda i: stored(picture(seed=i), "PNG")),
    "WebP": (COLOUR, lambda i: stored(picture(seed=i), "WEBP")),
    "BMP": (COLOUR, lambda i: stored(picture(seed=i), "BMP")),
    "FLAC": (SOUND, lambda i: sound(500 + i)),
    "WAV": (SOUND, lambda i: sound(500 + i, form="WAV")),
}


@pytest.mark.parametrize("form", FLIPPED)
def test_random_byte_flips_neither_crash_nor_hang_nor_touch_the_others(form: str) -> None:
    rng = np.random.default_rng(0)
    config, make = FLIPPED[form]
    whole = [make(i) for i in range(8)]
    decode, plain = decode_of(config, "dali"), decode_of(config)
    for _ in range(20):
        flipped = [bytearray(p) for p in whole]
        for payload in flipped[1::2]:
            for at in rng.integers(0, len(payload), 3):
                payload[at] = rng.integers(256)
        payloads = list(map(bytes, flipped))
        for i, (a, b) in enumerate(zip(decode(payloads), plain(payloads), strict=True)):
            if isinstance(a, DecodeError):
                assert i % 2 and str(a).split(" at 0x")[0] == str(b).split(" at 0x")[0]
            elif isinstance(b, DecodeError):
                assert i % 2 and form in ("JPEG", "BMP", "WebP")  # see the docstring of dali.py
            else:
                np.testing.assert_array_equal(a, b)


def tasks() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_decode_together_and_leave_nothing() -> None:
    payloads = [stored(picture(20 + i, 30, seed=i)) for i in range(30)]
    want = decode_of(COLOUR)(payloads)
    gc.collect()
    before = tasks()
    decode: Decode | None = decode_of(COLOUR, "dali")
    start = threading.Barrier(3)

    def work(seed: int) -> int:
        start.wait()
        rng = np.random.default_rng(seed)
        assert decode is not None
        for _ in range(40):
            chosen = rng.integers(0, len(payloads), rng.integers(0, 20))
            got = decode([payloads[i] for i in chosen])
            if rng.integers(5) == 0:
                assert isinstance(decode([payloads[0][:-30]])[0], DecodeError)
            for i, array in zip(chosen, got, strict=True):
                np.testing.assert_array_equal(array, want[i])
        return seed

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == [0, 1, 2]
    assert isinstance(decode, Batched) and 1 <= len(decode._free) <= 3
    decode = None
    gc.collect()
    assert tasks() == before


def test_arrays_outlive_the_batches_after_them() -> None:
    decode = decode_of(COLOUR, "dali")
    first = decode(GOOD_JPEG[:2])
    copies = [np.array(a) for a in first]
    for _ in range(10):
        decode(GOOD_JPEG[2:])
    for a, b in zip(first, copies, strict=True):
        np.testing.assert_array_equal(a, b)


def test_more_samples_than_a_batch_of_the_pipeline_takes() -> None:
    payloads = [stored(picture(8, 8, seed=i)) for i in range(7)] * 40
    payloads[270] = payloads[270][:-20]
    got, want = decode_of(COLOUR, "dali")(payloads), decode_of(COLOUR)(payloads)
    assert [i for i, a in enumerate(got) if isinstance(a, DecodeError)] == [270]
    for a, b in zip(got[:270] + got[271:], want[:270] + want[271:], strict=True):
        np.testing.assert_array_equal(a, b)
    assert decode_of(COLOUR, "dali")([]) == []


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of JPEG images, FLAC sounds and texts; one image and one sound is broken."""
    root = tmp_path_factory.mktemp("dali")

    def write(name: str, extension: str, payloads: Sequence[bytes]) -> None:
        members = [(f"{i:03d}.{extension}", p) for i, p in enumerate(payloads)]
        made_files.tar(root / f"{name}.tar", members)

    images = [stored(picture(12 + i % 2, 8, seed=i)) for i in range(60)]
    write("image", "jpg", [*images[:30], images[30][:-25], *images[31:]])
    sounds = [sound(200 + 37 * i) for i in range(20)]
    write("audio", "flac", [*sounds[:7], sounds[7][:-50], *sounds[8:]])
    write("text", "txt", [f"text {'and so on ' * (i % 5)}{i}".encode() for i in range(40)])
    return root


@pytest.mark.native
@pytest.mark.parametrize("threads", [1, 3])
def test_the_loader_gives_the_same_packs_in_the_same_order(shards: Path, threads: int) -> None:
    mix = MixConfig(token_budget=400)
    packs = {}
    for backend in ("webdataset", "dali"):
        errors = DataErrors(2)
        sources = tuple(
            ShardSource(c.name, ShardSet.open(shards / f"{c.name}.tar"),
                        decode_of(c, backend), rows_of(c), errors)  # type: ignore[arg-type]
            for c in (COLOUR, WORDS, SOUND)
        )  # fmt: skip
        with Loader(sources, layouts_of(sources, mix), mix, seed=5, threads=threads) as loader:
            packs[backend] = []
            for _ in range(40):
                batch = next(loader)[0]
                parts = (*batch.raw, batch.label_S, batch.sample_S, batch.offsets_S1,
                         batch.modality_S)  # fmt: skip
                packs[backend].append([p.numpy().copy() for p in parts])
        assert len(errors) == 2
    for ours, theirs in zip(*packs.values(), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(ModuleNotFoundError, match="pip install nvidia-dali-cuda130") as e:
        decode_of(COLOUR, "dali")
    assert e.value.name == "nvidia.dali"
    decode_of(WORDS, "dali")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no CUDA device; take dali"):
        decode_of(COLOUR, "dali_gpu")


@pytest.mark.gpu
def test_pixels_of_nvjpeg_are_close() -> None:
    payloads = [make() for make in JPEGS.values()]
    for a, b in zip(decode_of(COLOUR, "dali_gpu")(payloads), decode_of(COLOUR)(payloads),
                    strict=True):  # fmt: skip
        assert isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        assert a.shape == b.shape and np.abs(a.astype(int) - b).mean() < 2
