"""The MultiBench recipes on generated files: every data set to its probes, warm-up, compatibility.

What the release does is written out here, and in ``tests/plain_uml.py``, without packs.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tests.plain_uml import PlainUml, adam, pad, uml_fast_state
from uml_fast import train
from uml_fast.config import ConfigError, MixConfig, RunConfig
from uml_fast.data.multibench_files import BENCHMARKS, Dataset
from uml_fast.data.multibench_made import write_benchmark
from uml_fast.data.source import DataError
from uml_fast.modalities.features import Features, FeaturesConfig
from uml_fast.model.transformer import multibench
from uml_fast.packing.pack import unpack_samples
from uml_fast.recipes import load_recipe
from uml_fast.runtime.stop import StopSignal
from uml_fast.training.log import SilentLog
from uml_fast.training.measure import AlignedSources, aligned_probes, embed, pack_source
from uml_fast.training.start import plan_mix, resolve
from uml_fast.training.trial import Trial

COUNTS = (60, 24, 24)
CPU = torch.device("cpu")
DATASETS: tuple[Dataset, ...] = ("mosi", "mosei", "mustard", "ur_funny", "mimic")


def recipe(folder: Path, dataset: Dataset = "mosi", **changes: Any) -> RunConfig:
    """The recipe with a small network on a small generated file, for one epoch."""
    file = folder / BENCHMARKS[dataset].files[0]
    if not file.exists():
        write_benchmark(file, dataset, COUNTS)
    config = load_recipe(dataset)
    backbone = dataclasses.replace(multibench(10, 0.0), layers=1, feed_forward=16)
    changes = {"epochs": 1.0, "seeds": 1, "backbone": backbone, "precision": "fp32"} | changes
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, folder=folder), out=folder / "run", **changes
    )


def with_mix(config: RunConfig, **changes: Any) -> RunConfig:
    return resolve(dataclasses.replace(config, mix=dataclasses.replace(config.mix, **changes)))


def finished(config: RunConfig, mode: str, folder: Path) -> tuple[Trial, dict[str, Any]]:
    trial = Trial(config, mode, 0, folder / mode)
    with StopSignal() as stop:
        return trial, trial.run(stop, SilentLog())


@pytest.mark.parametrize("dataset", DATASETS)
def test_every_data_set_goes_from_file_to_probes(dataset: Dataset, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[dataset]
    config = resolve(recipe(tmp_path, dataset))
    x, y = list(benchmark.sizes)[:2]
    assert config.target == x and [m.name for m in config.modalities] == [x, y]
    assert config.optim.schedule == "constant" and config.optim.kind == "adam"
    trial, result = finished(config, "uml", tmp_path)
    assert set(result["probes"]) == {x, y, f"{x}+{y}"}
    assert result["probe"] == result["probes"][x]["test"]
    assert result["validation"] == result["probes"][x]["validation"]
    task = trial.task
    for split, sources in (("validation", task.aligned[0][0]), ("test", task.aligned[0][1])):
        count = len(sources)
        for accuracy in result["probes"].values():
            assert (accuracy[split] * count) % 1 == pytest.approx(0, abs=1e-6)
    assert not {x, y} & {m.name for m in config.for_mode("unimodal").modalities} - {x}
    assert result["steps"] == config.steps >= COUNTS[0] // benchmark.batch


def test_each_probe_is_the_papers_on_the_embeddings_side_by_side(tmp_path: Path) -> None:
    models = {
        "mosi": make_pipeline(StandardScaler(), LogisticRegression(
            solver="liblinear", max_iter=1000, random_state=0)),
        "mustard": LogisticRegression(C=1.0, max_iter=200),
    }  # fmt: skip
    for dataset, model in models.items():
        config = resolve(recipe(tmp_path, dataset))  # type: ignore[arg-type]
        trial = Trial(config, "uml", 0, tmp_path)
        got = aligned_probes(
            trial.model, trial.config, AlignedSources.of(trial.task, config, CPU), ()
        )
        train_x = [embed(trial.model, pack_source(s, CPU)) for s in trial.task.train]
        for k, split in enumerate(("validation", "test")):
            held_out = [pair[k] for pair in trial.task.aligned]
            x = [embed(trial.model, pack_source(s, CPU)) for s in held_out]
            for view, chosen in (("vision", [0]), ("text", [1]), ("vision+text", [0, 1])):
                model.fit(np.hstack([train_x[i] for i in chosen]), trial.task.train[0].labels)
                expected = model.score(np.hstack([x[i] for i in chosen]), held_out[0].labels)
                assert got[view][split] == expected


def test_text_and_audio_can_be_targets_and_three_modalities_train(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    data = dataclasses.replace(config.data, modalities=("vision", "text", "audio"))
    config = resolve(dataclasses.replace(config, data=data, target="text"))
    assert [m.name for m in config.modalities] == ["vision", "text", "audio"]
    _, result = finished(config, "uml", tmp_path)
    assert set(result["probes"]) == {"vision", "text", "audio", "vision+text+audio"}
    assert result["probe"] == result["probes"]["text"]["test"]
    _, alone = finished(config, "unimodal", tmp_path)
    assert set(alone["probes"]) == {"text"}, "Y alone: the other one is not even read"


def test_a_run_tells_unimodal_from_uml_and_shows_all_probes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = recipe(tmp_path, seeds=2)
    folder = train.train(config)
    assert folder is not None
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["comparison"][0]["metric"] == "probe" and summary["comparison"][0]["n"] == 2
    means = {(p["mode"], p["view"], p["split"]): p["mean"] for p in summary["probes"]}
    results = summary["results"]
    for mode in ("unimodal", "uml"):
        own = [r["probe"] for r in results if r["mode"] == mode]
        assert means[mode, "vision", "test"] == pytest.approx(np.mean(own))
    assert all(0 <= r["validation"] <= 1 for r in results)
    printed = capsys.readouterr().out
    expected = f"{100 * means['uml', 'vision+text', 'test']:.1f}"
    line = next(x for x in printed.splitlines() if "vision+text" in x)
    assert line.split()[-1] == expected
    assert "vision+text" in (folder / "report.html").read_text()


def test_what_is_paired_in_the_file_is_not_paired_in_training(tmp_path: Path) -> None:
    trial = Trial(resolve(recipe(tmp_path)), "uml", 0, tmp_path)
    with trial._loader(None) as loader:
        batch, _ = next(loader)
        vision, text = (batch.sample_S[batch.modality_S == m].tolist() for m in range(2))
    assert len(set(vision) & set(text)) < len(vision)


def test_constant_features_stay_finite_and_training_statistics_hold(tmp_path: Path) -> None:
    trial = Trial(resolve(recipe(tmp_path, "mustard")), "uml", 0, tmp_path)
    vision = trial.model.modality("vision")
    assert isinstance(vision, Features) and vision.standardise
    rows = trial.task.train[0].rows  # type: ignore[attr-defined]
    np.testing.assert_allclose(vision.mean.numpy(), rows.mean(0, np.float64), atol=1e-5)
    constant = FeaturesConfig(name="c", size=2, standardise=True).build(4, 4, True)
    values = np.stack([np.full(1000, 0.1), np.arange(1000.0)], 1).astype(np.float32)
    constant.fit(values, np.array([0, 1000]))
    assert constant.deviation[0] == 1.0 and constant.deviation[1] == pytest.approx(288.7, rel=1e-3)


def test_epochs_and_batches_are_the_papers(tmp_path: Path) -> None:
    config = recipe(tmp_path, epochs=7.0)
    resolved = resolve(config)
    n = len(resolved.load(0, "unimodal").train[0])
    assert resolved.steps == pytest.approx(7 * n / 32, rel=0.1)
    for mode in ("unimodal", "uml"):
        trial = Trial(resolved, mode, 0, tmp_path)
        with trial._loader(None) as loader:
            for _ in range(resolved.steps):
                next(loader)
            for epochs in loader.epochs().values():
                assert epochs == pytest.approx(7, rel=0.05), mode


@pytest.mark.parametrize("first", ["auxiliary", "target"])
def test_warm_up_in_either_order_takes_its_epochs_of_one_modality(
    first: str, tmp_path: Path
) -> None:
    config = with_mix(recipe(tmp_path, epochs=5.0), policy="warmup", warmup_epochs=2.0,
                      warmup_first=first)  # fmt: skip
    alone, other = ("text", "vision") if first == "auxiliary" else ("vision", "text")
    trial = Trial(config, "uml", 0, tmp_path)
    joint = with_mix(recipe(tmp_path, epochs=5.0))
    assert config.steps == joint.steps, "a warm-up is part of the epochs"
    assert trial.layouts[0].regions == tuple(
        r for r in trial.layouts[1].regions if r.name == alone
    ), "and its packs hold no more of it than the others"
    with trial._loader(None) as loader:
        seen = []
        for _ in range(config.steps):
            _, layout = next(loader)
            seen.append((layout, loader.epochs()))
    warm = [epochs for layout, epochs in seen if layout == 0]
    assert warm[-1][other] == 0 and warm[-1][alone] == pytest.approx(2.0, abs=0.5)
    assert seen[-1][1][other] == pytest.approx(3.0, abs=0.6)


def test_the_release_warms_up_one_epoch_longer_and_counts_whole_batches(tmp_path: Path) -> None:
    config = recipe(tmp_path, epochs=5.0, compat="release")
    config = with_mix(config, policy="warmup", warmup_epochs=2.0)
    n = len(config.load(0, "unimodal").train[0])
    assert config.steps == 5 * math.ceil(n / 32)
    mix, _ = plan_mix(config, "uml", config.load(0, "uml"), 0)
    assert mix.warmup_epochs == 3.0
    joint = with_mix(recipe(tmp_path, compat="release"))
    assert plan_mix(joint, "uml", joint.load(0, "uml"), 0)[0].warmup_epochs == 0


def test_release_training_and_embeddings_are_those_of_a_padded_plain_model(tmp_path: Path) -> None:
    """The same packs, padded by hand and trained by torch.nn, give the same losses and numbers."""
    config = resolve(recipe(tmp_path, compat="release", epochs=4.0))
    trial = Trial(config, "uml", 0, tmp_path)
    torch.manual_seed(1)
    plain = PlainUml({"vision": 20, "text": 300}, 10, layers=1, hidden=16, dropout=0.0)
    trial.model.load_state_dict(uml_fast_state(plain))
    optimizer = adam(plain, config.optim.lr)
    with trial._loader(None) as loader:
        for step in range(6):
            batch, _ = next(loader)
            padded = {m: pad(s) for m, s in unpack_samples(batch).items()}
            expected, _ = plain.total_loss(padded, "release")
            optimizer.zero_grad()
            expected.backward()
            optimizer.step()
            got = trial.train_step(batch, step).loss
            assert got.item() == pytest.approx(expected.item(), rel=1e-4)
            del batch
    test = trial.task.aligned[1][1]
    samples = [test.sample(i).copy() for i in range(len(test))]
    parts = [samples[i : i + 32] for i in range(0, len(samples), 32)]
    with torch.no_grad():
        plain.eval()
        release = torch.cat([plain.embedding("text", *pad(p), "release") for p in parts]).numpy()
        valid = torch.cat([plain.embedding("text", *pad(p), "valid") for p in parts]).numpy()
    np.testing.assert_allclose(
        embed(trial.model, pack_source(test, CPU, config)), release, rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
        embed(trial.model, pack_source(test, CPU)), valid, rtol=1e-3, atol=1e-4
    )
    assert np.abs(release - valid).max() > 0.01


def test_a_sample_longer_than_the_positions_is_refused_in_words(tmp_path: Path) -> None:
    backbone = dataclasses.replace(multibench(15), positions="sinusoid", max_positions=20)
    with pytest.raises(ConfigError, match=r"the longest sample has \d+ rows, backbone.max_posit"):
        Trial(resolve(recipe(tmp_path, backbone=backbone)), "uml", 0, tmp_path)
    wide = dataclasses.replace(backbone, max_positions=64)
    Trial(resolve(recipe(tmp_path, backbone=wide)), "uml", 0, tmp_path)


def test_missing_and_unfitting_data_are_said_in_words(tmp_path: Path) -> None:
    config = load_recipe("mosi")
    empty = dataclasses.replace(config.data, folder=tmp_path / "none")
    with pytest.raises(DataError, match=r"github.com/pliang279/MultiBench.*--data.generate"):
        train.train(dataclasses.replace(config, data=empty, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    small = recipe(tmp_path)
    other = dataclasses.replace(small.data, dataset="mosei", file=tmp_path / "mosi_data.pkl")
    with pytest.raises(DataError, match=r"vision has 20 features, the run takes 35"):
        resolve(dataclasses.replace(load_recipe("mosei"), data=other))
    with pytest.raises(ConfigError, match=r"modalities is \['smell'\]; mosi has vision, text, aud"):
        dataclasses.replace(config.data, modalities=("smell",))
    with pytest.raises(ConfigError, match=r"give mix\.batch"):
        dataclasses.replace(config, compat="release", mix=MixConfig())


def test_generated_data_are_written_once_and_said(tmp_path: Path) -> None:
    data = dataclasses.replace(load_recipe("mimic").data, folder=tmp_path, generate=True)
    path = data.path()  # type: ignore[attr-defined]
    before = path.stat().st_mtime_ns
    assert path == tmp_path / "generated" / "im.pk" and data.path() == path  # type: ignore[attr-defined]
    assert path.stat().st_mtime_ns == before
