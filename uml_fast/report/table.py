"""The comparison as a person reads it: units, sides, and the table in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

THROUGHPUT = (
    ("tokens_per_s", "tokens a second", "unpadded rows trained on"),
    ("samples_per_s", "samples a second", "of all modalities"),
    (
        "mfu",
        "MFU of the measured peak",
        "useful operations over this machine's matrix-product rate",
    ),
    ("mfu_datasheet", "MFU of the datasheet peak", "the same over the maker's figure"),
    ("stall_pct", "stall", "time the device waited for data"),
    ("fill_pct", "fill", "rows of a pack that hold samples"),
    ("memory_mib", "MiB of memory", "tensors on a GPU at most, else the process; most of a rank"),
    ("ranks", "ranks", "processes that trained one model"),
    ("imbalance_pct", "imbalance", "tokens that ranks had less than the one with most, on average"),
    ("comm_pct", "exchange", "time of exchanging weights and gradients"),
    ("recompiles", "recompiles", "after warm-up"),
)
"""Keys of a summary's throughput, with their label and meaning."""


TOO_SHORT = "too short to measure (trials need two log lines; lower --log-every or train longer)"
"""Said in place of rates."""


ROW_AXES = ("auxiliary_shots", "ratio")
"""Keys of a grid's rows beside shots and mode."""


MODE_MEANING = {
    "unimodal": "unimodal: the target modality alone",
    "uml": "UML: with the unpaired modalities",
    "random": "random: the same network, steps and data from random weights",
    "pretrained": "pretrained: from the weights that init_from names",
}
"""What the report says of each mode."""


def mode_name(mode: str) -> str:
    """A mode as a person reads it."""
    return MODE_MEANING.get(mode, mode).partition(":")[0]


def compared(summary: Mapping[str, Any]) -> tuple[str, str]:
    """The two modes that a summary or a configuration compares, the baseline first."""
    by_start = ("random", "pretrained")
    if set(summary.get("modes") or ()) & set(by_start):
        return by_start
    first, second = summary.get("compared") or ("unimodal", "uml")
    return first, second


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is written: accuracies in per cent, errors as they are."""

    name: str

    @property
    def lower_is_better(self) -> bool:
        """Errors fall, accuracies rise."""
        return self.name == "error"

    @property
    def title(self) -> str:
        """Name and unit for a person."""
        names = {"head": "head accuracy in %", "probe": "linear-probe accuracy in %"}
        return names.get(
            self.name, f"{self.name}, lower is better" if self.lower_is_better else self.name
        )

    def text(self, value: float, sign: str = "") -> str:
        """A value; ``sign`` ``+`` shows its sign."""
        if self.lower_is_better:
            return f"{value:{sign}.3g}"
        return f"{100 * value:{sign}.1f}"

    def interval(self, entry: Mapping[str, Any], sign: str = "") -> str:
        """The row's interval, empty where there is none; ``sign``: that of a difference.

        That of a mean accuracy is shown without what lies beyond 0 and 100 %, where no mean can be;
        that of a difference is shown whole.
        """
        low, high = entry.get("ci95_low"), entry.get("ci95_high")
        if low is None or high is None:
            return ""
        if not (sign or self.lower_is_better):
            low, high = max(low, 0.0), min(high, 1.0)
        return f"{self.text(low, sign)}..{self.text(high, sign)}"

    def side(self, entry: Mapping[str, Any]) -> str:
        """better or worse where the interval of the difference excludes zero, else nothing.

        Nothing either where the correction for several settings (``p_holm``) does not uphold it,
        and with two seeds, which show nothing.
        """
        low, high = entry.get("ci95_low"), entry.get("ci95_high")
        if low is None or high is None or low <= 0 <= high or entry.get("n") == 2:
            return ""
        if (entry.get("p_holm") or 0.0) > 0.05:
            return ""
        return "better" if (low > 0) != self.lower_is_better else "worse"

    def is_better(self, a: float, b: float) -> bool:
        """True where value ``a`` is better than ``b``."""
        return a < b if self.lower_is_better else a > b


def print_table(summary: Mapping[str, Any]) -> str:
    """The comparison as plain text of at most 100 columns: a row a setting, baselines, verdicts."""
    first, second = map(mode_name, compared(summary))
    columns = (first, second, "difference", "95 % interval", "n")
    rows: list[tuple[str, ...]] = []
    for c in summary["comparison"]:
        m = metric_of(summary, c)
        rows.append((
            setting(summary, c), m.text(c["unimodal_mean"]), m.text(c["uml_mean"]),
            m.text(c["paired_diff_mean"], "+"), m.interval(c, "+"), str(c["n"]),
        ))  # fmt: skip
    for b in summary.get("baselines") or ():
        m = metric_of(summary, b)
        rows.append(
            (
                f"{baseline_name(b)} (baseline)",
                m.text(b["mean"]),
                "",
                "",
                m.interval(b),
                str(b["n"]),
            )
        )
    width_of_names = min(43, max([len(r[0]) for r in rows], default=0))
    lines = [f"{summary['recipe']}: {summary['target']}, {metric_of(summary).title}", ""]
    for name, *cells in ("", *columns), *rows:
        line = f"{name[:width_of_names]:<{width_of_names}}"
        for cell, width in zip(cells, (9, 11, 13, 20, 4), strict=True):
            line += f"{cell:>{width}}"
        lines.append(line.rstrip())
    lines.append("")
    if not summary["comparison"]:
        lines.append("no comparison: a paired one needs both modes with the same seeds")
    many = len(summary["comparison"]) > 1
    lines += [f"{setting(summary, c)}: {c['verdict']}" if many else c["verdict"]
              for c in summary["comparison"]]  # fmt: skip
    lines += searched(summary) + beaten_by(summary)
    rates = [
        f"{label} {rate(summary, key)}" for key, label, _ in THROUGHPUT if has_rate(summary, key)
    ]
    if is_too_short(summary):
        lines += ["", f"throughput: {TOO_SHORT}"]
    elif has_rate(summary, "tokens_per_s"):
        lines += ["", *_wrapped(rates, 100)]
    return "\n".join(lines)


def metric_of(summary: Mapping[str, Any], entry: Mapping[str, Any] | None = None) -> Metric:
    """Metric of a row of the summary, else that of the run."""
    return Metric((entry or {}).get("metric") or summary.get("metric") or "head")


def setting(summary: Mapping[str, Any], c: Mapping[str, Any]) -> str:
    """Name of a row of the comparison: its shots, and what differs from the run's usual."""
    shots = c.get("shots")
    parts = [] if shots is None else [shots_text(shots)]
    if c.get("mode") not in (None, "uml"):
        parts.append(str(c["mode"]))
    parts += [f"{k.replace('_', ' ')} {c[k]}" for k in ROW_AXES if k in c]
    if c.get("metric") not in (None, summary.get("metric")):
        parts.append(str(c["metric"]))
    return ", ".join(parts) or str(summary["target"])


def both_sides(
    summary: Mapping[str, Any], c: Mapping[str, Any]
) -> tuple[dict[Any, float], dict[Any, float]]:
    """The values by seed that a row of the comparison compares: the baseline's, the other's."""
    metric = metric_of(summary, c).name
    first, second = compared(summary)

    def values(mode: str, *keys: str) -> dict[Any, float]:
        return {
            r["seed"]: r[metric] for r in summary["results"]
            if r["mode"] == mode and r.get(metric) is not None
            and all(r.get(k) == c.get(k) for k in keys)
        }  # fmt: skip

    return values(first, "shots"), values(c.get("mode") or second, "shots", *ROW_AXES)


def shots_text(shots: int) -> str:
    """Training samples of each class; 0: all there are."""
    return f"{shots} shot{'s' if shots != 1 else ''}" if shots else "all samples"


def baseline_name(b: Mapping[str, Any]) -> str:
    """Name of a baseline, with its shots where it has any."""
    shots = b.get("shots")
    return str(b["name"]) if shots is None else f"{b['name']}, {shots_text(shots)}"


def baselines_of(summary: Mapping[str, Any], c: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The baselines a row is compared with: of its metric, and of its shots if they have any."""
    return [
        b for b in summary.get("baselines") or ()
        if metric_of(summary, b) == metric_of(summary, c)
        and b.get("shots") in (None, c.get("shots"))
    ]  # fmt: skip


def beaten_by(summary: Mapping[str, Any]) -> list[str]:
    """A sentence for each setting in which a simple baseline has a better mean than UML."""
    out = []
    second = mode_name(compared(summary)[1])
    for c in summary["comparison"]:
        m = metric_of(summary, c)
        for b in baselines_of(summary, c):
            if m.is_better(b["mean"], c["uml_mean"]):
                where = "" if len(summary["comparison"]) == 1 else f"{setting(summary, c)}: "
                out.append(
                    f"{where}the baseline {b['name']} has a better mean ({m.text(b['mean'])}) than "
                    f"{second} ({m.text(c['uml_mean'])})"
                )
    return out


def searched(summary: Mapping[str, Any]) -> list[str]:
    """What must be said where several settings were compared, or a grid was searched.

    ``summary["searched"]`` is the number of configurations that each value was chosen from.
    """
    out = []
    rows = [c for c in summary["comparison"] if c.get("p_holm") is not None]
    if len(rows) > 1:
        sides = [metric_of(summary, c).side(c) for c in rows]
        out.append(
            f"{len(summary['comparison'])} settings were compared: corrected for that (Holm), UML "
            f"is better in {sides.count('better')} and worse in {sides.count('worse')} of them"
        )
    if (summary.get("searched") or 1) > 1:
        out.append(
            f"each value is that of the configuration, of {summary['searched']}, that was best on "
            "the validation samples, chosen for each mode alone; test samples chose nothing"
        )
    return out


def has_rate(summary: Mapping[str, Any], key: str) -> bool:
    """True where the run measured this rate."""
    return (summary.get("throughput") or {}).get(key) is not None


def is_too_short(summary: Mapping[str, Any]) -> bool:
    """True where no trial logged a lap behind its first, which pays for warming up."""
    return bool((summary.get("throughput") or {}).get("is_too_short"))


def rate(summary: Mapping[str, Any], key: str) -> str:
    """A rate as text."""
    value = summary["throughput"][key]
    if key.startswith("mfu"):
        return f"{100 * value:.3g} %"
    if key.endswith("_pct"):
        return f"{value:.3g} %"
    return f"{value:,.0f}"


def _wrapped(parts: Sequence[str], width: int) -> list[str]:
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        if len(joined) > width:
            lines.append(part)
        else:
            lines[-1] = joined
    return lines
