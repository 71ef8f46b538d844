"""What a trial starts from: epochs and batches become steps and rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.tiny import tiny
from uml_fast.config import ConfigError, MixConfig, RunConfig
from uml_fast.training.start import resolve
from uml_fast.training.trial import Trial


def recipe(mix: MixConfig, epochs: float) -> RunConfig:
    return dataclasses.replace(tiny(), mix=mix, epochs=epochs, steps=0 if epochs else 30)


@pytest.mark.parametrize("policy", ["joint", "alternate"])
def test_epochs_are_those_of_the_target_in_either_mode(policy: str, tmp_path: Path) -> None:
    mix = MixConfig(policy=policy, token_budget=700)  # type: ignore[arg-type]
    config = resolve(recipe(mix, 6.0))
    assert config.mix == mix and config.steps > 6
    for mode in ("unimodal", "uml"):
        trial = Trial(config, mode, 0, tmp_path)
        with trial._loader(None) as loader:
            for _ in range(config.steps):
                next(loader)
            assert loader.epochs()[config.target] == pytest.approx(6.0, rel=0.15)


def test_a_batch_is_the_samples_of_the_target_in_a_pack(tmp_path: Path) -> None:
    config = resolve(recipe(MixConfig(batch=5), 0.0))
    assert config.steps == tiny().steps
    trial = Trial(config, "uml", 0, tmp_path)
    names = [r.name for r in trial.layouts[0].regions]
    counts = []
    with trial._loader(None) as loader:
        for _ in range(20):
            batch, _ = next(loader)
            counts.append(int((batch.modality_S == names.index(config.target)).sum()))
    assert sum(counts) / len(counts) == pytest.approx(5, abs=0.5)


def test_steps_and_rows_that_are_given_stay() -> None:
    config = tiny()
    assert resolve(config) == config


def test_a_batch_and_packs_of_one_modality_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"give mix\.token_budget"):
        MixConfig(policy="alternate", batch=8)


def test_a_trial_has_one_length() -> None:
    with pytest.raises(ConfigError, match=r"epochs 2, but a trial has one length: add --epochs 0"):
        dataclasses.replace(tiny(), epochs=2.0)
    with pytest.raises(ConfigError, match="or 0 with --epochs"):
        dataclasses.replace(tiny(), steps=0)
    resolved = resolve(recipe(MixConfig(batch=5), 2.0))
    assert resolved.steps > 0 and resolved.epochs == 0 and resolve(resolved) == resolved
