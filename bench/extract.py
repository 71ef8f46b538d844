"""Feature extraction against timm's own inference loop, and reading features against a grid.

    python -m pytest bench/extract.py      writes bench/results/extract_<machine>.json

Extraction: JPEG photos of 400x400 through a network of random weights, decoded, resized and cut to
224x224, at the same batch and dtype. timm's side is its ``inference.py``: ``create_loader`` with
two workers that live on, ``torch.inference_mode``, features copied to numpy a batch. Ours is the
whole ``extract``: shards read, features, file with checksum written and read again.

Reading: ``load_features`` of the images and texts of a grid against training 24 of its heads for
300 steps; table 5 has ten times as many heads for each of 45 settings, of up to 12,800 steps.
"""

from __future__ import annotations

import functools
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import harness
from bench.loader_data import photos
from uml_fast.data.shards.files import ShardSet
from uml_fast.encoders.cache import load_features, save_features
from uml_fast.encoders.extraction import extract
from uml_fast.encoders.image import ImageEncoder
from uml_fast.grid import HeadData, HeadSchedule, product, train_grid
from uml_fast.runtime.foreign import import_timm
from uml_fast.runtime.progress import StatusLine

IMAGES, BATCH, SIZE = 32, 16, 224
NETWORKS = ("vit_small_patch16_224", "resnet50")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CLOCK = harness.RecordedClock()
ROWS: list[dict[str, Any]] = []
KEYS = ("what", "network", "dtype", "provider")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG files, the same as shards, and the networks."""
    import simplejpeg

    timm = import_timm()
    root = tmp_path_factory.mktemp("extract")
    (root / "photos" / "a").mkdir(parents=True)
    with tarfile.open(root / "photos.tar", "w") as tar:
        for i, pixels in enumerate(photos(IMAGES, 400, seed=0)):
            jpeg = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")
            (root / "photos" / "a" / f"{i:03}.jpg").write_bytes(jpeg)
            info = tarfile.TarInfo(f"{i:03}.jpg")
            info.size = len(jpeg)
            tar.addfile(info, io.BytesIO(jpeg))
    for name in NETWORKS:
        torch.manual_seed(0)
        model = timm.create_model(name)
        timm.models.save_for_hf(model, root / name, safe_serialization=True)
    return root


def of_timm(root: Path, name: str, dtype: torch.dtype) -> Iterator[Callable[[], np.ndarray]]:
    """timm's inference loop."""
    timm = import_timm()
    model = timm.create_model(f"local-dir:{root / name}", pretrained=True)
    model.reset_classifier(0)
    model = model.eval().to(dtype)
    config = model.pretrained_cfg
    loader = timm.data.create_loader(
        timm.data.create_dataset("", root / "photos"), (3, SIZE, SIZE), BATCH, num_workers=2,
        use_prefetcher=False, persistent_workers=True, interpolation="bicubic", crop_pct=1.0,
        mean=config["mean"], std=config["std"],
    )  # fmt: skip

    def run() -> np.ndarray:
        found = []
        with torch.inference_mode():
            for images, _ in loader:
                found.append(model(images.to(dtype)).float().numpy())
        return np.concatenate(found)

    yield run


def of_ours(root: Path, name: str, dtype: torch.dtype) -> Callable[[], np.ndarray]:
    """Shards to a file of features."""
    encoder = ImageEncoder(str(root / name), torch.device("cpu"), dtype, size=SIZE)
    shards = ShardSet.open(root / "photos.tar")
    path = root / f"image-{name}-{dtype}.safetensors"
    status = StatusLine(io.StringIO())

    def run() -> np.ndarray:
        path.unlink(missing_ok=True)
        extract(shards, encoder, path, max_errors=0, batch=BATCH, status=status)
        return load_features(path).rows.numpy()

    return run


@functools.cache
def measured(root: Path, name: str, dtype: str) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Rounds and row of each provider."""
    calls = {
        "timm": next(of_timm(root, name, DTYPES[dtype])),
        "uml_fast": of_ours(root, name, DTYPES[dtype]),
    }
    a, b = (torch.from_numpy(call()) for call in calls.values())
    # Pillow's draft of a JPEG, and another order of roundings
    assert (torch.cosine_similarity(a, b) > 0.99).all(), "both encode the same images"
    load_before = round(os.getloadavg()[0], 2)
    seconds = harness.measure(calls, rounds=dict.fromkeys(calls, 5), warmup_rounds=1, budget_s=30)
    ours = harness.quantiles(seconds["uml_fast"])["p50_ms"]
    out = {}
    for provider, values in seconds.items():
        spread = harness.quantiles(values)
        row = {
            "what": "extract", "network": name, "dtype": dtype, "provider": provider,
            "batch": BATCH, "images": IMAGES, **spread,
            "images_per_s": round(1000 * IMAGES / spread["p50_ms"], 1),
            "times_ours": round(spread["p50_ms"] / ours, 2), "rounds": len(values),
            "threads": torch.get_num_threads(), "load_before": load_before,
        }  # fmt: skip
        out[provider] = (values, row)
    return out


def record(benchmark: Any, group: str, values: list[float], row: dict[str, Any]) -> None:
    """Hand the rounds to pytest-benchmark and write the rows."""
    CLOCK.load(values)
    benchmark.group = group
    benchmark.extra_info.update(row)
    benchmark.pedantic(lambda: None, rounds=len(values))
    ROWS.append(row)
    harness.merge_rows(harness.RESULTS / f"extract_{harness.machine_name()}.json", ROWS, KEYS)


@pytest.mark.benchmark(group="extract", timer=CLOCK)
@pytest.mark.parametrize("provider", ["uml_fast", "timm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("network", NETWORKS)
def test_extract(benchmark: Any, place: Path, network: str, dtype: str, provider: str) -> None:
    values, row = measured(place, network, dtype)[provider]
    record(benchmark, f"extract, {network}, {dtype}", values, row)


@functools.cache
def reading(root: Path) -> dict[str, list[float]]:
    """Seconds of reading features of a data set of 100 classes, and of a small part of a grid."""
    rng = np.random.default_rng(0)
    names = [str(c) for c in range(100)]
    sizes = {"image-train": (4128, 384), "image-val": (1649, 384), "image-test": (2465, 384),
             "text-train": (3000, 768)}  # fmt: skip
    for file, (n, width) in sizes.items():
        rows = torch.from_numpy(rng.normal(size=(n, width))).float()
        save_features(root / f"{file}.safetensors", rows, torch.arange(n) % 100, names)

    def read() -> list[Any]:
        return [load_features(root / f"{file}.safetensors") for file in sizes]

    image, val, test, text = read()
    data = HeadData(
        target="image", train={"image": image, "text": text}, validation=val, test=test, classes=100
    )
    cells = product(lr=(1e-3, 1e-4), weight_decay=(0.0, 0.01, 0.001), batch=(8, 32), shots=(4, 16))
    schedule = HeadSchedule(steps=300, patience=1000)
    return harness.measure(
        {"read": read, "grid": lambda: train_grid(data, cells, schedule)},
        rounds={"read": 8, "grid": 3}, warmup_rounds=1, budget_s=30,
    )  # fmt: skip


@pytest.mark.benchmark(group="read", timer=CLOCK)
@pytest.mark.parametrize("provider", ["read", "grid"])
def test_read(benchmark: Any, place: Path, provider: str) -> None:
    seconds = reading(place)
    ours = harness.quantiles(seconds["read"])["p50_ms"]
    spread = harness.quantiles(seconds[provider])
    row = {
        "what": "read", "network": "", "dtype": "fp32", "provider": provider, **spread,
        "times_ours": round(spread["p50_ms"] / ours, 1), "rounds": len(seconds[provider]),
        "threads": torch.get_num_threads(), "load_before": round(os.getloadavg()[0], 2),
    }  # fmt: skip
    record(benchmark, "reading features against 24 heads of 300 steps", seconds[provider], row)
