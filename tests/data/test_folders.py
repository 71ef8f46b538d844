"""Runs on prepared shards: decoding, classes by name, unreadable samples, training and resuming."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from uml_fast.config import (
    CheckpointConfig,
    ConfigError,
    EvalConfig,
    MixConfig,
    ModalityConfig,
    RunConfig,
)
from uml_fast.data.data_errors import DataErrors
from uml_fast.data.decoding.decode import DecodeError, decode_of
from uml_fast.data.decoding.rows import rows_of
from uml_fast.data.folders import FoldersConfig
from uml_fast.data.in_memory import in_memory
from uml_fast.data.loading.loader import Loader, layouts_of
from uml_fast.data.shards.files import ShardSet
from uml_fast.data.shards.source import ShardSource
from uml_fast.data.source import DataError
from uml_fast.modalities.audio import AudioConfig
from uml_fast.modalities.features import FeaturesConfig
from uml_fast.modalities.image import ImageConfig
from uml_fast.modalities.text import TextConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.prepare import main as prepare
from uml_fast.recipes import load_recipe
from uml_fast.train import train

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
IMAGE = ImageConfig(name="image", height=8, width=12, patch_height=4, patch_width=4)
SOUND = AudioConfig(
    name="audio", sample_rate=8000, row_samples=160, frames=2, window=160, positions=30
)
WORDS = TextConfig(name="text", vocabulary=256, positions=40)
ANIMALS = ("cat", "dog")


def picture(rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (8, 12, 3)).astype(np.uint8))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards for each modality, prepared from made-up files."""
    root = tmp_path_factory.mktemp("folders")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name in ANIMALS:
            folder = root / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(rng).save(folder / f"{i}.png")
    for name in ("bark", "rain"):
        (root / "sounds" / "train" / name).mkdir(parents=True)
        for i in range(6):
            wave = rng.normal(0, 0.1, rng.integers(500, 3000))
            soundfile.write(root / "sounds" / "train" / name / f"{i}.wav", wave, 8000)
    (root / "texts").mkdir()
    rows = [{"text": f"a {name} number {i}", "label": name} for name in ANIMALS for i in range(9)]
    (root / "texts" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for kind, source, out in (
        ("images", "pictures", "image"), ("audio", "sounds", "audio"), ("text", "texts", "text"),
    ):  # fmt: skip
        assert prepare([kind, str(root / source), str(root / "shards" / out)]) == 0
    return root / "shards"


def run_config(shards: Path, **changes: object) -> RunConfig:
    config = load_recipe("folders")
    data = FoldersConfig(
        image=shards / "image", audio=shards / "audio", text=shards / "text", same=("bark=dog",)
    )
    return dataclasses.replace(
        config,
        modalities=(IMAGE, WORDS, SOUND),
        data=data,
        backbone=TransformerConfig(width=16, layers=1, heads=2, feed_forward=32, dropout=0.1),
        mix=MixConfig(token_budget=400),
        eval=EvalConfig(probe=False, every=10),
        checkpoint=CheckpointConfig(every=5),
        steps=12,
        seeds=1,
        log_every=1,
        **changes,
    )


def source_of(config: ModalityConfig, shards: ShardSet, errors: DataErrors) -> ShardSource:
    return ShardSource(config.name, shards, decode_of(config), rows_of(config), errors)


def rows_from(config: ModalityConfig, payload: bytes, rows: int) -> np.ndarray:
    """Rows of one payload; raises what is wrong with it."""
    writer, (array,) = rows_of(config), decode_of(config)([payload])
    if isinstance(array, DecodeError):
        raise array
    out = np.empty((rows, writer.row_elems), writer.row_dtype)
    writer.write(array, out)
    return out


def test_decoded_rows_are_those_of_the_files(shards: Path) -> None:
    images = ShardSet.open(shards / "image", "train")
    source = in_memory(source_of(IMAGE, images, DataErrors(0)))
    for i in range(len(images)):
        pixels = np.asarray(Image.open(io.BytesIO(images.payload(i))))
        np.testing.assert_array_equal(source.sample(i)[1].reshape(4, 4, 3), pixels[:4, 4:8])
    sounds = ShardSet.open(shards / "audio", "train")
    source = in_memory(source_of(SOUND, sounds, DataErrors(0)))
    wave, _ = soundfile.read(io.BytesIO(sounds.payload(3)), dtype="int16")
    heard = source.sample(3).ravel()
    np.testing.assert_array_equal(heard[: len(wave)], wave[: len(heard)])
    assert (heard[len(wave) :] == 0).all() and len(heard) - len(wave) < 160
    texts = ShardSet.open(shards / "text", "train")
    source = in_memory(source_of(WORDS, texts, DataErrors(0)))
    assert bytes(source.sample(2)[:, 0].astype(np.uint8)) == texts.payload(2)[:40]


BROKEN = {
    "truncated JPEG": (IMAGE, (0, -30), "broken JPEG"),
    "not an image": (IMAGE, b"GIF89a", "broken image"),
    "not a sound": (SOUND, b"RIFF", "broken sound"),
    "text that became shorter": (WORDS, b"ab", "2 bytes; the index promises 4 rows"),
    "not an array": (FeaturesConfig(name="f", size=3), b"\x93NUMPY", "broken array"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_bytes_are_named(case: str) -> None:
    config, payload, message = BROKEN[case]
    if isinstance(payload, tuple):
        file = io.BytesIO()
        picture(np.random.default_rng(0)).save(file, "JPEG")
        payload = file.getvalue()[slice(*payload)]
    with pytest.raises(DecodeError, match=message):
        rows_from(config, payload, 4)


def test_features_and_sounds_that_do_not_fit_are_named() -> None:
    for values, message in (
        (np.ones((4, 2), np.float32), r"shape \[4, 2\], the run takes \[4, 3\]"),
        (np.full((4, 3), np.nan, np.float32), "NaN or infinity"),
    ):
        file = io.BytesIO()
        np.save(file, values)
        with pytest.raises(DecodeError, match=message):
            rows_from(FeaturesConfig(name="f", size=3), file.getvalue(), 4)
    file = io.BytesIO()
    soundfile.write(file, np.zeros(640), 44100, format="WAV")
    with pytest.raises(DecodeError, match="44100 Hz with 1 channels; the run takes 8000 Hz mono"):
        rows_from(SOUND, file.getvalue(), 4)


def test_loader_gives_the_same_packs_from_shards_and_from_memory(shards: Path) -> None:
    sources = run_config(shards).load(0, "uml").train
    in_ram = tuple(in_memory(s) for s in sources)
    mix = MixConfig(token_budget=400)
    with (
        Loader(sources, layouts_of(sources, mix), mix, seed=1, threads=2) as lazy,
        Loader(in_ram, layouts_of(in_ram, mix), mix, seed=1) as eager,
    ):
        for _ in range(12):
            a, b = next(lazy)[0], next(eager)[0]
            for x, y in zip((*a.raw, a.label_S, a.sample_S), (*b.raw, b.label_S, b.sample_S),
                            strict=True):  # fmt: skip
                assert (x == y).all()


def test_classes_meet_by_name_and_by_what_is_said_to_be_the_same(shards: Path) -> None:
    task = run_config(shards).load(0, "uml")
    assert task.class_names == ("cat", "dog", "rain")
    sounds = ShardSet.open(shards / "audio", "train")
    expected = {"bark": 1, "rain": 2}
    given = [expected[sounds.class_names[c]] for c in sounds.label]
    assert task.source("audio").labels.tolist() == given
    assert len(task.source("image")) + len(task.validation) == 24  # a tenth is held out
    assert not set(task.validation.keys) & {
        task.source("image").key(i) for i in range(len(task.source("image")))
    }


def test_shots_are_drawn_with_the_seed(shards: Path) -> None:
    config = run_config(shards)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, shots=3))
    few = [config.load(seed, "unimodal").train[0] for seed in (0, 0, 1)]
    keys = [tuple(s.key(i) for i in range(len(s))) for s in few]
    assert all(np.bincount(s.labels).tolist() == [3, 3] for s in few)
    assert keys[0] == keys[1] != keys[2]
    many = dataclasses.replace(config, data=dataclasses.replace(config.data, shots=99))
    with pytest.raises(DataError, match=r"class \w+ has \d+ training samples, data.shots is 99"):
        many.load(0, "unimodal")


def test_unreadable_samples_are_named_and_counted_once(shards: Path, tmp_path: Path) -> None:
    images = ShardSet.open(shards / "image", "train")
    broken = tmp_path / "image"
    broken.mkdir()
    for file in (shards / "image").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tar = bytearray((broken / images.paths[0].name).read_bytes())
    for i in (2, 5):
        start = int(images.index.offset[i])
        tar[start : start + 60] = bytes(60)
    (broken / images.paths[0].name).write_bytes(tar)
    source = source_of(
        IMAGE, ShardSet.open(broken, "train"),
        errors := DataErrors(2, tmp_path / "data_errors.jsonl"),
    )  # fmt: skip
    assert len(in_memory(source)) == len(in_memory(source)) == 22
    lines = (tmp_path / "data_errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [images.key(2), images.key(5)]
    assert len(errors) == 2
    strict = source_of(IMAGE, ShardSet.open(broken, "train"), DataErrors(1))
    with pytest.raises(DataError, match=r"2 samples cannot be read, data.max_errors is 1"):
        in_memory(strict)


def test_a_shard_that_vanishes_is_counted(shards: Path, tmp_path: Path) -> None:
    images = ShardSet.open(shards / "image", "train")
    moved = dataclasses.replace(images, paths=(tmp_path / "gone.tar",))
    source = source_of(IMAGE, moved, errors := DataErrors(100))
    out = np.empty((12, source.row_elems), np.uint8)
    assert source.read(np.array([0, 3]), out) == [0, 1]
    assert len(errors) == 2


def test_a_run_from_shards_trains_every_modality(shards: Path, tmp_path: Path) -> None:
    folder = train(run_config(shards, out=tmp_path / "run"))
    assert folder is not None
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    joint = [r for r in records if r["mode"] == "uml" and "loss" in r]
    assert len(joint) == 12
    assert all(np.isfinite(r["loss"]) for r in joint)
    assert not (folder / "data_errors.jsonl").exists()
    seen = {r["modality"] for r in json.loads((folder / "samples.json").read_text())}
    assert seen == {"image", "text", "audio"}


def test_modalities_without_a_folder_are_left_out(shards: Path) -> None:
    config = load_recipe("folders")
    only = dataclasses.replace(config, data=FoldersConfig(image=shards / "image"))
    assert [m.name for m in only.modalities] == ["image"]
    with pytest.raises(ConfigError, match=r"image: no folder; give --data.image FOLDER"):
        config.load(0, "uml")


def test_a_decoded_batch_names_what_is_wrong_beside_what_is_right() -> None:
    rng = np.random.default_rng(0)
    payloads = []
    for mode, size, kind in (
        ("L", (5, 7), "PNG"),
        ("RGBA", (12, 8), "PNG"),
        ("RGB", (9, 9), "JPEG"),
    ):
        shape = (*size, *({"L": (), "RGB": (3,), "RGBA": (4,)}[mode]))
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(file, kind)
        payloads.append(file.getvalue())
    payloads.insert(1, b"")
    for channels in (1, 3):
        decode = decode_of(dataclasses.replace(IMAGE, channels=channels))
        grey, broken, colours, jpeg = decode(payloads)
        assert isinstance(broken, DecodeError)
        assert [a.shape for a in (grey, colours, jpeg)] == [
            (5, 7, channels), (12, 8, channels), (9, 9, channels),
        ]  # fmt: skip
    assert decode([]) == []
