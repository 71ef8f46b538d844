"""MultiBench as the paper trains it (section 1.2): one recipe for each of its five data sets.

Dimensions, batches, network, optimiser and probes are the paper's. It chose width, learning rate
and warm-up for each data set on validation and does not say what came out; ``uml_fast.search``
does the same choice, and the values here are the middle of its grid.
"""

from __future__ import annotations

from uml_fast.config import (
    CheckpointConfig,
    EvalConfig,
    MixConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
)
from uml_fast.data.multibench import MultibenchConfig, features
from uml_fast.data.multibench_files import BENCHMARKS, Dataset
from uml_fast.model.transformer import multibench


def mosi() -> RunConfig:
    """CMU-MOSI: sentiment of video clips; vision helped by unpaired text (paper 1.2)."""
    return _recipe("mosi")


def mosei() -> RunConfig:
    """CMU-MOSEI: sentiment of video clips; vision helped by unpaired text (paper 1.2)."""
    return _recipe("mosei")


def mustard() -> RunConfig:
    """MUSTARD: sarcasm in video clips; vision helped by unpaired text (paper 1.2)."""
    return _recipe("mustard")


def ur_funny() -> RunConfig:
    """UR-FUNNY: humour in talks; vision helped by unpaired text (paper 1.2)."""
    return _recipe("ur_funny")


def mimic() -> RunConfig:
    """MIMIC: a diagnosis from patient data, helped by unpaired time series (paper 1.2)."""
    return _recipe("mimic")


def _recipe(dataset: Dataset) -> RunConfig:
    used = ("static", "series") if dataset == "mimic" else ("vision", "text")
    return RunConfig(
        recipe=dataset,
        target=used[0],
        modalities=tuple(features(dataset, name) for name in used),
        data=MultibenchConfig(dataset=dataset, modalities=used),
        backbone=multibench(width=40),
        objective=ObjectiveConfig(kind="next_embedding"),
        mix=MixConfig(batch=BENCHMARKS[dataset].batch),
        optim=OptimConfig(kind="adam", lr=1e-3, weight_decay=0.0, schedule="constant"),
        eval=EvalConfig(probe_kind="mosi" if dataset == "mosi" else "default"),
        checkpoint=CheckpointConfig(every=500, keep=1),
        metric="probe",
        steps=0,
        epochs=100.0,
        seeds=3,
    )
