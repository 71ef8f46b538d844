"""A source that ends starts again, or ends the trial: with every sample seen, on every rank."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.tiny import tiny
from uml_fast import train
from uml_fast.config import ConfigError, MixConfig, RunConfig
from uml_fast.data.loading.loader import Loader
from uml_fast.training.trial import Trial


def config(folder: Path, **mix: object) -> RunConfig:
    return dataclasses.replace(
        tiny(), out=folder, seeds=1, steps=60, mix=MixConfig(token_budget=700, **mix)
    )


def steps(folder: Path) -> dict[str, int]:
    results = json.loads((folder / "summary.json").read_text())["results"]
    return {r["mode"]: r["steps"] for r in results}


def expected(run: RunConfig, mode: str, name: str, epochs: float) -> int:
    """Packs until the modality has been seen that often."""
    trial = Trial(run, mode, 0, Path("/nonexistent"))
    with trial._loader(None) as loader:
        return packs_until(loader, name, epochs)


def packs_until(loader: Loader, name: str, epochs: float) -> int:
    count = 0
    while loader.epochs()[name] < epochs:
        next(loader)
        count += 1
    return count


@pytest.mark.parametrize(("name", "epochs"), [("image", 1.0), ("text", 1.5)])
def test_the_run_ends_with_the_modality(tmp_path: Path, name: str, epochs: float) -> None:
    run = config(tmp_path, stop_with=name, stop_epochs=epochs)
    train.train(run)
    uml = expected(run, "uml", name, epochs)
    assert 1 < uml < 60
    assert steps(tmp_path)["uml"] == uml
    alone = expected(run, "unimodal", name, epochs) if name == run.target else 60
    assert steps(tmp_path)["unimodal"] == alone
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in logged if r["mode"] == "uml"] == list(range(1, uml + 1))
    assert "val" in [r for r in logged if r["mode"] == "uml"][-1]


def test_without_it_every_source_starts_again(tmp_path: Path) -> None:
    run = config(tmp_path)
    train.train(run)
    assert steps(tmp_path) == {"unimodal": 60, "uml": 60}


def test_an_ended_trial_is_not_trained_further(tmp_path: Path) -> None:
    run = dataclasses.replace(config(tmp_path, stop_with="image"), modes=("uml",))
    train.train(run)
    (before,) = steps(tmp_path).values()
    (tmp_path / "trials/uml-0/result.json").unlink()
    train.train(run)
    assert steps(tmp_path) == {"uml": before}


def test_a_modality_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mix\.stop_with is 'video'; it must be one of"):
        config(tmp_path, stop_with="video")
    with pytest.raises(ConfigError, match="stop_epochs must be positive"):
        config(tmp_path, stop_with="image", stop_epochs=0.0)
