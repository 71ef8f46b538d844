"""What a trial starts from: its packs' layouts and its model, checked against the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from uml_fast.config import ConfigError, MixConfig, RunConfig, require
from uml_fast.data.in_memory import in_memory
from uml_fast.data.loading.loader import layouts_of, streams_of
from uml_fast.data.source import DataError, Samples, Task
from uml_fast.model.compat import release_warmup_epochs
from uml_fast.model.interop.initialise import init_from_checkpoints
from uml_fast.model.uml import Uml
from uml_fast.packing.layout import make_rules
from uml_fast.packing.pack import Layout
from uml_fast.runtime.device import resolve_device, resolve_dtype
from uml_fast.training.complete import complete
from uml_fast.training.measure import init_head

_FIT_SAMPLES = 4096
"""Samples of a source in files that normalisation statistics are taken of, evenly spread."""


def shares_of(config: RunConfig) -> dict[str, float]:
    """Part of each modality in the token mix.

    Raises:
        ConfigError: the shares are of samples still; ``resolve`` makes tokens of them.
    """
    require(config.mix.share_of == "tokens", "mix.share_of 'samples': resolve the configuration")
    return {m.name: m.share for m in config.modalities}


def resolve(config: RunConfig) -> RunConfig:
    """The configuration ``complete``, with steps, rows and shares for epochs, batch and share_of.

    They are counted on the data of the first seed. An epoch is as many packs as its samples fill;
    under ``compat="release"`` as many batches, the last one maybe smaller.
    """
    config = complete(config)
    is_of_samples = config.mix.share_of == "samples"
    if not (config.mix.batch or config.epochs or is_of_samples):
        return config
    sources = config.load(config.seed, "uml").train
    if is_of_samples:
        config = _with_token_shares(config, sources)
    mix, target = config.mix, config.target
    streams = {s.name: s for s in streams_of(sources, shares_of(config), target)}
    own = streams[target]
    if mix.batch:
        quota = mix.batch * float(own.lengths.mean()) / own.share
        rows = sum(s.rows_for(quota * s.share) for s in streams.values())
        mix = dataclasses.replace(mix, token_budget=rows)
    if not config.epochs:
        return dataclasses.replace(config, mix=mix)
    if config.compat == "release":
        steps = config.epochs * math.ceil(len(own.lengths) / mix.batch)
    else:
        rules = make_rules(tuple(streams.values()), _layouts(config, mix, sources), mix)
        packs = [1 / layout.pace for layout in rules.layouts]
        a_round = sum(packs) if mix.policy == "alternate" else packs[-1]
        steps = config.epochs * int(own.lengths.sum()) / own.share * a_round
        steps /= config.optim.accumulate
    return dataclasses.replace(config, mix=mix, steps=math.ceil(steps), epochs=0.0)


def _with_token_shares(config: RunConfig, sources: Sequence[Samples]) -> RunConfig:
    """The configuration whose shares of samples have become shares of tokens."""
    lengths = {s.name: float(s.lengths.mean()) for s in sources}
    modalities = tuple(
        dataclasses.replace(m, share=m.share * lengths[m.name]) for m in config.modalities
    )
    mix = dataclasses.replace(config.mix, share_of="tokens")
    return dataclasses.replace(config, modalities=modalities, mix=mix)


def _layouts(config: RunConfig, mix: MixConfig, sources: Sequence[Samples]) -> tuple[Layout, ...]:
    """The layouts of mode uml; with ``mix.batch`` a side that goes first alone keeps its rows."""
    *first, joint = layouts_of(sources, mix, shares_of(config), config.target)
    if not mix.batch or not first:
        return (*first, joint)
    goes_first = mix.warmup_first == "target"
    kept = tuple(r for r in joint.regions if (r.name == config.target) == goes_first)
    return Layout(kept), joint


def plan_mix(
    config: RunConfig, mode: str, task: Task, seed: int
) -> tuple[MixConfig, tuple[Layout, ...]]:
    """The mix and layouts of one mode; ``task`` holds the mode's samples.

    A unimodal pack has as many target rows as a joint UML pack, so that both modes see the same
    target data per step (under ``alternate``: on average).
    """
    shares = shares_of(config)
    if mode != "unimodal":
        mix = config.mix
        if config.compat == "release":
            mix = dataclasses.replace(mix, warmup_epochs=release_warmup_epochs(mix))
        return mix, _layouts(config, mix, task.train)
    if config.mix.policy == "alternate":
        part = shares[config.target] / sum(shares.values())
        rows = max(round(config.mix.token_budget * part), 2 * int(task.train[0].lengths.max()))
    else:
        sources = config.load(seed, "uml").train
        joint = layouts_of(sources, config.mix, shares, config.target)[-1]
        rows = next(r.rows for r in joint.regions if r.name == config.target)
    alone = MixConfig(policy="joint", token_budget=rows)
    return alone, layouts_of(task.train, alone)


def build_model(config: RunConfig, task: Task, seed: int, pretrained: bool = True) -> Uml:
    """One trial's model on the CPU: weights drawn from ``seed``, statistics of the training data.

    ``pretrained`` False: checkpoints named by ``init_from`` are not read, where the caller loads
    all weights.

    Raises:
        ConfigError: the data's modalities, row sizes or lengths do not fit the configuration's.
        DataError: the labels do not (``check_labels``).
    """
    names = [m.name for m in config.modalities]
    if [s.name for s in task.train] != names:
        raise ConfigError(
            f"the data has modalities {[s.name for s in task.train]}, the run {names}"
        )
    config = _with_classes(config, task)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Uml(config, resolve_dtype(config.precision, resolve_device(config.device)))
    for source in task.train:
        modality = model.modality(source.name)
        longest = int(source.lengths.max())
        modality.check(longest, source.row_elems, source.row_dtype)
        own = config.modality(source.name)
        if own.encoder is not None:
            own.encoder.check(source.name, longest)
        config.backbone.check(source.name, 1 if own.pooled else longest)
        known = in_memory(source, _FIT_SAMPLES)
        modality.fit(known.rows, known.offsets)
    if pretrained:
        init_from_checkpoints(model, config)
    if config.objective.kind == "classification":
        check_labels(config, task)
    if config.objective.init_head_from is not None:
        init_head(model, task.source(config.objective.init_head_from))
    return model


def _with_classes(config: RunConfig, task: Task) -> RunConfig:
    """The configuration with the number of classes that the data names, where it leaves it open."""
    if config.objective.kind != "classification" or config.objective.classes:
        return config
    objective = dataclasses.replace(config.objective, classes=len(task.class_names))
    return dataclasses.replace(config, objective=objective)


def check_labels(config: RunConfig, task: Task) -> None:
    """Check the labels of a classification run.

    Raises:
        DataError: a label that is no class, a target without labels, or a class that no modality
            has a sample of.
    """
    classes = config.objective.classes
    for source in (*task.train, task.validation, task.test):
        wrong = np.flatnonzero(source.labels >= classes)
        if len(wrong):
            raise DataError(
                f"{source.name}: sample {source.key(wrong[0])} has label "
                f"{source.labels[wrong[0]]}, objective.classes is {classes}"
            )
    if (task.source(config.target).labels < 0).all():
        raise DataError(f"{config.target}: no training sample has a label")
    seen = np.concatenate([s.labels for s in task.train])
    missing = np.setdiff1d(np.arange(classes), seen)
    if len(missing) and len(task.train) > 1:
        named = dict(enumerate(task.class_names))
        names = [named.get(int(c), str(c)) for c in missing[:5]]
        raise DataError(
            f"{len(missing)} of {classes} classes have no training sample in any modality: "
            f"{', '.join(names)}; lower objective.classes or add samples"
        )
