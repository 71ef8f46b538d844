"""What analyses found in every trial, gathered into rows with intervals, charts and omissions.

A value that both modes have is compared over paired seeds; one that only UML has (the unimodal
model knows no text) stands with the interval of its mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from uml_fast.analysis.inputs import AnalysisError
from uml_fast.analysis.probe import ProbeError
from uml_fast.analysis.statistics import correct_rows, mean_interval, paired_comparison
from uml_fast.data.source import DataError

Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number that an analysis gives of each trial."""

    title: str
    """For a person; ``{}`` is what it was measured on."""
    paper: str
    """Where the paper reports it."""
    better: Better
    in_points: bool = False
    """A fraction that is shown in per cent."""


QUANTITIES = {
    "test": Quantity("accuracy on the run's test samples", "figures 5, 12 to 15", "higher", True),
    "shift": Quantity("accuracy on {}", "figures 5, 12 to 15", "higher", True),
    "shift_all": Quantity(
        "accuracy on {}, among all classes", "figures 5, 12 to 15", "higher", True
    ),
    "margin": Quantity("mean functional margin", "F.3, figure 44", "higher"),
    "margin_unit": Quantity("mean margin, features of length 1", "F.3, figure 44", "higher"),
    "silhouette": Quantity("silhouette of {}", "F.3, figure 45", "higher"),
    "davies_bouldin": Quantity("Davies-Bouldin score of {}", "F.3, figure 46", "lower"),
    "alignment": Quantity("alignment of the head with {}", "figure 47", "higher"),
    "alignment_top1": Quantity("means of {} given to their class", "figure 47", "higher", True),
    "neuron": Quantity("strongest unit between {}", "4.5, F.1", "neither"),
    "neuron_untrained": Quantity("strongest unit between {}, untrained", "4.5, F.1", "neither"),
    "neurons": Quantity("units above the untrained maximum", "4.5, F.1, figure 40", "neither"),
    "cka": Quantity("CKA of {}", "not in the paper", "neither"),
    "knn": Quantity("mutual neighbours of {}", "not in the paper", "neither", True),
}  # fmt: skip
"""Every quantity by its name in analysis.json."""


@dataclass(frozen=True, slots=True)
class Of:
    """The trial that a value is of."""

    mode: str
    """One of the two modes that the run compares."""
    seed: int
    setting: str = ""
    """Setting of a grid, such as "4 shots"; empty where the run has one alone."""


@dataclass(slots=True)
class Findings:
    """Values, charts and what was left out, gathered trial by trial."""

    compared: tuple[str, str] = ("unimodal", "uml")
    """The two modes, the baseline first."""
    names: tuple[str, str] = ("unimodal", "UML")
    """What verdicts call them."""
    values: list[dict[str, Any]] = field(default_factory=list)
    """quantity, what it was measured on, setting, mode, seed and value."""
    charts: list[dict[str, Any]] = field(default_factory=list)
    """Data of the report's charts, drawn by ``report.analyses``."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Analysis -> why it, or a part of it, was left out."""
    notes: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """(quantity, what, setting) -> what its row says besides."""

    def add(self, quantity: str, value: float, of: Of, what: str = "") -> None:
        """Take a value of one trial.

        Raises:
            AnalysisError: it is not finite.
        """
        assert quantity in QUANTITIES
        if not math.isfinite(value):
            raise AnalysisError(f"{QUANTITIES[quantity].title.format(what)} is {value}")
        self.values.append({
            "quantity": quantity, "what": what, "setting": of.setting, "mode": of.mode,
            "seed": of.seed, "value": float(value),
        })  # fmt: skip

    @contextlib.contextmanager
    def attempt(self, analysis: str) -> Iterator[None]:
        """Note why an analysis cannot be made of these data, and go on with the next."""
        try:
            yield
        except (AnalysisError, DataError, ProbeError) as error:
            self.skipped.setdefault(analysis, str(error))

    def rows(self) -> list[dict[str, Any]]:
        """A row a quantity: means, paired difference, interval and what may be said."""
        groups: dict[tuple[str, str, str], dict[str, dict[int, float]]] = {}
        for v in self.values:
            key = (v["quantity"], v["what"], v["setting"])
            modes = groups.setdefault(key, defaultdict(dict))
            modes[v["mode"]][v["seed"]] = v["value"]
        rows = [self._row(key, modes) for key, modes in groups.items()]
        compared = correct_rows([r for r in rows if r["paired_diff_mean"] is not None])
        by_place = iter(compared)
        rows = [next(by_place) if r["paired_diff_mean"] is not None else r for r in rows]
        settings = list(dict.fromkeys(r["setting"] for r in rows))
        return sorted(rows, key=lambda r: settings.index(r["setting"]))

    def shift_charts(self) -> list[dict[str, Any]]:
        """A chart a setting of the accuracies on the run's test samples and on shifted sets.

        Bars are means over seeds, with Student's t intervals (figures 5 and 12 to 15).
        """
        groups: dict[str, dict[str, dict[str, list[float]]]] = {}
        for v in self.values:
            if v["quantity"] in ("test", "shift"):
                of_set = groups.setdefault(v["setting"], {}).setdefault(v["what"] or "test", {})
                of_set.setdefault(v["mode"], []).append(v["value"])
        out = []
        for setting, sets in groups.items():
            shown = [m for m in self.compared if all(m in values for values in sets.values())]
            bars = {
                m: [dataclasses.asdict(mean_interval(values[m])) for values in sets.values()]
                for m in shown
            }
            out.append({
                "kind": "bars",
                "title": "accuracy under shift" + (f" ({setting})" if setting else ""),
                "names": list(sets), "bars": bars,
                "note": "Means over seeds and their 95 % intervals; the table has the paired ones.",
            })  # fmt: skip
        return out

    def _row(self, key: tuple[str, str, str], modes: dict[str, dict[int, float]]) -> dict[str, Any]:
        name, what, setting = key
        q = QUANTITIES[name]
        row = {
            "quantity": name, "title": q.title.format(what), "setting": setting,
            "paper": q.paper, "better": q.better, "in_points": q.in_points,
            "note": self.notes.get(key, ""),
        }  # fmt: skip
        a, b = (modes.get(mode, {}) for mode in self.compared)
        seeds = sorted(a.keys() & b.keys())
        if seeds:
            compared = paired_comparison(
                [a[s] for s in seeds], [b[s] for s in seeds], in_points=q.in_points,
                lower_is_better=q.better == "lower", is_judged=q.better != "neither",
                names=self.names,
            )  # fmt: skip
            return row | dataclasses.asdict(compared)
        mode, values = max(modes.items(), key=lambda found: len(found[1]))
        mean = mean_interval(list(values.values()))
        is_first = mode == self.compared[0]
        low, high = mean.ci95_low, mean.ci95_high
        if q.in_points and low is not None and high is not None:
            low, high = max(0.0, low), min(1.0, high)  # a share lies in 0..1
        return row | {
            "unimodal_mean": mean.mean if is_first else None,
            "uml_mean": None if is_first else mean.mean, "paired_diff_mean": None,
            "ci95_low": low, "ci95_high": high, "n": mean.n,
            "verdict": "one seed: no interval" if mean.n == 1 else "",
        }  # fmt: skip
