"""Bad input, over every backend: named and counted, skipped up to the limit, else a clear error."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from tests.data.made_files import image, run, sound, tar, write
from tests.data.test_small_folders import config as run_of
from uml_fast.config import MixConfig, ModalityConfig
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import Backend, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.folders import FoldersConfig
from uml_fast.data.in_memory import in_memory
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.index import ShardIndex
from uml_fast.data.shards.source import ShardSource
from uml_fast.data.source import DataError
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig

IMAGE = ImageConfig(name="image", height=8, width=12, patch_height=4, patch_width=4)
SOUND = AudioConfig(
    name="audio", sample_rate=8000, row_samples=160, frames=2, window=160, positions=30
)
WORDS = TextConfig(name="text", vocabulary=256, positions=40)
NUMBERS = FeaturesConfig(name="features", size=3)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def array(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def good(config: ModalityConfig, i: int) -> tuple[str, bytes]:
    """Extension and bytes of a sample of a modality."""
    if config is IMAGE:
        return "jpg", image(i)
    if config is SOUND:
        return "wav", sound(i)
    if config is WORDS:
        return "txt", f"sample {i} is fine".encode()
    return "npy", array(np.full((4, 3), i, np.float32))


def source_of(config: ModalityConfig, shards: ShardSet, errors: DataErrors, backend: Backend):
    return ShardSource(
        config.name, shards, decode_of(config, backend), rows_of(config), errors, seed=0
    )


def nan(i: int) -> np.ndarray:
    values = np.ones((4, 3), np.float32)
    values[2, 1] = (np.nan, np.inf)[i]
    return values


HUGE = image(0).replace(b"\x00\x0a\x00\x0c", b"\xff\xdc\xff\xdc")  # 65500 x 65500 in its header
BROKEN = {
    "truncated JPEG": (IMAGE, image(0)[:-40], "broken|JPEG"),
    "zero-byte image": (IMAGE, b"", "broken image"),
    "not an image": (IMAGE, b"GIF89a", "broken image"),
    "truncated PNG": (IMAGE, image(0, form="PNG")[:-60], "broken image"),
    "an image of 65500 x 65500": (IMAGE, HUGE, "65500 x 65500 pixels"),
    "zero-byte sound": (SOUND, b"", "broken: its length cannot be read"),
    "not a sound": (SOUND, b"RIFF    WAVEjunk", "broken: its length cannot be read"),
    "wrong sample rate": (SOUND, sound(0, rate=44100), "44100 Hz with 1 channels; the run takes 8"),
    "stereo": (SOUND, sound(0, channels=2), "8000 Hz with 2 channels; the run takes 8000 Hz mono"),
    "zero-byte text": (WORDS, b"", "empty: it has no row"),
    "invalid UTF-8": (WORDS, b"caf\xe9 au lait", "no UTF-8 at byte 3; store it as UTF-8"),
    "invalid UTF-8 behind what is read": (WORDS, b"x" * 60 + b"\xff", "no UTF-8 at byte 60"),
    "zero-byte array": (NUMBERS, b"", "broken: its length cannot be read"),
    "NaN": (NUMBERS, array(nan(0)), "NaN or infinity"),
    "infinity": (NUMBERS, array(nan(1)), "NaN or infinity"),
    "wrong width": (NUMBERS, array(np.ones((4, 5), np.float32)), r"shape \[4, 5\].*\[4, 3\]"),
    "three axes": (NUMBERS, array(np.ones((4, 3, 1), np.float32)), r"shape \[4, 3, 1\]"),
    "truncated array": (NUMBERS, array(np.ones((4, 3), np.float32))[:-4], "broken: its length"),
    "words as features": (NUMBERS, array(np.array([["a", "b", "c"]])), "features are numbers"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_bad_sample_is_named_counted_and_skipped(case: str, backend: Backend, tmp_path: Path):
    config, bad, message = BROKEN[case]
    extension = good(config, 0)[0]
    files = [(f"s{i:02}.{extension}", bad if i == 5 else good(config, i)[1]) for i in range(12)]
    shards = ShardSet.open(tar(tmp_path / "a.tar", files))
    errors = DataErrors(1, tmp_path / "data_errors.jsonl")
    source = source_of(config, shards, errors, backend)
    kept = in_memory(source)
    assert kept.keys == tuple(f"s{i:02}" for i in range(12) if i != 5)
    mix = MixConfig(token_budget=2 * int(source.offsets[-1]))
    with Loader((source,), layouts_of((source,), mix), mix, seed=0, threads=2) as loader:
        seen = set()
        for _ in range(4):
            batch, _ = next(loader)
            seen |= {source.key(int(i)) for i in batch.sample_S if i >= 0}
    assert seen == set(kept.keys)
    (line,) = map(json.loads, (tmp_path / "data_errors.jsonl").read_text().splitlines())
    assert (line["modality"], line["sample"]) == (config.name, "s05")
    with pytest.raises(
        DataError, match=f"{config.name}, sample s05: .*({message}).*max_errors is 0"
    ):
        in_memory(source_of(config, shards, DataErrors(0), backend))


def prepared(tmp_path: Path, count: int = 12) -> Path:
    for name in ("cat", "dog"):
        for i in range(count):
            write(tmp_path / "in" / name / f"{i}.jpg", image(i + len(name)))
    run("images", tmp_path / "in", tmp_path / "out", "--shard-size-mib", "0.01")
    return tmp_path / "out"


def test_a_label_that_is_no_class_is_named_and_left_out(backend: Backend, tmp_path: Path):
    out = prepared(tmp_path)
    index = ShardIndex.load(out / "train.index.npz")
    keys = [bytes(index.keys[i]).decode() for i in (0, 3)]
    index.label[[0, 3]] = (7, -9)
    index.label[1] = -1  # without a class is no fault
    index.save(out / "train.index.npz")

    def load(most: int):
        config = run_of(out, out=tmp_path / "run")
        data = FoldersConfig(image=out, max_errors=most, backend=backend)
        return dataclasses.replace(config, data=data).load(0, "uml")

    task = load(2)
    assert len(task.train[0]) == len(index) - 2
    assert {task.train[0].key(i) for i in range(len(task.train[0]))}.isdisjoint(keys)
    lines = [*map(json.loads, (tmp_path / "run" / "data_errors.jsonl").read_text().splitlines())]
    assert [line["sample"] for line in lines] == keys
    assert lines[0]["problem"] == "label 7 is no class of the training samples"
    with pytest.raises(DataError, match=r"2 samples cannot be read, data\.max_errors is 1"):
        load(1)


@pytest.mark.parametrize("fault", ["vanishes", "is truncated", "becomes unreadable"])
def test_a_shard_that_goes_while_it_is_read(
    fault: str, backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    paths = []
    for n in range(2):
        files = [(f"{n}-{i:02}.jpg", image(50 * n + i)) for i in range(24)]
        paths.append(tar(tmp_path / f"{n}.tar", files))
    shards = ShardSet.open(tmp_path)
    errors = DataErrors(24, tmp_path / "data_errors.jsonl")
    source = source_of(IMAGE, shards, errors, backend)
    mix = MixConfig(token_budget=40)
    with Loader((source,), layouts_of((source,), mix), mix, seed=0, slots=2) as loader:
        next(loader)
        if fault == "is truncated":
            os.truncate(paths[1], 600)
        else:
            shards.close()  # as where more shards are read than stay open
        if fault == "vanishes":
            paths[1].unlink()
        elif fault == "becomes unreadable":
            real = os.open

            def refused(path, *rest):
                if Path(path) == paths[1]:
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path, *rest)

            monkeypatch.setattr(os, "open", refused)
        seen = {int(i) for _ in range(30) for i in next(loader)[0].sample_S}
    assert {i for i in range(24) if source.key(i)[0] == "0"} <= seen
    named = [json.loads(x) for x in (tmp_path / "data_errors.jsonl").read_text().splitlines()]
    assert 20 < len(errors) <= 24 and all(x["sample"].startswith("1-") for x in named)
    assert all(str(paths[1]) in x["problem"] for x in named)
    strict = source_of(IMAGE, shards, DataErrors(3), backend)
    with (
        Loader((strict,), layouts_of((strict,), mix), mix, seed=0) as loader,
        pytest.raises(DataError, match=r"4 samples cannot be read, data\.max_errors is 3"),
    ):
        for _ in range(30):
            next(loader)


class TestTarFiles:
    def test_compressed(self, tmp_path: Path):
        for mode, name in (("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")):
            path = tmp_path / f"a.{mode}.tar"
            with tarfile.open(path, f"w:{mode}") as file:
                file.addfile(tarfile.TarInfo("a.txt"))
            with pytest.raises(DataError, match=f"is compressed \\({name}\\).*unpack it"):
                ShardSet.open(path)

    def test_a_folder_in_the_place_of_a_tar_file(self, tmp_path: Path):
        tar(tmp_path / "0.tar", [("a.txt", b"x")])
        (tmp_path / "1.tar").mkdir()
        with pytest.raises(DataError, match=r"1\.tar is a folder, not a tar file"):
            ShardSet.open(tmp_path)

    def test_unreadable(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        path = tar(tmp_path / "0.tar", [("a.txt", b"x")])

        def refused(self, *rest, **more):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr(Path, "open", refused)
        with pytest.raises(DataError, match=r"0\.tar cannot be read: Permission denied; make it"):
            ShardSet.open(path)

    def test_sparse(self, tmp_path: Path):
        with (tmp_path / "hole.txt").open("wb") as file:
            file.seek(1 << 20)
            file.write(b"end")
        made = subprocess.run(
            ["tar", "--sparse", "-cf", "a.tar", "hole.txt"], cwd=tmp_path, check=False
        )
        if made.returncode or (tmp_path / "a.tar").stat().st_size > 1 << 20:
            pytest.skip("this tar or this file system makes no sparse member")
        with pytest.raises(DataError, match=r"member 'hole\.txt' is sparse; make the file without"):
            ShardSet.open(tmp_path / "a.tar")

    def test_the_index_of_another_tar_file(self, tmp_path: Path):
        out = prepared(tmp_path)
        place = out / "train.index.npz"
        index = ShardIndex.load(place)
        index.offset[:] += 1 << 20
        index.save(place)
        with pytest.raises(DataError, match="the index belongs to another one"):
            ShardSet.open(out, "train")

    def test_an_index_that_names_shards_that_are_not_there(self, tmp_path: Path):
        out = prepared(tmp_path)
        index = ShardIndex.load(out / "train.index.npz")
        index.shard[0] = 99
        index.save(out / "train.index.npz")
        with pytest.raises(DataError, match="index names shards beyond"):
            ShardSet.open(out, "train")
