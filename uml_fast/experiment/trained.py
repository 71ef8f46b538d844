"""Trained models of a run folder."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from uml_fast.config import RunConfig
from uml_fast.data.source import Task
from uml_fast.experiment.run import read_config
from uml_fast.model.uml import Uml
from uml_fast.runtime.device import resolve_device
from uml_fast.training import checkpoint
from uml_fast.training.checkpoint import CheckpointError
from uml_fast.training.start import build_model


def finished_trials(folder: Path) -> list[tuple[str, int]]:
    """(mode, seed) of every trial of the run that has a result, in the order they were trained.

    Raises:
        CheckpointError: none has.
    """
    names = [p.parent.name.rsplit("-", 1) for p in (folder / "trials").glob("*/result.json")]
    if not names:
        raise CheckpointError(f"{folder} has no finished trial; train it to the end first")
    order = read_config(folder).modes
    return sorted(
        ((mode, int(seed)) for mode, seed in names), key=lambda t: (t[1], order.index(t[0]))
    )


def unfinished_trials(folder: Path, config: RunConfig) -> list[str]:
    """``<mode>-<seed>`` of every trial that the run has planned and that has no result yet."""
    planned = (
        f"{mode}-{seed}"
        for seed in range(config.seed, config.seed + config.seeds)
        for mode in config.modes
    )
    return [name for name in planned if not (folder / "trials" / name / "result.json").exists()]


def load_model(folder: Path, mode: str, seed: int) -> tuple[Uml, RunConfig, Task]:
    """The trained model of one trial, with the mode's configuration and data.

    Raises:
        RunFolderError: the folder holds no run.
        CheckpointError: the trial has no whole checkpoint.
    """
    config = read_config(folder).for_mode(mode)
    place = folder / "trials" / f"{mode}-{seed}" / "checkpoints"
    saved = checkpoint.load_latest(place)
    if saved is None:
        raise CheckpointError(
            f"{place} holds no checkpoint; trials there are: {finished_trials(folder)}"
        )
    task = config.load(seed, mode)
    model = build_model(config, task, seed, pretrained=False)
    load_weights(model, saved)
    return model.to(resolve_device(config.device)).eval(), config, task


def load_weights(model: Uml, saved: checkpoint.Checkpoint, *, best: bool = True) -> None:
    """Put the weights of a checkpoint into a model: the best ones of its trial, or its last.

    Where the trial averages its weights (``optim.ema``), the average of the last.
    """

    def part(prefix: str) -> dict[str, Tensor]:
        named = {k: v for k, v in saved.tensors.items() if k.startswith(prefix)}
        return {k.removeprefix(prefix): v for k, v in named.items()}

    model.load_state_dict((best and part("best/")) or part("model/") | part("ema/"))
