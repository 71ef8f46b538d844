"""Two hundred shards with flipped or missing bytes: no crash, no hang, every fault is named."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.made_files import image, run, sound, tar, write
from tests.data.test_bad_input import IMAGE, NUMBERS, SOUND, WORDS, array
from uml_fast.config import MixConfig, ModalityConfig
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import Backend, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.in_memory import in_memory
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.source import ShardSource
from uml_fast.data.source import DataError

# of headers that numpy and Pillow find odd; turned into errors they would depend on the thread
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
SHARDS = 50
"""Of each kind; there are four."""
SAMPLES = 6
KINDS: dict[str, tuple[ModalityConfig, str, Callable[[int], bytes]]] = {
    "images": (IMAGE, "jpg", image),
    "audio": (SOUND, "flac", lambda i: sound(i, 300 + 40 * i, form="FLAC")),
    "text": (WORDS, "txt", lambda i: f"sentence {i}: caf\u00e9 au lait".encode()),
    "features": (NUMBERS, "npy", lambda i: array(np.full((i + 1, 3), i, np.float32))),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def flipped(content: bytes, rng: np.random.Generator) -> bytes:
    """Up to 20 other bytes, or of one in five an end that is missing."""
    if rng.random() < 0.2:
        return content[: rng.integers(len(content))]
    return changed(content, rng)


def changed(content: bytes, rng: np.random.Generator) -> bytes:
    """Up to 20 other bytes, at places that are none of a tar file's filling most of the time."""
    data = np.frombuffer(content, np.uint8).copy()
    used = np.flatnonzero(data)
    places = rng.choice(used, rng.integers(1, 20))
    data[places] = rng.integers(0, 256, len(places))
    return data.tobytes()


def read_all(
    shards: ShardSet, config: ModalityConfig, backend: Backend = "webdataset"
) -> tuple[int, int]:
    """Read an epoch and more with the loader, and each sample once; samples kept, samples named."""
    errors = DataErrors(10_000)
    with shards:
        source = ShardSource(
            config.name, shards, decode_of(config, backend), rows_of(config), errors, seed=0
        )
        mix = MixConfig(token_budget=max(64, 2 * int(source.lengths.max())))
        with Loader((source,), layouts_of((source,), mix), mix, 0, slots=2, timeout_s=20) as loader:
            while loader.epochs()[config.name] < 1:
                next(loader)
        try:
            kept = len(in_memory(source))
        except DataError as e:
            assert "none of" in str(e) and "can be read" in str(e)
            kept = 0
    assert kept + len(errors) == len(shards)
    return kept, len(errors)


def outcome(
    open_it: Callable[[], ShardSet],
    config: ModalityConfig,
    name: str,
    backend: Backend = "webdataset",
) -> str:
    try:
        _, errors = read_all(open_it(), config, backend)
    except DataError as e:
        assert name in str(e) or config.name in str(e), str(e)
        return "refused"
    return "named" if errors else "whole"


@pytest.mark.parametrize("kind", KINDS)
def test_tar_files_that_are_scanned(kind: str, tmp_path: Path):
    config, extension, make = KINDS[kind]
    files = [(f"s{i}.{e}", c) for i in range(SAMPLES)
             for e, c in (("cls", b"1"), (extension, make(i)))]  # fmt: skip
    path = tar(tmp_path / "a.tar", files)
    whole = path.read_bytes()
    assert outcome(lambda: ShardSet.open(path), config, "a.tar") == "whole"
    rng = np.random.default_rng(sum(map(ord, kind)))
    seen = []
    for _ in range(SHARDS):
        path.write_bytes(flipped(whole, rng))
        seen.append(outcome(lambda: ShardSet.open(path), config, "a.tar"))
    assert seen.count("refused") > SHARDS // 4, seen


def prepared(kind: str, folder: Path) -> Path:
    _, extension, make = KINDS[kind]
    if kind == "text":
        rows = "".join(f"{make(i).decode()},cat\n" for i in range(SAMPLES))
        place = write(folder / "t.csv", "text,label\n" + rows)
    else:
        place = folder / "in"
        for i in range(SAMPLES):
            write(place / "cat" / f"{i}.{extension}", make(i))
    run(kind, place, folder / "out", "--split", "train=1")
    return folder / "out"


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_shards_whose_index_is_whole(kind: str, backend: Backend, tmp_path: Path):
    config = KINDS[kind][0]
    out = prepared(kind, tmp_path)

    def opened() -> ShardSet:
        return ShardSet.open(out, "train")

    path = out / "train-000000.tar"
    whole = path.read_bytes()
    rng = np.random.default_rng(1 + sum(map(ord, kind)))
    seen = []
    for _ in range(SHARDS):
        path.write_bytes(flipped(whole, rng))
        seen.append(outcome(opened, config, "train-000000.tar", backend))
    assert {"refused", "named"} <= set(seen), seen
    path.write_bytes(whole)
    with ShardSet.open(out, "train") as shards:
        assert not [*shards.verify()]


@pytest.mark.parametrize("name", ["train.index.npz", "manifest.json"])
def test_index_and_manifest(name: str, tmp_path: Path):
    out = prepared("features", tmp_path)
    whole = (out / name).read_bytes()
    rng = np.random.default_rng(len(name))
    seen = []
    for _ in range(2 * SHARDS):
        (out / name).write_bytes(flipped(whole, rng))
        seen.append(outcome(lambda: ShardSet.open(out, "train"), NUMBERS, str(out)))
    assert seen.count("refused") > SHARDS, seen


def test_the_index_kept_beside_a_tar_file(tmp_path: Path):
    files = [(f"s{i}.txt", b"some words %d" % i) for i in range(SAMPLES)]
    path = tar(tmp_path / "a.tar", files)
    ShardSet.open(path).close()
    kept = path.with_suffix(".index.npz")
    whole = kept.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(SHARDS):
        kept.write_bytes(flipped(whole, rng))
        # a broken copy of an index is no fault of the shard: it is made again
        assert outcome(lambda: ShardSet.open(path), WORDS, "a.tar") == "whole"


def test_arrays_and_images_that_promise_gigabytes_take_no_memory(tmp_path: Path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3)}
    )
    files = [("a.npy", header.getvalue()), ("b.npy", array(np.ones((2, 3), np.float32)))]
    shards = ShardSet.open(tar(tmp_path / "a.tar", files))
    assert shards.length.tolist() == [[-1], [2]]
    assert read_all(shards, NUMBERS) == (1, 1)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
