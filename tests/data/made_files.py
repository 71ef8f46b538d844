"""Small files of every kind, made up, for the tests of shards."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from uml_fast import prepare
from uml_fast.data.shards.files import ShardSet, read_manifest

Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")


def image(seed: int, size: tuple[int, int] = (12, 10), form: str = "JPEG") -> bytes:
    """An image of ``size`` (width, height)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


def sound(seed: int, samples: int = 400, rate: int = 8000, form: str = "WAV", channels: int = 1):
    """A sound as the bytes of a file."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    wave = rng.uniform(-0.5, 0.5, (samples, channels))
    soundfile.write(file, wave, rate, format=form)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    """Write a file, and the folders around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def image_folder(root: Path, per_class: int = 6, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Class folders of jpg files."""
    for c, name in enumerate(classes):
        for i in range(per_class):
            write(root / name / f"{i:03d}.jpg", image(100 * c + i))
    return root


def tar(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar file as any program writes it."""
    with tarfile.open(path, "w", format=form) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def run(kind: str, source: Path, out: Path, *more: str) -> dict:
    """Prepare in this process; returns the manifest."""
    assert prepare.main([kind, str(source), str(out), "--workers", "1", *more]) == 0
    return read_manifest(out)


def problems(out: Path) -> dict[str, str]:
    lines = (out / "problems.jsonl").read_text().splitlines()
    return {p["file"]: p["problem"] for p in map(json.loads, lines)}


def samples(out: Path, split: str = "train") -> dict[str, tuple[bytes, str]]:
    """Key -> (payload, class name or "")."""
    with ShardSet.open(out, split) as s:
        names = (*s.class_names, "")
        return {s.key(i): (s.payload(i), names[s.label[i]]) for i in range(len(s))}


ALL = ("--split", "train=1")
SKIP = ("--max-errors", "100")
