"""A grid of heads as the configuration of a run: what is compared, and what is searched.

A head is trained for every variant, number of shots, seed and point of the search. Of the points,
the best on the validation samples stands for its (variant, shots, seed); the unimodal head, of the
target alone, gets as many points to choose from as the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uml_fast.config import require
from uml_fast.grid.cells import Cell, HeadSchedule
from uml_fast.grid.data import GridDataConfig

UNIMODAL = "unimodal"
"""Name of the variant that every other one is compared with."""
Tabulated = Literal["auxiliary_shots", "ratio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantConfig:
    """One way to use other modalities, compared with the target alone."""

    name: str = "uml"
    """Name in tables and files."""
    modalities: tuple[str, ...] = ("image", "text")
    """Target first; the head lives in the feature space of the last one."""
    init: str = "random"
    """random, or the modality whose class means start the head ("Ours (init)")."""
    is_control: bool = False
    """The same network, without the losses of the auxiliaries: what a gain owes to projection and
    first weights and not to their samples."""

    def __post_init__(self) -> None:
        require(
            self.name.replace("_", "").isalnum() and self.name != UNIMODAL,
            f"variant {self.name!r}: a name is letters, digits and _, and not {UNIMODAL}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """Values that are tried for every head; the default is table 5 of the paper."""

    lr: tuple[float, ...] = (1e-3, 1e-4)
    """Largest learning rates."""
    weight_decay: tuple[float, ...] = (0.0, 0.01, 0.001)
    """Decays of AdamW."""
    batch: tuple[int, ...] = (8, 32)
    """Samples of the target in a step."""
    learn_scale: tuple[bool, ...] = (False, True)
    """Whether a logit scale per modality is learned."""
    alpha: tuple[float, ...] = (0.2, 0.5, 0.7, 1.0, 1.5)
    """Weights of the auxiliaries' losses."""
    auxiliary_shots: tuple[int | Literal["average"], ...] = ("average", 15)
    """Samples of each class of the auxiliaries; 0: all; average: one, the mean of all."""
    ratio: tuple[float, ...] = (1.0,)
    """Samples of each auxiliary in a step for one of the target."""
    points: int = 0
    """Points tried of each variant, drawn where there are more; 0: all."""
    equal: bool = True
    """Give every variant as many points: one with fewer combinations, such as the unimodal one,
    gets random learning rates and decays beside them. False: the paper's protocol."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "batch", "learn_scale", "alpha", "auxiliary_shots",
                     "ratio"):  # fmt: skip
            require(len(getattr(self, name)) > 0, f"search.{name} is empty; give it a value")
        require(self.points >= 0, f"search.points is {self.points}; it must be >= 0")

    def combinations(self, is_alone: bool, tabulated: Sequence[str]) -> list[dict[str, Any]]:
        """Values of every axis that a variant has, without those that are rows of the table."""
        own = ("lr", "weight_decay", "batch", "learn_scale")
        others = () if is_alone else ("auxiliary_shots", "alpha", "ratio")
        axes = [a for a in (*own, *others) if a not in tabulated]
        values = itertools.product(*(getattr(self, a) for a in axes))
        return [dict(zip(axes, v, strict=True)) for v in values]

    def fitted(self, found: list[dict[str, Any]], points: int) -> list[dict[str, Any]]:
        """``points`` of the combinations, or all of them and random ones around them.

        Learning rates and decays that are drawn lie between a third of the least (positive) and
        three times the largest, evenly in their logarithm.
        """
        rng = np.random.default_rng(0)
        if len(found) >= points:
            return [found[i] for i in np.sort(rng.permutation(len(found))[:points])]
        decays = [v for v in self.weight_decay if v > 0]
        more = []
        for i in rng.integers(len(found), size=points - len(found)):
            drawn = {"lr": _near(rng, self.lr)}
            if decays:
                drawn["weight_decay"] = _near(rng, decays)
            more.append(found[i] | drawn)
        return [*found, *more]


def _near(rng: np.random.Generator, values: Sequence[float]) -> float:
    low, high = np.log(min(values) / 3), np.log(max(values) * 3)
    return float(f"{np.exp(rng.uniform(low, high)):.3g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class GridConfig:
    """One run of heads on frozen features: every variant, shots and seed, then the comparison."""

    recipe: str
    """Name of the recipe this configuration came from."""
    target: str
    """Name of the modality that is evaluated and exported."""
    variants: tuple[VariantConfig, ...]
    """What is compared with the target alone."""
    data: GridDataConfig
    """Where the features come from."""
    search: SearchConfig = field(default_factory=SearchConfig)
    """What is tried for every head."""
    schedule: HeadSchedule = field(default_factory=HeadSchedule)
    """Length, learning rate and early stopping of every head."""
    shots: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Training samples of each class of the target, and at most 4 to validate; 0: all."""
    seeds: int = 3
    """Number of paired seeds."""
    seed: int = 1
    """First seed; the others count up from it."""
    rows: tuple[Tabulated, ...] = ()
    """Axes of the search whose values are rows of the table each, and not chosen by validation."""
    project: bool = True
    """Project the features of every modality but the last; False: aligned encoders, as CLIP's."""
    scale: float = 1.0
    """First logit scale of every modality; 100 for CLIP."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; heads on a GPU are trained many at a time in batched products."""
    out: Path | None = None
    """Run folder; None: runs/<recipe>."""
    resume: str = "auto"
    """auto: continue the folder's run if any; never: start anew; else a run folder to continue."""

    def __post_init__(self) -> None:
        names = [v.name for v in self.variants]
        require(len(set(names)) == len(names), f"names of variants are not unique: {names}")
        for v in self.variants:
            require(
                len(v.modalities) > 1 and v.modalities[0] == self.target,
                f"variant {v.name} has the modalities {v.modalities}; the first is the target "
                f"{self.target!r}, with others behind it",
            )
        require(len(self.shots) > 0, "shots is empty; give 0 for all samples")
        require(self.seeds >= 1, f"seeds is {self.seeds}; it must be >= 1")
        require(self.seed >= 0, f"seed is {self.seed}; it must be >= 0")
        for _ in self.cells():  # every cell checks its own values
            pass

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self.resume not in ("auto", "never"):
            return Path(self.resume)
        return self.out or Path("runs") / Path(self.recipe.split(":")[0]).stem

    @property
    def metric(self) -> str:
        """What is compared: accuracy of heads."""
        return "head"

    @property
    def modalities(self) -> tuple[str, ...]:
        """All modalities of the run, the target first."""
        return tuple(
            dict.fromkeys([self.target, *(m for v in self.variants for m in v.modalities)])
        )

    @property
    def points(self) -> int:
        """Points of the search that each head is chosen from (the most of any variant)."""
        sizes = [
            len(self.search.combinations(alone, self.rows))
            for alone in (True, *(False for _ in self.variants))
        ]
        return self.search.points or max(sizes)

    def cells(self) -> Iterator[GridCell]:
        """Every head of the run, the order in which equal ones are preferred."""
        everyone = (None, *self.variants)
        points = {v: self._points(is_alone=v is None or v.is_control) for v in everyone}
        axes = itertools.product(*(getattr(self.search, r) for r in self.rows))
        tabulated = [dict(zip(self.rows, values, strict=True)) for values in axes]
        for seed in range(self.seed, self.seed + self.seeds):
            for shots in self.shots:
                for variant in everyone:
                    is_alone = variant is None or variant.is_control
                    for row in [{}] if is_alone else tabulated:
                        for point in points[variant]:
                            yield self._cell(variant, shots, seed, row, point)

    def _points(self, *, is_alone: bool) -> list[dict[str, Any]]:
        found = self.search.combinations(is_alone, self.rows)
        wanted = self.points if self.search.equal else min(self.points, len(found))
        return self.search.fitted(found, wanted)

    def _cell(
        self, variant: VariantConfig | None, shots: int, seed: int, row: dict[str, Any],
        point: dict[str, Any],
    ) -> GridCell:  # fmt: skip
        values = {**point, **row}
        if variant is not None and variant.is_control:
            values["alpha"] = 0.0
        texts = values.pop("auxiliary_shots", 0)
        cell = Cell(
            modalities=(self.target,) if variant is None else variant.modalities,
            init="random" if variant is None else variant.init,
            shots=shots, seed=seed, auxiliary_shots=0 if texts == "average" else texts,
            project=self.project, scale=self.scale, **values,
        )  # fmt: skip
        name = UNIMODAL if variant is None else variant.name
        return GridCell(name, tuple(row.items()), texts == "average", cell)


@dataclass(frozen=True, slots=True)
class GridCell:
    """A head of the run."""

    variant: str
    row: tuple[tuple[str, Any], ...]
    """Values of the axes that are rows of the table."""
    is_averaged: bool
    """Whether the auxiliaries have one sample of each class, the mean of all."""
    cell: Cell

    @property
    def group(self) -> tuple[Any, ...]:
        """What the head is one of several points for."""
        return self.variant, self.row, self.cell.shots, self.cell.seed

    def record(self) -> dict[str, Any]:
        """The head as JSON."""
        return {
            "variant": self.variant, "row": dict(self.row), "is_averaged": self.is_averaged,
            "cell": asdict(self.cell),
        }  # fmt: skip
