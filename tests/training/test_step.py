"""The step: several packs as one, averaged weights, and nothing that waits for the device."""

from __future__ import annotations

import copy
import dataclasses
import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.on_ranks import run_ranks
from tests.distributed.test_distributed import SAMPLES, pack, step_config, whole
from tests.tiny import tiny, tiny_prediction
from uml_fast import train
from uml_fast.config import ConfigError, DistConfig, OptimConfig, RunConfig
from uml_fast.distributed.ranks import ALONE, Ranks, join_ranks
from uml_fast.experiment.trained import load_model, load_weights
from uml_fast.packing.pack import PackedBatch
from uml_fast.training.checkpoint import load_latest
from uml_fast.training.start import build_model, resolve
from uml_fast.training.step import TrainStep
from uml_fast.training.trial import Trial

CUTS = [2, 3, 9]
"""Where the samples of each modality are cut: four packs of uneven size."""
STEPS = 4


def accumulating(config: RunConfig, packs: int, **options: Any) -> RunConfig:
    optim = dataclasses.replace(config.optim, accumulate=packs, **options)
    return dataclasses.replace(config, optim=optim)


def cut(config: RunConfig, task: Any) -> list[PackedBatch]:
    """Packs of uneven parts of each modality; the third has images alone, the last no images."""
    names = [m.name for m in config.modalities]
    parts = np.split(np.arange(SAMPLES), CUTS)
    packs = [{name: part for name in names} for part in parts[:2]]
    packs.append({"image": np.concatenate(parts[2:])})
    packs.append({name: np.concatenate(parts[2:]) for name in names if name != "image"})
    return [pack(config, task, samples) for samples in packs]


def take_steps(
    config: RunConfig, packs: list[PackedBatch], task: Any, ranks: Ranks = ALONE
) -> tuple[list[float], list[dict[str, float]], dict[str, Any]]:
    """Losses, losses of each modality, and the weights at the end."""
    model = build_model(config, task, seed=5)
    step = TrainStep(model, config, 0, ranks)
    results = [step(packs[-1], i, (), *packs[:-1]) for i in range(STEPS)]
    return (
        [float(r.loss) for r in results],
        [{n: float(x) for n, x in r.parts.items()} for r in results],
        {n: whole(p) for n, p in model.named_parameters()},
    )


@pytest.mark.parametrize("kind", ["classification", "next_embedding"])
def test_several_packs_are_one(kind: str) -> None:
    """Clipped steps on four uneven packs and on one of all their samples."""
    config = step_config(kind)
    task = config.load(0, "uml")
    whole_pack = pack(config, task, {m.name: np.arange(SAMPLES) for m in config.modalities})
    losses, parts, weights = take_steps(config, [whole_pack], task)
    found, found_parts, found_weights = take_steps(accumulating(config, 4), cut(config, task), task)
    assert found == pytest.approx(losses, rel=1e-6, abs=1e-6)
    assert found_parts == [pytest.approx(p, rel=1e-6, abs=1e-6) for p in parts]
    for name, value in weights.items():
        np.testing.assert_allclose(found_weights[name], value, rtol=1e-4, atol=2e-6, err_msg=name)


def test_a_modality_counts_by_its_samples_in_float64() -> None:
    config = step_config("classification")
    task = config.load(0, "uml")
    packs = cut(config, task)
    alone = [take_steps(config, [p], task)[1][0] for p in packs]
    count = [
        {r.name: int((p.label_S[p.layout.slot_slice(i)] >= 0).sum())
         for i, r in enumerate(p.layout.regions)}
        for p in packs
    ]  # fmt: skip
    found, parts, _ = take_steps(accumulating(config, 4), packs, task)
    expected = {}
    for m in config.modalities:
        pairs = [(n[m.name], x[m.name]) for n, x in zip(count, alone, strict=True) if m.name in n]
        expected[m.name] = sum(n * x for n, x in pairs) / sum(n for n, _ in pairs)
    assert parts[0] == pytest.approx(expected, rel=1e-6)
    weighted = sum(m.weight * expected[m.name] for m in config.modalities)
    assert found[0] == pytest.approx(weighted, rel=1e-6)


def on_ranks() -> list[Any]:
    """Four packs on this rank's part of two ranks, whole models and shards."""
    out = []
    with join_ranks("cpu", timeout_s=60) as ranks:
        for strategy in ("ddp", "fsdp"):
            config = dataclasses.replace(
                accumulating(step_config("classification"), 4 // ranks.world),
                dist=DistConfig(strategy=strategy),  # type: ignore[arg-type]
            )
            task = config.load(0, "uml")
            packs = cut(config, task)[ranks.rank :: ranks.world]
            out.append(take_steps(config, packs, task, ranks))
    return out


@pytest.mark.parametrize("world", [2, 4])
def test_packs_of_one_rank_are_packs_of_many(world: int, tmp_path: Path) -> None:
    config = step_config("classification")
    task = config.load(0, "uml")
    losses, parts, weights = take_steps(accumulating(config, 4), cut(config, task), task)
    for both in run_ranks(on_ranks, world, tmp_path / "log"):
        for found, found_parts, found_weights in both:
            assert found == pytest.approx(losses, rel=1e-6, abs=1e-6)
            assert found_parts == [pytest.approx(p, rel=1e-6, abs=1e-6) for p in parts]
            for name, value in weights.items():
                np.testing.assert_allclose(found_weights[name], value, rtol=1e-4, atol=2e-6)


def test_dropout_of_a_pack_is_that_of_a_rank() -> None:
    config = tiny()
    task = config.load(0, "uml")
    batch = pack(config, task, {m.name: np.arange(4) for m in config.modalities})

    def loss(config: RunConfig, rank: int, *before: PackedBatch) -> float:
        step = TrainStep(build_model(config, task, 5), config, 0, Ranks(rank))
        return float(step(batch, 0, (), *before).loss)

    mean = (loss(config, 0) + loss(config, 1)) / 2
    assert loss(config, 0) != loss(config, 1)
    assert loss(accumulating(config, 2), 0, batch) == pytest.approx(mean, rel=1e-5)


def run_config(folder: Path, **changes: Any) -> RunConfig:
    optim = OptimConfig(lr=1e-3, accumulate=2, ema=0.8)
    return dataclasses.replace(
        tiny(), out=folder, seeds=1, modes=("uml",), steps=8, optim=optim, **changes
    )


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_accumulates_averages_and_resumes_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.train(run_config(tmp_path / "whole"))
    stopped = run_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        call = TrainStep.__call__

        def fail(self: TrainStep, batch: Any, step: int, flags: Any, *before: Any) -> Any:
            if step == 6:
                raise RuntimeError("out of memory")
            return call(self, batch, step, flags, *before)

        patch.setattr(TrainStep, "__call__", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            train.train(stopped)
    train.train(stopped)
    ours, others = records(tmp_path / "run"), records(tmp_path / "whole")
    assert [r["step"] for r in ours] == list(range(1, 9))
    assert [r["loss"] for r in ours] == [r["loss"] for r in others]
    models = [load_model(tmp_path / f, "uml", 0)[0] for f in ("run", "whole")]
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


def test_the_average_is_the_written_out_one_and_is_what_is_measured(tmp_path: Path) -> None:
    run = run_config(tmp_path, checkpoint=dataclasses.replace(tiny().checkpoint, every=0))
    trial = Trial(run, "uml", 0, tmp_path / "trials" / "uml-0")
    step, decay = trial.train_step, 0.8
    expected = {n: p.detach().double() for n, p in trial.model.named_parameters()}
    with trial._loader(None) as loader:
        for i in range(5):
            before, last = trial._packs(loader)
            assert len(before) == 1
            step(last, i, (), *before)
            for name, p in trial.model.named_parameters():
                expected[name] = decay * expected[name] + (1 - decay) * p.detach().double()
        assert loader.stats()["packs"] == 10
        for name, value in expected.items():
            torch.testing.assert_close(step.averaged[name].double(), value, rtol=1e-5, atol=1e-7)
        seen: list[dict[str, Tensor]] = []
        metric = trial._metric

        def spy(weights: dict[str, Tensor]) -> float:
            with trial._plain(weights) as model:
                seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
            return metric(weights)

        trial._metric = spy  # type: ignore[method-assign]
        raw = copy.deepcopy(trial.model.state_dict())
        trial._validate()
        assert all(torch.equal(seen[0][n], step.averaged[n]) for n in expected)
        assert all(torch.equal(raw[n], v) for n, v in trial.model.state_dict().items())
        assert not all(torch.equal(raw[n], step.averaged[n]) for n in expected)
        trial.step = 5
        trial._save(loader)
        trial.saver.wait()
    saved = load_latest(tmp_path / "trials/uml-0/checkpoints")
    assert saved is not None
    model = build_model(run, trial.task, 0)
    load_weights(model, saved)
    assert all(torch.equal(dict(model.named_parameters())[n], step.averaged[n]) for n in expected)


def average_in_shards(folder: Path) -> dict[str, np.ndarray]:
    """Three steps, saved; a new trial that resumes has the same average in its shards."""
    run = run_config(folder, dist=DistConfig(strategy="fsdp"))
    with join_ranks("cpu", timeout_s=60) as ranks:
        trial = Trial(run, "uml", 0, folder, ranks)
        with trial._loader(None) as loader:
            for i in range(3):
                before, last = trial._packs(loader)
                trial.train_step(last, i, (), *before)
            trial.step = 3
            trial._save(loader)
            trial.saver.wait()
        kept = {n: whole(t) for n, t in trial.train_step.averaged.items()}
        again = Trial(run, "uml", 0, folder, ranks)
        with again._loader(None) as loader:
            again._resume(loader)
        for name, t in again.train_step.averaged.items():
            np.testing.assert_array_equal(whole(t), kept[name])
        again._validate()
        return kept


def test_the_average_of_shards_is_kept_in_parts(tmp_path: Path) -> None:
    first, second = run_ranks(average_in_shards, 2, tmp_path / "log", tmp_path / "run")
    assert all(np.array_equal(first[n], second[n]) for n in first)
    assert (tmp_path / "run/checkpoints/step-000000003").is_dir()


WAITS = {
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.is_nonzero",
    "aten.equal", "aten._unique2", "aten.unique_consecutive", "aten.unique_dim",
    "aten.repeat_interleave.Tensor",
}  # fmt: skip
"""Operators whose result, or its shape, the host has to wait for."""
READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__"}
"""Methods of tensors that do."""


def caller() -> str:
    """The innermost file of uml_fast that runs now."""
    inside = [f.filename for f in traceback.extract_stack() if "/uml_fast/" in f.filename]
    return inside[-1].rpartition("/uml_fast/")[2] if inside else ""


class Waits(TorchDispatchMode):
    """Notes where the host would wait for a device.

    Kernels look at the values of CPU tensors to check them, and at no others; those do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._methods = Reads(self.found)

    def __enter__(self) -> Waits:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        by_mask = name.startswith("aten.index") and any(
            isinstance(t, Tensor) and t.dtype == torch.bool
            for given in args if isinstance(given, list | tuple) for t in given
        )  # fmt: skip
        if by_mask or name in WAITS or name.rpartition(".")[0] in WAITS:
            note(self.found, name)
        return function(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Notes values that Python asks tensors for."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in READS:
            note(self.found, name)
        return function(*args, **(kwargs or {}))


def note(found: list[str], name: str) -> None:
    where = caller()
    if not where.startswith("kernels/"):
        found.append(f"{name} in {where}")


@pytest.mark.parametrize("make", [tiny, tiny_prediction])
@pytest.mark.parametrize("packs", [1, 2])
def test_no_step_waits_for_the_device(make: Any, packs: int) -> None:
    config = accumulating(make(), packs, ema=0.9, clip_norm=1.0)
    task = config.load(0, "uml")
    batches = cut(config, task)[:packs]
    step = TrainStep(build_model(config, task, 5), config, 0)
    step(batches[-1], 0, (), *batches[:-1])
    with Waits() as waits:
        result = step(batches[-1], 1, (True,), *batches[:-1])
    assert not waits.found
    with waits:
        assert float(result.loss) > 0
        assert result.loss.new_ones(3)[torch.ones(3, dtype=torch.bool)].tolist()
    assert {x.split()[0] for x in waits.found} >= {"__float__", "aten.index.Tensor", "tolist"}


def test_epochs_are_counted_in_packs(tmp_path: Path) -> None:
    one = dataclasses.replace(tiny(), steps=0, epochs=4.0)
    assert resolve(accumulating(one, 3)).steps == -(-resolve(one).steps // 3)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="accumulate is 0"):
        OptimConfig(accumulate=0)
    with pytest.raises(ConfigError, match=r"ema is 1\.0"):
        OptimConfig(ema=1.0)
