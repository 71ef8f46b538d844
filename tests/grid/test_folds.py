"""Tables over folds of sounds: every subset of modalities, no leak, paired seeds, clear errors."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from uml_fast.config import ConfigError, EvalConfig, MixConfig, ObjectiveConfig
from uml_fast.data.folders import FoldersConfig
from uml_fast.data.source import DataError
from uml_fast.encoders.cache import save_features
from uml_fast.extract import main as extract
from uml_fast.grid.cells import HeadSchedule
from uml_fast.grid.folds import SoundFolds
from uml_fast.modalities.audio import AudioConfig
from uml_fast.model.transformer import TransformerConfig
from uml_fast.prepare import main as prepare
from uml_fast.recipes import load_recipe
from uml_fast.train import train

SOUNDS = ("dog_bark", "rain", "rooster")
IMAGES = ("bird", "cat", "dog")
SAME = ("dog_bark=dog", "rooster=bird")


def made_features(where: Path, folds: int = 3, clips: int = 8) -> Path:
    """Clusters: sounds of width 6 in folds, images of width 5, sentences of width 4.

    The first feature of a sound is its fold, the second the number of its clip in class and fold.
    """
    rng = np.random.default_rng(0)

    def save(name: str, rows: list[np.ndarray], labels: list[int], names: tuple[str, ...],
             keys: list[str]) -> None:  # fmt: skip
        save_features(
            where / f"{name}.safetensors", torch.from_numpy(np.stack(rows)).float(),
            torch.tensor(labels), names, keys,
        )  # fmt: skip

    rows, labels, keys = [], [], []
    for c, name in enumerate(SOUNDS):
        for fold in range(1, folds + 1):
            for i in range(clips):
                rows.append(np.concatenate([[fold, i], 3 * np.eye(4)[c]]) + rng.normal(0, 0.01, 6))
                labels.append(c)
                keys.append(f"{name}/{fold}-{1000 * c + 100 * fold + i}-A")
    turned = rng.permutation(len(keys))
    for split, part in zip(("train", "val", "test"), np.array_split(turned, 3), strict=True):
        save(f"audio-{split}", [rows[i] for i in part], [labels[i] for i in part], SOUNDS,
             [keys[i] for i in part])  # fmt: skip
    for split, count in (("train", 30), ("test", 12)):
        labels = [i % 3 for i in range(count)]
        save(f"image-{split}", [np.eye(5)[c] + rng.normal(0, 0.2, 5) for c in labels], labels,
             IMAGES, [f"{split}{i}" for i in range(count)])  # fmt: skip
    labels = [i % 3 for i in range(9)]
    save("text-train", [np.eye(4)[c] + rng.normal(0, 0.1, 4) for c in labels], labels, IMAGES,
         [f"t{i}" for i in range(9)])  # fmt: skip
    return where


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_features(tmp_path_factory.mktemp("features"))


def folds(features: Path, **changes: object) -> SoundFolds:
    return SoundFolds(where=(str(features),), same=SAME, **changes)


def fold_of(rows: torch.Tensor) -> set[int]:
    return set(rows[:, 0].round().int().tolist())


@pytest.mark.parametrize("seed", range(7))
@pytest.mark.parametrize("shots", [1, 4])
def test_a_seed_trains_and_validates_on_one_fold_and_tests_on_the_others(
    features: Path, seed: int, shots: int
) -> None:
    data = folds(features).load(("audio", "image", "text"), seed, shots)
    heads = data.heads
    assert data.class_names == ("dog", "bird")
    fold = seed % 3 + 1
    assert fold_of(heads.train["audio"].rows) == fold_of(heads.validation.rows) == {fold}
    assert fold_of(heads.test.rows) == {1, 2, 3} - {fold}
    assert len(heads.test) == 2 * 2 * 8
    clips = [
        {(int(c), round(float(r[1]))) for r, c in zip(part.rows, part.labels, strict=True)}
        for part in (heads.train["audio"], heads.validation)
    ]
    assert len(clips[0]) == len(clips[1]) == 2 * shots
    assert not clips[0] & clips[1]
    if seed < 3:
        assert clips[0] == {(c, i) for c in range(2) for i in range(shots)}


def test_later_seeds_draw_other_clips(features: Path) -> None:
    drawn = [folds(features).load(("audio",), s, 2).heads.train["audio"].rows for s in (0, 3, 6, 3)]
    assert torch.equal(drawn[1], drawn[3])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_labels_of_all_modalities_mean_the_same(features: Path) -> None:
    heads = folds(features).load(("audio", "image", "text"), 0, 4).heads
    for c, (sound, image) in enumerate(((0, 2), (2, 0))):  # dog, bird
        assert (heads.train["audio"].rows[heads.train["audio"].labels == c][:, 2 + sound] > 2).all()
        for m in ("image", "text"):
            rows = heads.train[m].rows[heads.train[m].labels == c]
            assert int(rows.mean(0).argmax()) == image


def test_images_as_the_target_are_helped_by_the_sounds_of_one_fold(features: Path) -> None:
    heads = folds(features).load(("image", "audio", "text"), 4, 1).heads
    assert fold_of(heads.train["audio"].rows) == {2}
    assert len(heads.train["audio"]) == 2 * 8
    assert len(heads.test) == 8
    assert heads.target == "image"


@pytest.mark.parametrize(
    ("name", "alone"), [("audio", "audio"), ("audio_images", "image")]
)  # fmt: skip
def test_one_command_gives_every_subset_of_modalities(
    features: Path, tmp_path: Path, name: str, alone: str
) -> None:
    config = load_recipe(name)
    config = dataclasses.replace(
        config,
        data=folds(features),
        search=dataclasses.replace(config.search, lr=(1e-2,), weight_decay=(0.0,)),
        schedule=HeadSchedule(steps=60, warmup_steps=5, eval_every=20, patience=2),
        shots=(1, 2), seeds=3, out=tmp_path / "run",
    )  # fmt: skip
    folder = train(config)
    assert folder is not None
    summary = json.loads((folder / "summary.json").read_text())
    other = "image" if alone == "audio" else "audio"
    expected = {f"{alone}_{other}", f"{alone}_text", f"{alone}_{other}_text"}
    rows = {(r["mode"], r["shots"]): r for r in summary["comparison"]}
    assert rows.keys() == {(m, k) for m in expected for k in (1, 2)}
    for (mode, shots), row in rows.items():
        found = {
            m: {r["seed"]: r["head"] for r in summary["results"]
                if (r["mode"], r["shots"]) == (m, shots)} for m in (mode, "unimodal")
        }  # fmt: skip
        assert found[mode].keys() == found["unimodal"].keys() == {0, 1, 2}
        differences = [found[mode][s] - found["unimodal"][s] for s in range(3)]
        assert row["n"] == 3
        assert row["paired_diff_mean"] == pytest.approx(np.mean(differences))
    assert (folder / "report.html").exists()


def test_folds_with_too_few_clips_are_tested_on_only(tmp_path: Path) -> None:
    data = folds(made_features(tmp_path, folds=2, clips=4))
    assert fold_of(data.load(("audio",), 1, 2).heads.test.rows) == {1}
    with pytest.raises(DataError, match=r"fold \d has 4 clips of \w+; 3 shots take 6"):
        data.load(("audio",), 0, 3)


def test_what_is_missing_is_named(features: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="video: no video-train"):
        folds(features).load(("audio", "video"), 0, 1)
    with pytest.raises(DataError, match=r"dog_bark=wolf: the left .* the right one of the others"):
        SoundFolds(where=(str(features),), same=("dog_bark=wolf",)).load(("audio", "image"), 0, 1)
    with pytest.raises(DataError, match="none of its classes"):
        SoundFolds(where=(str(features),)).load(("audio", "image"), 0, 1)
    with pytest.raises(ConfigError, match="shots is 0"):
        folds(features).load(("audio", "image"), 0, 0)
    with pytest.raises(DataError, match="which is not among"):
        folds(features).load(("image", "text"), 0, 1)
    save_features(
        tmp_path / "audio-train.safetensors", torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]),
        ("dog_bark", "rooster"),
    )  # fmt: skip
    with pytest.raises(DataError, match="the sounds have no names"):
        SoundFolds(where=(str(tmp_path),)).load(("audio",), 0, 1)


def test_a_class_map_is_read_from_a_file(features: Path, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"dog_bark": "dog", "rooster": "bird", "rain": "cat"}))
    data = SoundFolds(where=(str(features),), class_map=path)
    assert data.load(("audio", "image"), 0, 1).class_names == ("dog", "cat", "bird")


def test_sounds_of_files_become_splits_through_a_stem_trained_here(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, hertz in (("dog_bark", 300), ("rooster", 2000)):
        (tmp_path / "files" / name).mkdir(parents=True)
        for fold in (1, 2):
            for i in range(2):
                wave = np.sin(np.arange(4000) * 2 * np.pi * hertz / 8000) + rng.normal(0, 0.1, 4000)
                path = tmp_path / "files" / name / f"{fold}-{hertz + 10 * fold + i}-A.wav"
                soundfile.write(path, wave / 2, 8000)
    shards, out = tmp_path / "shards", tmp_path / "features"
    assert prepare(["audio", str(tmp_path / "files"), str(shards), "--split", "train=1",
                    "--workers", "1"]) == 0  # fmt: skip
    audio = AudioConfig(name="audio", sample_rate=8000, row_samples=400, frames=2, window=400,
                        positions=16)  # fmt: skip
    config = dataclasses.replace(
        load_recipe("folders"), target="audio", modalities=(audio,), steps=3, seeds=1,
        data=FoldersConfig(audio=shards), modes=("unimodal",), out=tmp_path / "run",
        objective=ObjectiveConfig(kind="next_embedding"), metric="error",
        eval=EvalConfig(probe=False), mix=MixConfig(token_budget=100),
        backbone=TransformerConfig(width=16, layers=1, heads=2, feed_forward=32, causal=True),
    )  # fmt: skip
    assert train(config) is not None
    assert (
        extract(["audio", str(shards), "--encoder", str(tmp_path / "run"), "--out", str(out)]) == 0
    )
    data = SoundFolds(where=(str(out),)).load(("audio",), 1, 1)
    assert data.class_names == ("dog_bark", "rooster")
    assert len(data.heads.train["audio"]) == len(data.heads.validation) == 2
    assert len(data.heads.test) == 4
    assert data.heads.test.width == 16


def test_one_class_in_common_is_refused(features: Path) -> None:
    one = SoundFolds(where=(str(features),), same=("dog_bark=dog",))
    with pytest.raises(DataError, match="1 class in common; a head tells two or more apart"):
        one.load(("audio", "image"), 0, 1)
