"""Time of an epoch on MOSI, its evaluation included, against the release's way of doing both.

    python -m pytest bench/multibench.py     writes bench/results/multibench_<machine>.json

Generated data with MOSI's layout, d = 150, batches of 32 (paper 1.2). An epoch is one pass over the
training samples of both modalities and the three probes (vision, text, both) on validation and
test. The plain way (paper 5.1 to 5.5): samples padded by a DataLoader, each modality on its own in
fp32, and an evaluation that loads every split three times and encodes both modalities twice with a
graph. It is kinder in three things: loaders have no workers (the release's two, started again for
every pass, cost more than the loading), first rows are found once, and audio is not loaded. Before
anything is timed, both must give the same embeddings.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bench import harness
from bench.plain import DEVICE
from tests.plain_uml import PlainUml, adam, pad, uml_fast_state
from uml_fast.analysis.probe import LinearProbe
from uml_fast.config import RunConfig
from uml_fast.data.loading.loader import Loader
from uml_fast.data.multibench_made import write_benchmark
from uml_fast.data.source import Source, Task
from uml_fast.model.transformer import multibench
from uml_fast.model.uml import Uml
from uml_fast.recipes.multibench import mosi
from uml_fast.runtime.machine import machine_info
from uml_fast.training.measure import AlignedSources, aligned_probes, embed, pack_source
from uml_fast.training.start import build_model, resolve, shares_of
from uml_fast.training.trial import Trial

WIDTH, BATCH, DROPOUT = 150, 32, 0.1
ROUNDS = {"plain": 2, "uml_fast": 8}
TOLERANCE = 2e-4
"""Largest difference of embeddings in fp32, relative to their deviation."""
CLOCK = harness.RecordedClock()


class Plain:
    """One call is an epoch of the release; ``seconds`` has those of its parts."""

    def __init__(self, task: Task) -> None:
        torch.manual_seed(0)
        self.names = [s.name for s in task.train]
        sizes = {s.name: s.row_elems for s in task.train}
        self.model = PlainUml(sizes, WIDTH, dropout=DROPOUT).to(DEVICE)
        self.optimizer = adam(self.model, 1e-3)
        validation, test = zip(*task.aligned, strict=True)
        splits: dict[str, tuple[Any, ...]] = {
            "train": task.train, "validation": validation, "test": test
        }  # fmt: skip
        self.splits = {name: _joined(sources) for name, sources in splits.items()}
        self.seconds = {"train": 0.0, "evaluate": 0.0}

    def __call__(self) -> dict[str, dict[str, float]]:
        begun = time.perf_counter()
        self.train()
        trained = time.perf_counter()
        scores = self.evaluate()
        self.seconds = {"train": trained - begun, "evaluate": time.perf_counter() - trained}
        return scores

    def _load(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        samples: Any = self.splits[split]
        return DataLoader(samples, BATCH, shuffle=shuffle, collate_fn=self._collate)

    def _collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {m: pad([s[m] for s in samples]) for m in self.names}
        return batch | {"label": torch.tensor([s["label"] for s in samples])}

    def train(self) -> None:
        """One pass over two loaders of the same samples, each in an order of its own."""
        self.model.train()
        loaders = (self._load("train", shuffle=True) for _ in self.names)
        for batches in zip(*loaders, strict=True):
            own = {
                m: tuple(t.to(DEVICE) for t in b[m])
                for m, b in zip(self.names, batches, strict=True)
            }
            self.optimizer.zero_grad()
            total, losses = self.model.total_loss(own, "release")  # type: ignore[arg-type]
            total.backward()
            self.optimizer.step()
            for loss in losses.values():
                loss.item()

    def embed(self, split: str, name: str) -> np.ndarray:
        """Embeddings of one modality; both are encoded, as the release does."""
        parts = []
        for batch in self._load(split):
            both = self._embed_batch(batch)
            parts.append(both[name].detach().cpu())
        return torch.cat(parts).numpy()

    def _embed_batch(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        moved = {m: [t.to(DEVICE) for t in batch[m]] for m in self.names}
        return {m: self.model.embedding(m, x, n, "release") for m, (x, n) in moved.items()}

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Three passes over each split, three probes."""
        self.model.eval()
        x: dict[str, dict[str, np.ndarray]] = {}
        y: dict[str, np.ndarray] = {}
        for split in self.splits:
            x[split] = {name: self.embed(split, name) for name in self.names}
            y[split] = torch.cat([b["label"] for b in self._load(split)]).numpy()
        scores = {}
        for view in ([self.names[0]], [self.names[1]], self.names):
            joined = {s: np.concatenate([parts[n] for n in view], 1) for s, parts in x.items()}
            probe = LinearProbe(joined["train"], y["train"], preset="mosi")
            scores["+".join(view)] = {
                s: probe.accuracy(joined[s], y[s]) for s in ("validation", "test")
            }
        return scores


def _joined(sources: tuple[Source, ...]) -> list[dict[str, Any]]:
    """The samples of a split: every modality of each, and its label."""
    return [
        {s.name: s.sample(i).copy() for s in sources} | {"label": int(sources[0].labels[i])}
        for i in range(len(sources[0]))
    ]


class UmlFast:
    """One call is an epoch of uml_fast; ``seconds`` has those of its parts."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.trial = Trial(config, "uml", 0, folder)
        t = self.trial
        self.loader = Loader(
            t.task.train, t.layouts, t.mix, 0, shares=shares_of(config), target=config.target,
            device=t.device,
        )  # fmt: skip
        self.aligned = AlignedSources.of(t.task, config, t.device)
        self.step = 0
        self.seconds = {"train": 0.0, "evaluate": 0.0}

    def __call__(self) -> dict[str, dict[str, float]]:
        begun = time.perf_counter()
        t = self.trial
        for _ in range(t.config.steps):
            batch, _ = next(self.loader)
            t.train_step(batch, self.step).loss.item()
            self.step += 1
        trained = time.perf_counter()
        scores = aligned_probes(t.model, t.config, self.aligned, ())
        self.seconds = {"train": trained - begun, "evaluate": time.perf_counter() - trained}
        return scores


def check_equal_embeddings(config: RunConfig, plain: Plain) -> float:
    """The same weights, padded the same way in fp32: largest relative difference of embeddings.

    Raises:
        AssertionError: it is above TOLERANCE.
    """
    release = dataclasses.replace(config, compat="release", precision="fp32")
    task = release.load(0, "uml")
    model: Uml = build_model(release, task, 0).to(DEVICE)
    model.load_state_dict(uml_fast_state(plain.model))
    plain.model.eval()
    worst = 0.0
    for name, (validation, _) in zip(plain.names, task.aligned, strict=True):
        expected = plain.embed("validation", name)
        got = embed(model, pack_source(validation, DEVICE, release))
        worst = max(worst, float(np.abs(got - expected).max() / expected.std()))
    assert worst <= TOLERANCE, f"embeddings differ by {worst:.1e}; a speed-up would mean nothing"
    return worst


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """Seconds of each epoch and the row of each provider."""
    folder = tmp_path_factory.mktemp("mosi")
    write_benchmark(folder / "mosi_data.pkl", "mosi")
    recipe = mosi()
    config = resolve(
        dataclasses.replace(
            recipe,
            data=dataclasses.replace(recipe.data, folder=folder),
            backbone=multibench(WIDTH, DROPOUT),
            epochs=1.0,
            device=str(DEVICE),
        )
    )
    task = config.load(0, "uml")
    plain, ours = Plain(task), UmlFast(config, folder / "run")
    difference = check_equal_embeddings(config, plain)
    providers: dict[str, Plain | UmlFast] = {"plain": plain, "uml_fast": ours}
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in providers}

    def epoch(name: str) -> None:
        providers[name]()
        parts[name].append(providers[name].seconds)

    ours()
    load_before = os.getloadavg()[0]
    seconds = harness.measure(
        {"plain": lambda: epoch("plain"), "uml_fast": lambda: epoch("uml_fast")},
        rounds=ROUNDS,
        warmup_rounds=0,
        synchronize=torch.cuda.synchronize if DEVICE.type == "cuda" else lambda: None,
    )
    dtypes = {"plain": "float32", "uml_fast": str(ours.trial.model.dtype).removeprefix("torch.")}
    rows = {}
    for name, times in seconds.items():
        rows[name] = (
            times,
            {
                "shape": "mosi",
                "d": WIDTH,
                "batch": BATCH,
                "provider": name,
                "dtype": dtypes[name],
                "train_s": round(float(np.median([p["train"] for p in parts[name]])), 3),
                "evaluate_s": round(float(np.median([p["evaluate"] for p in parts[name]])), 3),
                **harness.quantiles(times),
                "rounds": len(times),
                "samples": len(task.train[0]),
                "dropout": DROPOUT,
                "threads": torch.get_num_threads(),
                "load_before": round(load_before, 2),
                "embedding_difference_fp32": difference,
            },
        )
    ours.loader.close()
    return rows


@pytest.fixture(scope="module")
def rows() -> Iterator[list[dict[str, Any]]]:
    """Collects the rows and writes them when both are there."""
    collected: list[dict[str, Any]] = []
    yield collected
    if len(collected) == len(ROUNDS):
        harness.write_rows(harness.RESULTS / f"multibench_{harness.machine_name()}.json", collected)


@pytest.mark.benchmark(group="epoch", timer=CLOCK)
@pytest.mark.parametrize("provider", list(ROUNDS))
def test_epoch(
    benchmark: Any,
    measured: dict[str, tuple[list[float], dict[str, Any]]],
    rows: list[dict[str, Any]],
    provider: str,
) -> None:
    seconds, row = measured[provider]
    CLOCK.load(seconds)
    benchmark.extra_info.update(row, **machine_info())
    benchmark.pedantic(lambda: None, rounds=len(seconds))
    rows.append(row)
