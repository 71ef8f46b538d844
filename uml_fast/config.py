"""Run configuration: frozen dataclasses, one line of meaning and unit under each field.

A run is one ``RunConfig``. Recipes are functions that return one; the command line overrides
fields of it (``--optim.lr 3e-4``). Sections that have several kinds (a modality, a data set, a
backbone) are base classes here, and the module that implements a kind owns its subclass.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from uml_fast.networks import BackboneConfig as BackboneConfig
from uml_fast.networks import ConfigError as ConfigError
from uml_fast.networks import ModalityConfig as ModalityConfig
from uml_fast.networks import check_finite
from uml_fast.networks import require as require
from uml_fast.optim import OptimConfig as OptimConfig

if TYPE_CHECKING:
    from uml_fast.data.source import Task

Mode = Literal["unimodal", "uml", "random", "pretrained"]
"""What a trial trains: the target alone, or all modalities; or all from one start or the other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Where a run's samples come from. Subclasses in ``uml_fast/data/`` implement ``load``."""

    def present(self, modalities: tuple[ModalityConfig, ...]) -> tuple[ModalityConfig, ...]:
        """Those of a run's modalities that there is data for."""
        return modalities

    def feature_size(self, name: str) -> int:
        """Features per row of a modality; a configuration that leaves it open gets it from here.

        Raises:
            ConfigError: the data does not say.
        """
        raise ConfigError(f"{name}.size is 0, and the data does not say how many features it has")

    def only(self, names: tuple[str, ...]) -> DataConfig:
        """The same data for some of the run's modalities."""
        return self

    def load(self, seed: int, mode: str, run: RunConfig | None = None) -> Task:
        """The samples of one trial: those of a seed, for ``unimodal`` or ``uml``.

        ``run`` is the configuration of the run in that mode; files are decoded for its modalities.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """What is minimised (paper 1.1): the sum over modalities of weight x loss."""

    kind: Literal["next_embedding", "classification"] = "classification"
    """next_embedding: predict a segment's next row; classification: one head for all modalities."""
    classes: int = 0
    """Number of classes of the shared head; 0: as many as the data names."""
    label_smoothing: float = 0.0
    """Label smoothing of the cross-entropy, 0..1."""
    project: tuple[str, ...] = ()
    """Modalities that get a bias-free projection before the shared head (paper 1.4, matrix P)."""
    learn_scale: bool = False
    """Learn one logit scale per modality (initial value 1) instead of none."""
    head_hidden: int = 0
    """Features of a hidden layer of the head (two maps with GELU, paper 1.5); 0: one linear map."""
    init_head_from: str | None = None
    """Modality whose L2-normalised class-mean embeddings initialise the head; None: random."""

    def __post_init__(self) -> None:
        if self.kind == "classification":
            require(
                self.classes == 0 or self.classes >= 2,
                f"objective.classes is {self.classes}; classification needs >= 2, or 0 for as many "
                "as the data names",
            )
        require(0 <= self.label_smoothing < 1, "objective.label_smoothing must be in [0, 1)")
        require(self.head_hidden >= 0, "objective.head_hidden must not be negative")
        require(
            self.head_hidden == 0 or self.init_head_from is None,
            "objective.init_head_from sets a linear head; leave head_hidden at 0",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig:
    """How modalities share the packs (docs/design.md, scheduler)."""

    policy: Literal["joint", "alternate", "warmup"] = "joint"
    """joint: all modalities a pack; alternate: one a pack; warmup: one side first, then joint."""
    token_budget: int = 2048
    """Rows of a joint pack over all modalities."""
    share_of: Literal["tokens", "samples"] = "tokens"
    """What the modalities' shares are parts of: rows; or samples, as long as the first seed's."""
    batch: int = 0
    """Samples of the target in a joint pack, on average, in place of ``token_budget``, and as many
    rows of a modality that goes first alone; 0: ``token_budget`` holds."""
    warmup_epochs: float = 0.0
    """Length of the warm-up in epochs of the modality that goes first (policy warmup)."""
    warmup_first: Literal["auxiliary", "target"] = "auxiliary"
    """auxiliary: the order of the authors' release; target: the order the paper describes."""
    stop_with: str | None = None
    """Modality whose end is the trial's, before ``steps``; every other one starts again."""
    stop_epochs: float = 1.0
    """Epochs of ``stop_with``; the pack in which they end is the last (the schedule is not cut)."""

    def __post_init__(self) -> None:
        require(self.token_budget >= 1, f"mix.token_budget is {self.token_budget}; it must be >= 1")
        require(self.batch >= 0, f"mix.batch is {self.batch}; it must not be negative")
        require(
            not self.batch or self.policy != "alternate",
            "mix.batch counts samples of joint packs; with policy alternate give mix.token_budget",
        )
        require(self.warmup_epochs >= 0, "mix.warmup_epochs must not be negative")
        require(self.stop_epochs > 0, "mix.stop_epochs must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalConfig:
    """Evaluation of the target modality after (and, for early stopping, during) training."""

    probe: bool = True
    """Fit a logistic regression on frozen embeddings of the target's training data (paper 1.2)."""
    probe_kind: Literal["default", "mosi"] = "default"
    """The paper's two probes: lbfgs on embeddings as they are; mosi: liblinear, standardised."""
    every: int = 0
    """Steps between validations; 0: only at the end."""
    patience: int = 0
    """Validations without improvement after which training stops; 0: never."""
    theory: bool = False
    """Check the theorems of paper 3.1 numerically and show them in the report."""

    def __post_init__(self) -> None:
        require(
            self.every >= 0 and self.patience >= 0,
            "eval.every and eval.patience must not be negative",
        )
        require(self.patience == 0 or self.every > 0, "eval.patience needs eval.every > 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of each trial (mode and seed)."""

    every: int = 500
    """Steps between checkpoints; the last step and SIGTERM always write one. 0: only those."""
    keep: int = 2
    """Checkpoints kept per trial, newest first."""

    def __post_init__(self) -> None:
        require(self.every >= 0, "checkpoint.every must not be negative")
        require(self.keep >= 1, "checkpoint.keep must be >= 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistConfig:
    """Several processes that train one model together (docs/distributed.md)."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """ddp: the whole model on each rank; fsdp: in shards; auto: fsdp if it fills half a GPU."""
    shard_ranks: int = 0
    """Ranks that hold one model together under fsdp, such as a node's (HSDP); 0: all of them."""
    timeout_s: float = 600.0
    """Seconds without progress after which a run ends, naming the rank that hangs."""

    def __post_init__(self) -> None:
        require(self.shard_ranks >= 0, "dist.shard_ranks must not be negative")
        require(
            self.shard_ranks == 0 or self.strategy != "ddp",
            "dist.shard_ranks needs --dist.strategy fsdp: under ddp every rank holds all weights",
        )
        require(self.timeout_s > 0, f"dist.timeout_s is {self.timeout_s}; it must be positive")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One run: every mode for every seed, then the comparison."""

    recipe: str
    """Name of the recipe this configuration came from."""
    target: str
    """Name of the modality that is evaluated and exported."""
    modalities: tuple[ModalityConfig, ...]
    """All modalities, the target among them."""
    data: DataConfig
    """Where the samples come from."""
    backbone: BackboneConfig
    """The shared network."""
    objective: ObjectiveConfig
    """What is minimised."""
    mix: MixConfig = field(default_factory=MixConfig)
    """How modalities share the packs."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and learning-rate schedule."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation of the target modality."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    dist: DistConfig = field(default_factory=DistConfig)
    """Several processes that train one model together."""
    steps: int = 1000
    """Optimiser steps of each trial."""
    epochs: float = 0.0
    """Length of a trial in epochs of the target, where ``steps`` is 0."""
    seeds: int = 5
    """Number of paired seeds: each is trained once per mode."""
    seed: int = 0
    """First seed; the others count up from it."""
    modes: tuple[Mode, ...] = ("unimodal", "uml")
    """What is trained for every seed: the target alone, and all modalities; or all of them from
    random weights, and from those that the networks' init_from names (paper 1.5)."""
    project_alone: bool = True
    """Whether the target alone keeps the projection behind its own network; False: the shared part
    takes that network's width instead (the paper's baseline, 1.4)."""
    metric: Literal["head", "probe", "error"] = "head"
    """What the comparison reports: accuracy of head or probe, or the target's validation error."""
    out: Path | None = None
    """Run folder; None: runs/<recipe>."""
    resume: str = "auto"
    """auto: continue the folder's run if any; never: start anew; else a run folder to continue."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of matrix products; auto: bf16 where the device multiplies it natively, else fp32."""
    float8: bool = False
    """Products around attention in float8 through torchao, on GPUs that have it (Ada, Hopper and
    later); meant for wide models and --compile, which fuses its scaling. Not measured yet."""
    compile: bool = False
    """Compile forward, losses and backward with torch.compile, once per layout, as shapes are
    fixed; seconds to a minute at the start. Under fsdp one block, which serves all."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture a step as one CUDA graph and launch that: one launch in place of one for each kernel.
    auto: where one process trains on a GPU, if the step can be captured; on: it must be."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    wandb: str | None = None
    """Project of Weights & Biases that is logged to as well (pip install wandb)."""
    trace: Path | None = None
    """File for a Perfetto trace of one trial: the first one trained with all modalities, if any."""
    profile: Path | None = None
    """File for a torch profiler trace of some steps of that trial, its phases named (NVTX too)."""
    compat: Literal["none", "release"] = "none"
    """release: the authors' padding and epoch counts, in training and evaluation; slow, and for
    comparison alone: an embedding then depends on the batch it is in."""

    def __post_init__(self) -> None:
        check_finite(self)
        object.__setattr__(self, "modalities", self.data.present(self.modalities))
        names = [m.name for m in self.modalities]
        require(len(set(names)) == len(names), f"modality names are not unique: {names}")
        require(self.target in names, f"target {self.target!r} is not among the modalities {names}")
        require(self.epochs >= 0, f"epochs is {self.epochs}; it must not be negative")
        has_length = self.steps >= 1 or (self.steps == 0 and self.epochs > 0)
        require(has_length, f"steps is {self.steps}; it must be >= 1, or 0 with --epochs")
        require(
            self.steps == 0 or self.epochs == 0,
            f"steps is {self.steps} and epochs {self.epochs:g}, but a trial has one length: add "
            "--epochs 0 or --steps 0",
        )
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be >= 1")
        require(self.seed >= 0, f"seed is {self.seed}; it must be >= 0")
        self._check_networks()
        require(self.log_every >= 1, f"log_every is {self.log_every}; it must be >= 1")
        require(
            bool(self.modes) and set(self.modes) <= set(self.compared),
            f"modes is {self.modes}; name unimodal, uml or both; else random, pretrained or both",
        )
        stop_with = self.mix.stop_with
        require(
            stop_with is None or stop_with in names,
            f"mix.stop_with is {stop_with!r}; it must be one of the modalities {names}",
        )
        require(
            self.compat == "none"
            or (self.mix.batch > 0 and not self.compile and self.optim.accumulate == 1),
            "compat 'release' pads batches: give mix.batch, do not compile or accumulate",
        )
        self._check_metric()
        unknown = set(self.objective.project) - set(names)
        require(
            not unknown,
            f"objective.project names {sorted(unknown)}, not among the modalities {names}",
        )

    def _check_networks(self) -> None:
        own = {f"{m.name}.encoder": m.encoder for m in self.modalities if m.encoder is not None}
        for name, network in ({"backbone": self.backbone} | own).items():
            least = 0 if own and name == "backbone" else 1
            require(
                network.width >= least, f"{name}.width is {network.width}; it must be >= {least}"
            )
            require(network.unfreeze_at >= 0, f"{name}.unfreeze_at must not be negative")
            require(
                network.freeze or network.unfreeze_at == 0,
                f"{name}.unfreeze_at is {network.unfreeze_at}, but the network is not frozen; add "
                f"--{name}.freeze",
            )
        pooled = [m.name for m in self.modalities if m.pooled]
        require(
            not pooled or self.objective.kind == "classification",
            f"{pooled} are pooled before the shared part, so that there are no rows to predict; "
            "next_embedding needs pooled off",
        )

    def _check_metric(self) -> None:
        kind, start = self.objective.kind, self.objective.init_head_from
        needs = "next_embedding" if self.metric == "error" else "classification"
        require(
            self.metric == "probe" or kind == needs,
            f"metric {self.metric!r} needs objective.kind {needs!r}, it is {kind!r}; use "
            "--metric probe, or head for classification, error for next_embedding",
        )
        require(self.metric != "probe" or self.eval.probe, "metric 'probe' needs eval.probe")
        require(
            start is None or kind == "classification",
            "objective.init_head_from needs objective.kind 'classification'",
        )
        require(
            start is None or any(m.name == start for m in self.modalities),
            f"objective.init_head_from names {start!r}, which is no modality of the run",
        )

    def modality(self, name: str) -> ModalityConfig:
        """The configuration of the modality called ``name``."""
        return next(m for m in self.modalities if m.name == name)

    @property
    def compared(self) -> tuple[str, str]:
        """The two modes that the run compares: the baseline, then the one in question."""
        by_start = ("random", "pretrained")
        return by_start if set(self.modes) & set(by_start) else ("unimodal", "uml")

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.resume not in ("auto", "never"):
            return Path(self.resume)
        return self.out or Path("runs") / Path(self.recipe.split(":")[0]).stem

    def load(self, seed: int, mode: str) -> Task:
        """The samples of one trial."""
        given = "unimodal" if mode == "unimodal" else "uml"
        return self.data.load(seed, given, self.for_mode(mode))

    def for_mode(self, mode: str) -> RunConfig:
        """The configuration of one mode.

        ``unimodal`` keeps the target modality alone, ``random`` no network's ``init_from``.
        """
        if mode == "random":
            modalities = tuple(
                m if m.encoder is None
                else dataclasses.replace(m, encoder=m.encoder.from_scratch())
                for m in self.modalities
            )  # fmt: skip
            backbone = self.backbone.from_scratch()
            return dataclasses.replace(self, modalities=modalities, backbone=backbone)
        if mode != "unimodal":
            return self
        target = self.modality(self.target)
        backbone = self.backbone
        if target.encoder is not None and not self.project_alone:
            width = target.encoder.given_width(target.pooled)
            backbone = dataclasses.replace(backbone, width=width)
        project = tuple(n for n in self.objective.project if n == self.target)
        objective = dataclasses.replace(self.objective, project=project, init_head_from=None)
        stop_with = self.mix.stop_with if self.mix.stop_with == self.target else None
        mix = dataclasses.replace(self.mix, stop_with=stop_with)
        data = self.data.only((self.target,))
        return dataclasses.replace(
            self, modalities=(target,), data=data, backbone=backbone, objective=objective, mix=mix
        )
