"""What is refused before a run starts, with the field, its value and what would do."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny
from uml_fast.cli import parse
from uml_fast.config import ConfigError, OptimConfig
from uml_fast.data.source import DataError
from uml_fast.experiment.run import open_run
from uml_fast.model.transformer import TransformerConfig
from uml_fast.train import main, train
from uml_fast.training.log import RunFolderError
from uml_fast.training.start import build_model, resolve


def test_data_that_does_not_fit_the_stem_is_named() -> None:
    config = tiny()
    task = config.load(0, "uml")
    wrong = tuple(
        dataclasses.replace(m, size=7) if m.name == "features" else m for m in config.modalities
    )
    with pytest.raises(ConfigError, match=r"features: the data has rows of float32\[35\]"):
        build_model(dataclasses.replace(config, modalities=wrong), task, 0)


def test_wrong_labels_and_missing_classes_are_named() -> None:
    config = tiny()
    task = config.load(0, "uml")
    fewer = dataclasses.replace(config, objective=dataclasses.replace(config.objective, classes=2))
    with pytest.raises(DataError, match=r"sample \S+ has label 2, objective\.classes is 2"):
        build_model(fewer, task, 0)
    more = dataclasses.replace(config, objective=dataclasses.replace(config.objective, classes=4))
    with pytest.raises(DataError, match="1 of 4 classes have no training sample in any modality"):
        build_model(more, task, 0)


def test_auxiliary_that_cannot_train_stops_before_anything_is_written(tmp_path: Path) -> None:
    """The target alone would train; the joint run would not."""
    config = tiny()
    short = tuple(
        dataclasses.replace(m, positions=1) if m.name == "audio" else m for m in config.modalities
    )
    config = dataclasses.replace(config, modalities=short, out=tmp_path / "run")
    with pytest.raises(ConfigError, match=r"audio.positions is 1; raise it"):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": OptimConfig(lr=float("inf"))}, "optim.lr is inf; it must be finite"),
        ({"seed": -1}, "seed is -1; it must be >= 0"),
        ({"backbone": TransformerConfig(width=0, layers=0, heads=1, feed_forward=1)},
         "backbone.width is 0"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(tiny(), **change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cuda-graph", "on"], "cuda_graph is 'on', but steps on cpu are no CUDA graphs"),
        (["--wandb", "project"], "--wandb needs the package wandb"),
        (["--float8"], "float8 needs a GPU"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    command = ["gaussian", "--device", "cpu", "--seeds", "1", "--out", str(tmp_path / "run")]
    for dry in (["--dry-run"], []):
        with pytest.raises(ConfigError, match=message):
            main([*command, *options, *dry])
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_a_folder_with_another_run(tmp_path: Path) -> None:
    command = ["gaussian", "--seeds", "1", "--out", str(tmp_path / "run")]
    open_run(resolve(parse([*command, "--steps", "30"], "train")))
    with pytest.raises(ConfigError, match=r"another configuration: steps \(30 -> 40\)"):
        main([*command, "--steps", "40", "--dry-run"])
    main([*command, "--steps", "30", "--dry-run"])
    with pytest.raises(RunFolderError, match="holds no run"):
        main(["gaussian", "--resume", str(tmp_path / "none"), "--dry-run"])


def test_a_warm_up_longer_than_the_run_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    options = ["--optim.warmup-steps", "10", "--optim.lr", "0.002", "--modes", "uml"]
    command = ["gaussian", "--seeds", "1", "--out", str(tmp_path / "run"), *options]
    said = "the run has 4: its learning rate rises to 0.00073 and never reaches 0.002"
    main([*command, "--steps", "4", "--dry-run"])
    assert capsys.readouterr().out.count(said) == 1
    main([*command, "--steps", "4"])
    assert caplog.text.count(said) == 1
    main([*command, "--steps", "11", "--out", str(tmp_path / "longer"), "--dry-run"])
    assert "never reaches" not in capsys.readouterr().out


def test_metric_and_objective_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"metric 'error' needs objective\.kind 'next_embedding'"):
        dataclasses.replace(tiny(), metric="error")
    with pytest.raises(ConfigError, match=r"init_head_from names 'smell'"):
        wrong = dataclasses.replace(tiny().objective, init_head_from="smell")
        dataclasses.replace(tiny(), objective=wrong)
