"""The native JPEG decoder gives libjpeg-turbo's pixels, bit for bit, or leaves the file alone."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import pytest

from uml_fast.config import MixConfig
from uml_fast.data.augment import AugmentConfig
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.shards.direct import DirectImages
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.source import ShardSource
from uml_fast.modalities.image import ImageConfig, from_patches
from uml_fast.prepare import Images, build
from uml_fast.runtime import native

simplejpeg = pytest.importorskip("simplejpeg")
pytestmark = pytest.mark.native

# whole blocks; one pixel more and less than blocks and than pairs of them; odd; tall; wide; narrow
SIZES = ((32, 32), (33, 47), (17, 16), (15, 31), (64, 40), (8, 8), (7, 5), (3, 90), (90, 6))
SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


@pytest.fixture(params=SETS)
def extension(request: pytest.FixtureRequest):
    """The extension with the kernels of one instruction set."""
    module = native.module()
    before = module.cpu.instruction_set()
    try:
        module.cpu.use_instruction_set(request.param)
    except ValueError as e:
        pytest.skip(str(e))
    yield module
    module.cpu.use_instruction_set(before)


def pictures(height: int, width: int) -> list[np.ndarray]:
    """Smooth, noise, flat, and black next to white (values that clip)."""
    rng = np.random.default_rng(height * width)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([3 * x, 2 * y, x + y], -1) % 256
    noise = rng.integers(0, 256, (height, width, 3))
    edges = 255 * ((x // 3 + y // 5) % 2)[:, :, None].repeat(3, 2)
    return [p.astype(np.uint8) for p in (smooth, noise, np.full_like(noise, 255), edges)]


def read(
    module, payloads: list[bytes], height: int, width: int, channels: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (n, h, w, c), and whether each was read."""
    sizes = np.array([len(p) for p in payloads], np.int64)
    out = np.zeros(len(payloads) * height * width * channels, np.uint8)
    is_read = np.ones(len(payloads), np.bool_)
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(payloads))
        file.flush()
        module.read_jpegs(
            np.full(len(payloads), file.fileno(), np.int32), np.cumsum(sizes) - sizes, sizes,
            height, width, channels, height, width, out, is_read,
        )  # fmt: skip
    return out.reshape(-1, height, width, channels), is_read


@pytest.mark.parametrize("sampling", ["444", "422", "420", "Gray"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_libjpeg_turbo(extension, sampling: str, channels: int) -> None:
    for height, width in SIZES:
        payloads = []
        for picture in pictures(height, width):
            for quality in (10, 75, 90, 100):
                if sampling == "Gray":
                    grey = np.ascontiguousarray(picture[:, :, :1])
                    options = {"colorspace": "GRAY", "colorsubsampling": "Gray"}
                    payloads.append(simplejpeg.encode_jpeg(grey, quality, **options))
                else:
                    payloads.append(
                        simplejpeg.encode_jpeg(picture, quality, colorsubsampling=sampling)
                    )
        got, is_read = read(extension, payloads, height, width, channels)
        assert is_read.all() or (width <= 4 and sampling in ("420", "422")), (height, width)
        for payload, pixels in zip(payloads, got, strict=True):
            want = simplejpeg.decode_jpeg(payload, "RGB" if channels == 3 else "GRAY", strict=True)
            np.testing.assert_array_equal(pixels, want, err_msg=f"{height}x{width}")


def test_optimised_tables_follow_default_ones(extension) -> None:
    """Tables of the file before are kept, but never used for one that has others."""
    from PIL import Image

    payloads = []
    for picture in pictures(48, 64):
        for options in ({"optimize": True}, {}, {"optimize": True, "quality": 97}):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", **options)
            payloads.append(file.getvalue())
    got, is_read = read(extension, payloads, 48, 64)
    assert is_read.all()
    for payload, pixels in zip(payloads, got, strict=True):
        np.testing.assert_array_equal(pixels, simplejpeg.decode_jpeg(payload))


def test_other_files_are_left_alone() -> None:
    from PIL import Image

    picture = Image.fromarray(pictures(32, 32)[0])
    cases = {}
    for name, mode, options in (
        ("progressive", "RGB", {"format": "JPEG", "progressive": True}),
        ("CMYK", "CMYK", {"format": "JPEG"}),
        ("restarts", "RGB", {"format": "JPEG", "restart_marker_blocks": 1}),
        ("png", "RGB", {"format": "PNG"}),
    ):
        file = io.BytesIO()
        picture.convert(mode).save(file, **options)
        cases[name] = file.getvalue()
    whole = simplejpeg.encode_jpeg(np.asarray(picture))
    cases |= {"empty": b"", "other size": simplejpeg.encode_jpeg(pictures(40, 32)[0])}
    cases |= {f"cut at {n}": whole[:n] for n in range(1, len(whole), 7)}
    cases |= {"no end": whole[:-2], "half an end": whole[:-1], "more": whole[:-2] + b"\0\0\xff\xd9"}
    _, is_read = read(native.module(), list(cases.values()), 32, 32)
    assert not is_read.any(), [n for n, r in zip(cases, is_read, strict=True) if r]


def test_flipped_bytes_are_left_alone_or_decoded_as_libjpeg_does(extension) -> None:
    rng = np.random.default_rng(0)
    whole = simplejpeg.encode_jpeg(pictures(40, 56)[1], 60, colorsubsampling="420")
    header = len(whole) - 1500
    payloads = []
    for i in range(3000):
        broken = bytearray(whole)
        for at in rng.integers(0, header if i % 2 else len(whole), 1 + i % 3):
            broken[at] = rng.integers(256)
        payloads.append(bytes(broken))
    got, is_read = read(extension, payloads, 40, 56)
    assert 500 < is_read.sum() < 2500
    for at in np.flatnonzero(is_read):
        want = simplejpeg.decode_jpeg(payloads[at], strict=True)
        np.testing.assert_array_equal(got[at], want)


@pytest.fixture
def shards(tmp_path: Path):
    """Shards of 40 pictures of which some are PNG, of another size, progressive or broken."""
    from PIL import Image

    source = tmp_path / "photos"
    for i in range(40):
        height = 24 if i % 10 == 3 else 32
        image = Image.fromarray(pictures(height, 32)[i % 2])
        path = source / f"c{i % 4}" / f"{i:02d}.{'png' if i % 10 == 5 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, **({"progressive": True} if i % 10 == 7 else {}))
    build(Images(source=source, out=tmp_path / "shards", split="train=1").job(), io.StringIO())
    with ShardSet.open(tmp_path / "shards", "train") as found:
        yield found


CONFIG = ImageConfig(name="image", height=32, width=32, patch_height=8, patch_width=16)


def source(shards: ShardSet, is_direct: bool, errors: DataErrors) -> ShardSource:
    return ShardSource(
        "image", shards, decode_of(CONFIG), rows_of(CONFIG, AugmentConfig()), errors,
        direct=DirectImages(CONFIG) if is_direct else None,
    )  # fmt: skip


def test_packs_are_the_same_with_and_without(shards: ShardSet) -> None:
    mix = MixConfig(token_budget=64)
    packs = []
    for is_direct in (True, False):
        sources = (source(shards, is_direct, DataErrors(0)),)
        with Loader(sources, layouts_of(sources, mix), mix, seed=1) as loader:
            packs.append([next(loader)[0].raw[0].numpy().copy() for _ in range(20)])
    np.testing.assert_array_equal(packs[0], packs[1])


def test_most_are_read_directly_and_the_rest_one_by_one(shards: ShardSet) -> None:
    samples = np.random.default_rng(0).permutation(40)
    out = np.zeros((40 * CONFIG.patches, 8 * 16 * 3), np.uint8)
    is_read = DirectImages(CONFIG).read(shards, samples, out)
    number = np.array([int(shards.key(i).rpartition("/")[2]) for i in samples])
    np.testing.assert_array_equal(is_read, ~np.isin(number % 10, (3, 5, 7)))
    for place in np.flatnonzero(is_read):
        want = simplejpeg.decode_jpeg(shards.payload(samples[place]))
        got = from_patches(out[place * CONFIG.patches :][: CONFIG.patches], CONFIG)
        np.testing.assert_array_equal(got, want)


def test_a_broken_file_is_named_and_its_neighbours_are_read(shards: ShardSet) -> None:
    at = int(np.flatnonzero(np.char.endswith(shards.index.keys, b"01"))[0])
    path = shards.paths[shards.index.shard[at]]
    tar = bytearray(path.read_bytes())
    end = int(shards.index.offset[at] + shards.index.size[at])
    tar[end - 60 : end] = bytes(60)
    path.write_bytes(tar)
    errors = DataErrors(5)
    out = np.zeros((40 * CONFIG.patches, 8 * 16 * 3), np.uint8)
    assert source(shards, True, errors).read(np.arange(40), out) == [at]
    assert len(errors) == 1
    want = np.zeros_like(out)
    assert source(shards, False, DataErrors(5)).read(np.arange(40), want) == [at]
    kept = np.arange(40).repeat(CONFIG.patches) != at
    np.testing.assert_array_equal(out[kept], want[kept])
