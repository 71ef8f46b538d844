"""Shards for the loader bench: synthetic, so that any clone can run it, and the same every time.

Pictures have the spectrum of photographs (amplitude 1 / frequency, colours that go together), and
are JPEG with halved colours, as cameras and Pillow write them: 32x32 of quality 75, as large as
CIFAR-10's (1 kB), 256x256 of quality 90. Sounds are FLAC, texts sentences of words, features .npy
arrays; lengths are ragged.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from bench.harness import ROOT
from uml_fast.data.shards.files import ShardSet

CLASSES = 10
SHARDS = 8
SAMPLE_RATE = 16_000
FEATURES = 64
"""Elements of a feature row."""
_WORDS = (
    "a photo of the small large grey dog runs over wet grass beside an old red car under blue sky "
    "while two birds with yellow wings sit on it and wait for rain"
)
_VERSION = 2
"""Rises with every change of the content, so that shards of an older one are not read."""
_FOLDER = Path(tempfile.gettempdir()) / f"uml_fast_bench_{_VERSION}"


def photos(count: int, size: int, seed: int) -> Iterator[np.ndarray]:
    """uint8 (size, size, 3) pictures with the spectrum of photographs."""
    rng = np.random.default_rng(seed)
    row, column = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    frequency = np.hypot(row, column)
    frequency[0, 0] = np.inf
    for _ in range(count):
        noise = rng.standard_normal((3, *frequency.shape, 2)) @ (1, 1j)
        fields = np.fft.irfft2(noise / frequency, s=(size, size))
        fields /= fields.std(axis=(1, 2), keepdims=True)
        light, *colours = fields
        r, b = (0.35 * c for c in colours)
        rgb = 127 + 50 * np.stack([light + r, light - 0.4 * (r + b), light + b], -1)
        yield np.clip(rgb, 0, 255).astype(np.uint8)


def _jpegs(count: int, size: int) -> Iterator[bytes]:
    import simplejpeg

    quality = 75 if size < 64 else 90
    for pixels in photos(count, size, seed=size):
        yield simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling="420")


def _sounds(count: int) -> Iterator[bytes]:
    import soundfile

    rng = np.random.default_rng(1)
    for _ in range(count):
        time = np.arange(rng.integers(SAMPLE_RATE // 2, 5 * SAMPLE_RATE)) / SAMPLE_RATE
        tones = sum(
            np.sin(2 * np.pi * rng.uniform(80, 2000) * time + rng.uniform(0, 6)) for _ in range(4)
        )
        samples = 0.15 * tones * np.exp(-time) + 0.02 * rng.standard_normal(len(time))
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        yield file.getvalue()


def _texts(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(2)
    for _ in range(count):
        yield " ".join(rng.choice(_WORDS.split(), rng.integers(5, 40))).encode()


def _features(count: int) -> Iterator[bytes]:
    rng = np.random.default_rng(3)
    for _ in range(count):
        file = io.BytesIO()
        np.save(file, rng.standard_normal((rng.integers(10, 50), FEATURES), np.float32))
        yield file.getvalue()


_MADE: dict[str, tuple[int, str, Callable[[int], Iterator[bytes]]]] = {
    "image32": (16_000, "jpg", lambda n: _jpegs(n, 32)),
    "image224": (1_000, "jpg", lambda n: _jpegs(n, 224)),
    "image256": (1_000, "jpg", lambda n: _jpegs(n, 256)),
    "audio": (800, "flac", _sounds),
    "text": (16_000, "txt", _texts),
    "features": (8_000, "npy", _features),
}
"""Samples, extension and what makes them."""


def extension(name: str) -> str:
    """What the payloads of a data set are."""
    return _MADE[name][1]


def shard_paths(name: str) -> list[Path]:
    """The tar files of a data set; made at the first use and kept in the temporary folder."""
    count, ext, make = _MADE[name]
    folder = _FOLDER / name
    paths = [folder / f"{name}-{i:06d}.tar" for i in range(SHARDS)]
    if not (folder / "whole").exists():
        folder.mkdir(parents=True, exist_ok=True)
        payloads = make(count)
        for first, path in enumerate(paths):
            with tarfile.open(path, "w") as tar:
                for i in range(count // SHARDS):
                    key = f"{first * (count // SHARDS) + i:06d}"
                    _add(tar, f"{key}.{ext}", next(payloads))
                    _add(tar, f"{key}.cls", str(i % CLASSES).encode())
        (folder / "whole").touch()
    return paths


def open_shards(name: str) -> ShardSet:
    """A data set, opened as users open WebDataset shards that came without an index."""
    return ShardSet.open(str(shard_paths(name)[0].parent))


def folder_of_small_images(count: int) -> Path:
    """Shards of ``count`` pictures of 32x32 that ``prepare`` made; 2,000 of them are different."""
    folder = _FOLDER / f"prepared{count}"
    if not (folder / "manifest.json").exists():
        different = list(_jpegs(2_000, 32))
        source = _tar_of(
            f"small{count}", (different[i % len(different)] for i in range(count)), "jpg"
        )
        prepare("images", source, folder, "--split", "train=0.98,val=0.01,test=0.01")
    return folder


def prepared_folders() -> tuple[Path, str]:
    """Prepared folders image, text and audio, and where they come from: "real" or "synthetic".

    The real ones are CIFAR-10, sentences about its classes and ESC-10, where ../shared/data is.
    """
    real = next((p for p in (ROOT / "shared" / "data", ROOT.parent / "shared" / "data")
                 if (p / "cifar10_jpeg.tar").exists()), None)  # fmt: skip
    kind = "synthetic" if real is None else "real"
    folder = _FOLDER / kind
    sources = {
        "image": ("images", "cifar10_jpeg.tar", ()),
        "text": ("text", "cifar10_prompts.json", ()),
        "audio": ("audio", "esc10_ogg.tar", ("--sample-rate", str(SAMPLE_RATE))),
    }
    for name, (command, file, options) in sources.items():
        if (folder / name / "manifest.json").exists():
            continue
        source = _made_source(name) if real is None else real / file
        prepare(command, source, folder / name, *options)
    return folder, kind


def prepare(kind: str, source: Path, out: Path, *options: str) -> None:
    """``python -m uml_fast.prepare`` in a process of its own."""
    command = [sys.executable, "-m", "uml_fast.prepare", kind, str(source), str(out), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr}")


def _made_source(name: str) -> Path:
    """Inputs of ``prepare``, as many as the real ones."""
    if name == "image":
        return _tar_of(name, _jpegs(10_000, 32), "jpg")
    if name == "audio":
        return _tar_of(name, _sounds(120), "flac")
    path = _FOLDER / "sentences.json"
    texts = [t.decode() for t in _texts(300)]
    path.write_text(json.dumps({f"class{c}": texts[c::CLASSES] for c in range(CLASSES)}))
    return path


def _tar_of(name: str, payloads: Iterable[bytes], ext: str) -> Path:
    """A tar file of class folders."""
    path = _FOLDER / f"{name}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i, payload in enumerate(payloads):
            _add(tar, f"class{i % CLASSES}/{i:06d}.{ext}", payload)
    return path


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
